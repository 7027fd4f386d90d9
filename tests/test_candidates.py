"""What a run starts from: SFT on a corpus, prompts drawn from texts, pairs of the policy's own replies."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from families import make_model
from pair_files import write

from dpo_kit.candidates import HELD_OUT_FILE, PROMPTS_FILE, TRAIN_FILE, check_candidates, make_pairs
from dpo_kit.errors import InputError
from dpo_kit.evaluation import load_prompts
from dpo_kit.evaluation.sampling import encode_prompts
from dpo_kit.prompts import Prefixes, draw_prompts
from dpo_kit.recipe import Recipe
from dpo_kit.run import run_recipe
from dpo_kit.sft import learn_tokenizer, read_corpus, text_rows
from dpo_kit.texts import read_prompts, read_texts
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

pytestmark = pytest.mark.filterwarnings("default::dpo_kit.errors.DpoKitWarning")

WORDS = "the film was good and other bad actors never moved a single long scene of this quiet story"
TEXTS = [" ".join(WORDS.split()[(i * j + j) % 18] for j in range(1, 14)) + f" {i}." for i in range(150)]
STRANGE = [
    "Ein schöner Film über Zürich, größer als das Leben selbst, und doch ganz klein geblieben.",
    "这部电影非常好看，演员的表演也很精彩，我会推荐给所有的朋友们去看。",
    "😀😃😄😁😆😅😂🤣 what a film 🎬🎬🎬🎬 and then some more of it 👨‍👩‍👧‍👦👨‍👩‍👧‍👦",
    "  two  spaces   and\ttabs \n and lines\n\nand don't, we'll, it's over and done <br /><br />with",
    "\u00a0\u2003 odd spaces \u0301\u0301 combining e\u0301e\u0301e\u0301 and naïve façades all the way down",
]


def save_policy(folder, **changes):
    tokenizer = train_byte_level_bpe([*TEXTS, *STRANGE], 300)
    tokenizer.save_pretrained(folder)
    fields = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0} | changes
    make_model("llama", **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def tokenizer(policy):
    return load_tokenizer(policy)


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    """A folder as stanfordnlp/imdb lies on the hub."""
    folder = tmp_path_factory.mktemp("imdb")
    (folder / "data").mkdir()
    for split, texts, labels in (
        ("train", TEXTS[:60], [i % 2 for i in range(60)]),
        ("unsupervised", TEXTS[60:], [-1] * 90),
    ):
        table = pyarrow.table({"text": texts, "label": labels})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_recipe(folder, policy, source, **candidates):
    (folder / "reward.py").write_text("def reward(text):\n    return len(text) / 10\n")
    section = {
        "source": str(source), "prompts": 14, "held_out": 4, "evaluation": 5, "batch_size": 4,
        "max_new_tokens": 6, "reward": f"{folder / 'reward.py'}:reward",
    }  # fmt: skip
    quiet = {"disable_tqdm": True, "bf16": False, "use_cpu": True, "save_strategy": "no"}
    return {
        "model": {"path": str(policy)},
        "data": {"cache_dir": str(folder / "cache")},
        "candidates": section | candidates,
        "reference": {"mode": "live"},
        "train": quiet | {"output_dir": str(folder / "run"), "batch_size": 6, "max_steps": 2},
        "eval": {"max_new_tokens": 6, "reward": f"{folder / 'reward.py'}:reward"},
        "report": {"enabled": False},
    }


@pytest.mark.parametrize("range_", [(2, 8), (1, 1), (3, 5)])
def test_prefixes_are_exact_and_have_the_tokens_that_were_asked_for(tokenizer, range_):
    texts = STRANGE + TEXTS[:40]
    found = Prefixes(tokenizer, *range_, seed=1).of(texts)
    assert None not in [prefix for prefix, _ in found[0 if range_ == (2, 8) else len(STRANGE) :]]
    for text, (prefix, _) in zip(texts, found, strict=True):
        if prefix is None:
            continue
        assert text.startswith(prefix)
        ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        assert range_[0] <= len(ids) <= range_[1]
        assert tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)] == ids
        assert tokenizer.decode(ids) == prefix


def test_numbers_of_tokens_are_uniform_and_texts_too_short_are_none(tokenizer):
    texts = [f"{text} {n}" for text in TEXTS for n in range(4)]
    found = Prefixes(tokenizer, 2, 5, seed=0).of(texts)
    lengths = [len(tokenizer(prefix, add_special_tokens=False)["input_ids"]) for prefix, _ in found]
    assert all(abs(lengths.count(n) / len(texts) - 0.25) < 0.08 for n in (2, 3, 4, 5))
    eight = next(t for t in ("a" * n for n in range(1, 99)) if len(tokenizer(t)["input_ids"]) == 8)
    assert Prefixes(tokenizer, 2, 8, seed=0).of([eight, "", eight + "!"])[:2] == [(None, "too_short")] * 2
    assert Prefixes(tokenizer, 2, 8, seed=0).of([eight + "!"])[0][0] is not None
    # One character that is more tokens than are wanted.
    assert Prefixes(tokenizer, 1, 1, seed=0).of(["\U0001f9ff film"]) == [(None, "no_border")]


def test_drawn_prompts_are_distinct_and_depend_on_no_order(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts[:2000] * 2)))
    (tmp_path / "c.txt").write_text("\n".join(texts[1000:]))

    def draw(*names, count=5, **settings):
        return draw_prompts([str(tmp_path / f"{n}.txt") for n in names], count, **{"seed": 3} | settings)

    all_of_them = draw("a", count=3000).prompts
    assert sorted(all_of_them) == sorted(texts)
    assert draw("a").prompts == draw("b", "c").prompts == all_of_them[:5]
    assert draw("a", count=700).prompts == all_of_them[:700]
    assert draw("a", seed=4).prompts != all_of_them[:5]
    without = draw("a", without=all_of_them[:2])
    assert without.prompts == all_of_them[2:7]
    assert without.counts["kept_out"] == 2
    assert draw("a", count=9999).prompts == all_of_them


def test_texts_and_prompts_of_every_kind_of_source(tmp_path, imdb):
    (tmp_path / "a.txt").write_text("one\n \ntwo", encoding="utf-8")
    write(tmp_path / "b.jsonl", {"text": "three"}, {"text": " "}, {"text": "four"})
    (tmp_path / "c.csv").write_text("review,sentiment\nfive,positive\n")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv")]
    assert list(read_texts(paths, field="x")) == ["one", "two", "three", "four", "five"]
    assert list(read_texts([f"hf://{imdb}@unsupervised"], field="x")) == TEXTS[60:]
    assert len(list(read_texts([str(imdb)], field="x"))) == 150
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    write(tmp_path / "hh.jsonl", pair, pair)
    asked = list(read_prompts([str(tmp_path / "hh.jsonl")], field="x"))
    assert asked == ["\n\nHuman: a\n\nAssistant:"]
    write(
        tmp_path / "p.jsonl", {"prompt": "x"}, {"prompt": [{"role": "user", "content": "y"}]}, {"prompt": "x"}
    )
    assert load_prompts(tmp_path / "p.jsonl") == ["x", [{"role": "user", "content": "y"}], "x"]
    write(tmp_path / "bad.jsonl", {"text": "x"}, {"words": "y"})
    with pytest.raises(
        InputError, match=r"bad.jsonl:2: field 'text': the row has no such field. Its columns: w"
    ):
        list(read_texts([str(tmp_path / "bad.jsonl")], field="x"))
    write(tmp_path / "bad.jsonl", {"prompt": "x"}, {"prompt": 3})
    with pytest.raises(InputError, match=r"bad.jsonl:2: field 'prompt': expected text or a list of messages"):
        list(read_prompts([str(tmp_path / "bad.jsonl")], field="x"))
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    with pytest.raises(InputError, match=r"field 'sft.corpus': the file cannot be read"):
        list(read_texts([str(tmp_path / "bad.txt")], field="sft.corpus"))


KILLED = """
import json, os, signal, sys
from pathlib import Path
from dpo_kit import samples_file
from dpo_kit.candidates import make_pairs
from dpo_kit.recipe import Recipe

samples_file._SECONDS_BETWEEN_LINES = 0

def say(line):
    if line.startswith("sampled replies to 8 of"):
        os.kill(os.getpid(), signal.SIGKILL)

make_pairs(Recipe.check(json.loads(sys.argv[1])), Path(sys.argv[2]), say)
"""


@pytest.mark.slow
def test_pairs_made_after_a_kill_are_those_of_a_run_that_was_not_killed(tmp_path, policy):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    recipe = make_recipe(tmp_path, policy, tmp_path / "texts.txt", prefix_tokens=[2, 8])
    killed, whole, said = tmp_path / "killed", tmp_path / "whole", []
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), str(killed)], timeout=120)
    assert done.returncode == -9
    assert len(lines(killed / "train.samples.jsonl.writing")) == 8
    assert not (killed / TRAIN_FILE).exists()
    after = make_pairs(Recipe.check(recipe), killed, said.append)
    assert "going on after 8 of 14 prompts" in said
    never = make_pairs(Recipe.check(recipe), whole, said.append)
    for name in (TRAIN_FILE, HELD_OUT_FILE, PROMPTS_FILE, "train.samples.jsonl", "heldout.samples.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert after.pop("candidates/seconds") > 0
    assert never.pop("candidates/seconds") > 0
    assert after == never
    assert make_pairs(Recipe.check(recipe), whole, said.append) == json.loads(
        (whole / "figures.json").read_text()
    )
    _check_pairs(whole, never)


def _check_pairs(folder, figures):
    """No prompt in two files, all pairs of four replies accounted for, margins those of the reward."""
    prompts = [
        {row["prompt"] for row in lines(folder / name)} for name in (TRAIN_FILE, HELD_OUT_FILE, PROMPTS_FILE)
    ]
    samples = lines(folder / "train.samples.jsonl") + lines(folder / "heldout.samples.jsonl")
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert len(samples) == 18
    assert len(prompts[2]) == 5
    rows = lines(folder / TRAIN_FILE) + lines(folder / HELD_OUT_FILE)
    made = figures["candidates/train_pairs"] + figures["candidates/heldout_pairs"]
    assert len(rows) == made
    if not figures["candidates/empty"]:
        assert made + figures["candidates/equal"] + figures["candidates/ties"] == 6 * 18
    assert all(
        row["margin"] == pytest.approx((len(row["chosen"]) - len(row["rejected"])) / 10) for row in rows
    )
    assert all(row["margin"] > 0 for row in rows)
    assert figures["candidates/tokens_sampled"] == sum(sum(row["tokens"]) for row in samples)


def test_a_run_from_imdb_shaped_data(tmp_path, policy, imdb):
    """SFT of a model that is there on @train; prefixes of @unsupervised; none of eval.prompts among them."""
    recipe = make_recipe(tmp_path, policy, f"hf://{imdb}@unsupervised", prefix_tokens=[2, 8], evaluation=0)
    kept = draw_prompts(
        recipe["candidates"]["source"].split(), 18, seed=0, prefixes=Prefixes(load_tokenizer(policy), 2, 8, 0)
    ).prompts[:3]
    recipe["eval"]["prompts"] = str(write(tmp_path / "eval.jsonl", *({"prompt": p} for p in kept)))
    quiet = {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 5, "disable_tqdm": True}
    recipe["sft"] = {
        "corpus": f"hf://{imdb}@train", "max_length": 32, "documents": 40, "train": quiet | {"max_steps": 20}
    }  # fmt: skip
    result = run_recipe(Recipe.check(recipe), say=lambda line: None)
    losses = [row["loss"] for row in lines(result.folder / "sft" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    figures = json.loads((result.folder / "sft" / "figures.json").read_text())
    assert figures["sft/documents"] == 40
    assert figures["sft/tokens"] > 0
    assert result.summary["candidates/texts_kept_out"] >= 3
    pairs = result.folder / "pairs"
    used = {row["prompt"] for name in (TRAIN_FILE, HELD_OUT_FILE) for row in lines(pairs / name)}
    assert used
    assert not used & set(kept)
    assert all(any(text.startswith(prompt) for text in TEXTS[60:]) for prompt in used)
    assert result.summary["eval/reward_after"] is not None


def test_bradley_terry_labels_and_plain_prompts(tmp_path, policy):
    source = write(
        tmp_path / "prompts.jsonl",
        *({"prompt": " ".join(t.split()[:3]) + f" {n}"} for n, t in enumerate(TEXTS)),
    )
    recipe = make_recipe(tmp_path, policy, source, labels="bradley_terry", held_out=0, prompts=20)
    figures = make_pairs(Recipe.check(recipe), tmp_path / "pairs", lambda line: None)
    margins = [row["margin"] for row in lines(tmp_path / "pairs" / TRAIN_FILE)]
    assert any(margin < 0 for margin in margins)
    assert sum(margin > 0 for margin in margins) > len(margins) / 2
    assert not (tmp_path / "pairs" / HELD_OUT_FILE).exists()
    assert figures["candidates/train_pairs"] == len(margins)


def test_documents_begin_as_prompts_do(tokenizer):
    """With BOS, where the tokenizer puts one; else with their first token, which nothing comes before."""
    with_bos = learn_tokenizer(TEXTS, 300)
    for own, opening in ((tokenizer, []), (with_bos, [with_bos.bos_token_id])):
        rows, cut = text_rows(["the film was", "a", TEXTS[0]], own, 14)
        assert cut == 1
        (prompt,), _ = encode_prompts(["the film was"], own)
        assert rows[0]["prompt_ids"] + rows[0]["chosen_ids"] == [*prompt, own.eos_token_id]
        assert rows[0]["prompt_ids"] == (opening or prompt[:1])
        assert rows[1]["chosen_ids"][-1] == own.eos_token_id
        assert [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows][2] == 14


def test_a_corpus_of_so_many_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    section = {"corpus": [str(tmp_path / "a.txt")], "documents": 2}
    recipe = Recipe.check({"model": {"path": "x"}, "data": {"train": "y"}, "sft": section})
    assert list(read_corpus(recipe.sft)) == ["one", "two"]
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(InputError, match="there is no text in the corpus"):
        list(read_corpus(recipe.sft))


BASE = "model: {path: some-model}\ndata: {train: [a.jsonl]}\n"
CANDIDATES = "model: {path: some-model}\ndata: {}\neval: {reward: r.py:f}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "sft: {corpus: c.txt, vocabulary: 500}\n", "'sft.vocabulary': a tokenizer is there"),
        (
            "model: {config: {model_type: llama}, tokenizer: t}\ndata: {train: [a.jsonl]}\n"
            "sft: {corpus: c.txt, vocabulary: 500}\n",
            "'sft.vocabulary': a tokenizer is there",
        ),
        (CANDIDATES + "candidates: {source: a, prefix_tokens: [5, 2]}\n", r"'candidates.prefix_tokens': exp"),
        (CANDIDATES + "candidates: {source: a, prefix_tokens: [0, 2]}\n", r"'candidates.prefix_tokens': exp"),
        (BASE + "eval: {reward: r.py:f}\ncandidates: {source: a.txt}\n", "'data.train': the pairs are made"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        Recipe.check(yaml.safe_load(text))


def test_too_few_prompts_are_told_of_before_anything_is_written(tmp_path, policy):
    (tmp_path / "texts.txt").write_text("one text\nanother text\none text\n")
    recipe = Recipe.check(make_recipe(tmp_path, policy, tmp_path / "texts.txt"))
    with pytest.raises(InputError, match="23 distinct prompts are asked for and 2 are there"):
        check_candidates(recipe)
    (tmp_path / "texts.txt").write_text("\n".join(f"{n}" for n in range(40)))
    content = make_recipe(tmp_path, policy, tmp_path / "texts.txt", prefix_tokens=[2, 8])
    recipe = Recipe.check(content)
    with pytest.raises(InputError, match="0 are there"):
        check_candidates(recipe)
    with pytest.raises(InputError, match="0 are there"):
        make_pairs(recipe, tmp_path / "pairs", lambda line: None)
    assert not Path(tmp_path / "pairs").exists()
    # How many tokens the texts have, a tokenizer that is still to be learned does not say.
    learned = {"model": {"config": {"model_type": "llama"}}, "sft": {"corpus": str(tmp_path / "texts.txt")}}
    check_candidates(Recipe.check(content | learned))
    with pytest.raises(InputError, match="53 distinct prompts are asked for and 40 are there"):
        check_candidates(
            Recipe.check(content | learned | {"candidates": content["candidates"] | {"prompts": 44}})
        )


def test_prompts_to_evaluate_on_are_drawn_only_where_none_are_named(tmp_path, policy):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:20]))
    recipe = make_recipe(tmp_path, policy, tmp_path / "texts.txt")
    with pytest.raises(InputError, match="23 distinct prompts are asked for and 20 are there"):
        check_candidates(Recipe.check(recipe))
    recipe["eval"]["prompts"] = str(write(tmp_path / "eval.jsonl", {"prompt": "x"}))
    check_candidates(Recipe.check(recipe))
    # Those of the texts that are evaluated on are none to train on.
    write(tmp_path / "eval.jsonl", *({"prompt": text.upper()} for text in TEXTS[:3]))
    with pytest.raises(InputError, match="18 distinct prompts are asked for and 17 are there"):
        check_candidates(Recipe.check(recipe))
