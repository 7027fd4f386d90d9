"""`dpo-kit sample` and `data build`: replies in a file that can be gone on with, and what is made of them."""

import json
import math

import pytest
from families import make_model
from judge_server import judge_server
from pair_files import write

from dpo_kit import samples_file
from dpo_kit.cli import main
from dpo_kit.errors import InputError
from dpo_kit.labelling import Account, Candidates, Labelling, by_judge, by_reward, labelled
from dpo_kit.models import load_model
from dpo_kit.pairs import load_pairs
from dpo_kit.pairs.schema import Place
from dpo_kit.samples_file import Sampling, sample_to_file
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

TEXTS = ["the film was good and the other was bad", "abcdefgh ijkl", "a long film, and not a good one"]
PROMPTS = ["the film", "a", "the other film was", "bad", "good film", "and", "was it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny policy with its tokenizer, and a reward: how many e's there are."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_byte_level_bpe(TEXTS * 3, 265)
    tokenizer.save_pretrained(folder)
    make_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    (folder / "reward.py").write_text("def reward(text):\n    return text.count('e') + 0.1 * len(text)\n")
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SAMPLING = Sampling(samples=2, max_new_tokens=5, batch_size=3, seed=4)


def sample(folder, out, prompts=PROMPTS, sampling=SAMPLING, seed=0):
    model = load_model(folder)
    return sample_to_file(model, load_tokenizer(folder), prompts, out, sampling, say=lambda line: None)


def test_a_file_gone_on_with_equals_one_that_was_not_stopped(folder, tmp_path):
    whole = tmp_path / "whole.jsonl"
    figures = sample(folder, whole)
    content, meta = whole.read_bytes(), (tmp_path / "whole.jsonl.meta").read_text()
    lines = content.splitlines(keepends=True)
    assert len(lines) == len(PROMPTS)
    assert not (tmp_path / "whole.jsonl.writing").exists()
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    places = {ends[0], 7, ends[1], ends[2] + 5, ends[3], ends[3] + 1, ends[4], ends[6], ends[7] - 1, ends[7]}
    for place in sorted(places):
        out = tmp_path / f"cut{place}.jsonl"
        (tmp_path / f"{out.name}.writing").write_bytes(content[:place])
        (tmp_path / f"{out.name}.meta").write_text(meta)
        found = sample(folder, out)
        assert out.read_bytes() == content, place
        assert {k: v for k, v in found.items() if k != "seconds"} == {
            k: v for k, v in figures.items() if k != "seconds"
        }
        assert found["seconds"] >= figures["seconds"]


def test_only_what_is_lacking_is_sampled(folder, tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    sample(folder, out)
    content = out.read_bytes()
    (tmp_path / "a.jsonl.writing").write_bytes(b"".join(content.splitlines(keepends=True)[:4]))
    out.unlink()
    asked = []
    real = samples_file.sample_replies
    monkeypatch.setattr(samples_file, "sample_replies", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    sample(folder, out)
    assert asked == [PROMPTS[3:6], PROMPTS[6:]]
    sample(folder, out)
    assert len(asked) == 2
    assert out.read_bytes() == content


def test_figures_are_those_of_the_lines(folder, tmp_path):
    figures = sample(folder, tmp_path / "a.jsonl")
    rows = read(tmp_path / "a.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(len(row[name]) == 2 for row in rows for name in ("completions", "tokens", "finished"))
    assert figures["replies"] == 14
    assert figures["tokens_sampled"] == sum(sum(row["tokens"]) for row in rows)
    lengths = [len(ids) for ids in load_tokenizer(folder)(PROMPTS)["input_ids"]]
    assert figures["tokens"] == 2 * sum(lengths) + figures["tokens_sampled"]
    assert figures["unfinished"] == sum(row["finished"].count(False) for row in rows) > 0
    # A reply that is not finished has all the tokens that it may.
    assert all(
        t == 5 for row in rows for t, done in zip(row["tokens"], row["finished"], strict=True) if not done
    )


def test_batches_have_seeds_of_their_own(folder, tmp_path):
    """The same prompts in two batches get other replies; with another seed all do."""
    sample(folder, tmp_path / "a.jsonl", prompts=["a", "b", "c"] * 2)
    rows = read(tmp_path / "a.jsonl")
    assert [row["completions"] for row in rows[:3]] != [row["completions"] for row in rows[3:]]
    sample(folder, tmp_path / "b.jsonl", sampling=Sampling(2, 5, batch_size=3, seed=5))
    sample(folder, tmp_path / "c.jsonl")
    assert read(tmp_path / "b.jsonl") != read(tmp_path / "c.jsonl")


def test_a_file_of_something_else_is_refused(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    sample(folder, out)
    with pytest.raises(InputError, match=r"temperature 1\.0 and not 0\.5"):
        sample(folder, out, sampling=Sampling(2, 5, 0.5, batch_size=3, seed=4))
    with pytest.raises(InputError, match="other prompts"):
        sample(folder, out, prompts=PROMPTS[:3])
    other = make_model("llama", vocab_size=265, seed=9)
    with pytest.raises(InputError, match="another model"):
        sample_to_file(other, load_tokenizer(folder), PROMPTS, out, SAMPLING)
    (tmp_path / "a.jsonl.meta").unlink()
    with pytest.raises(InputError, match="nothing says what it was made by"):
        sample(folder, out)


def test_what_cannot_be_sampled_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="all the same"):
        sample(folder, tmp_path / "a.jsonl", sampling=Sampling(2, 5, temperature=0.0))
    short = make_model("gpt2", vocab_size=265, n_positions=8)
    with pytest.raises(InputError, match="has 8 positions") as caught:
        sample_to_file(short, load_tokenizer(folder), PROMPTS, tmp_path / "a.jsonl", SAMPLING)
    assert caught.value.field == "max_new_tokens"
    assert not list(tmp_path.iterdir())


def test_the_command_samples_distinct_prompts_of_any_source(folder, tmp_path, capsys):
    pair = {"prompt": "the film", "chosen": " was good", "rejected": " was bad"}
    pairs = write(tmp_path / "pairs.jsonl", pair, pair | {"rejected": " was"}, pair | {"prompt": "a"})
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"})
    (tmp_path / "lines.txt").write_text("c\n\nd\n")
    out = tmp_path / "out.jsonl"
    sources = (pairs, prompts, tmp_path / "lines.txt")
    settings = ("--n", 2, "--max-new-tokens", 3, "--out", out, "--json")
    assert run("sample", folder, *sources, *settings) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in read(out)] == ["the film", "a", "b", "c", "d"]
    assert figures["prompts"] == 5
    assert run("sample", folder, *sources, *settings, "--max-prompts", 2) == 2
    said = capsys.readouterr().err
    assert "other prompts" in said
    assert "More prompts are sampled to another file" in said


def test_only_one_process_samples_into_a_file(folder, tmp_path, monkeypatch):
    """A second one, begun within the first one's second batch, is refused; the file is as without it."""
    real, refused = samples_file.sample_replies, []

    def asked(*arguments, **settings):
        if arguments[2] == PROMPTS[3:6]:
            with pytest.raises(InputError, match="another process is sampling into this file") as caught:
                sample(folder, tmp_path / "a.jsonl")
            refused.append(caught.value)
        return real(*arguments, **settings)

    sample(folder, tmp_path / "whole.jsonl")
    monkeypatch.setattr(samples_file, "sample_replies", asked)
    sample(folder, tmp_path / "a.jsonl")
    assert len(refused) == 1
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_lines_of_something_else_are_found_before_the_file_is_whole(folder, tmp_path, monkeypatch):
    real = samples_file.sample_replies

    def meddled(*arguments, **settings):
        if arguments[2] == PROMPTS[6:]:
            with open(tmp_path / "a.jsonl.writing", "a") as file:
                file.write('{"prompt": "c"}\n')
        return real(*arguments, **settings)

    monkeypatch.setattr(samples_file, "sample_replies", meddled)
    with pytest.raises(InputError, match="something else has written here"):
        sample(folder, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("out", "settings", "expected"),
    [
        ("out.jsonl.gz", (), "plain lines of JSON"),
        ("out.json", (), "plain lines of JSON"),
        ("prompts.jsonl", (), "this file is one of the sources"),
        ("out.jsonl", ("--top-p", 0), "--top-p"),
    ],
)
def test_what_the_command_refuses(folder, tmp_path, capsys, out, settings, expected):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"})
    content = prompts.read_bytes()
    assert run("sample", folder, prompts, "--out", tmp_path / out, *settings) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert prompts.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def of(*replies, prompt="p"):
    return Candidates(prompt, list(replies), Place("f", 1))


def by_length(prompts, replies):
    return [float(len(reply)) for reply in replies]


def build(lists, account=None, score=None, **settings):
    account = Account() if account is None else account
    return list(labelled(lists, score or by_reward(by_length), Labelling(**settings), account))


def test_all_six_pairs_of_four_replies_with_a_tie():
    account = Account()
    rows = build([of("aaa", "b", "ccccc", "ddd")], account)
    found = {(row["chosen"], row["rejected"]): row["margin"] for row in rows}
    assert found == {
        ("aaa", "b"): 2, ("ccccc", "aaa"): 2, ("ccccc", "b"): 4, ("ddd", "b"): 2, ("ccccc", "ddd"): 2,
    }  # fmt: skip
    assert account.left_out == {"tie": 1}
    assert len({row["prompt_id"] for row in rows}) == 1
    assert (account.rows, account.replies, account.mean) == (5, 4, 3.0)


def test_equal_and_empty_replies_are_counted():
    account = Account()
    rows = build([of("aa", "b", "aa", " "), of("x", "x"), of("", "y"), of()], account)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("aa", "b"), ("aa", "b")]
    assert (account.prompts, account.replies, account.empty, account.equal) == (4, 8, 2, 2)
    assert account.left_out == {"same_reply_in_list": 1, "nothing_to_compare": 3}
    assert account.mean == pytest.approx((2 + 1 + 2 + 1 + 1 + 1) / 6)
    (row,) = build([of("aa", "b", "aa")], shape="lists")
    assert (row["completions"], row["scores"]) == (["aa", "b"], [2, 1])


def test_which_pairs_and_margins():
    four = [of("a", "bb", "cccc", "dddddddd")]
    assert [row["margin"] for row in build(four, pairs="best_worst")] == [7]
    assert [row["margin"] for row in build(four, pairs="adjacent")] == [4, 2, 1]
    account = Account()
    assert len(build(four, account, min_margin=4)) == 3
    assert account.left_out == {"below_min_margin": 3}
    assert len(build(four, pairs="random:2", seed=3)) == 2
    for settings in (
        {"shape": "lists", "labels": "bradley_terry"},
        {"shape": "lists", "pairs": "adjacent"},
        {"shape": "lists", "min_margin": 1},
        {"labels": "worst"},
        {"shape": "list"},
        {"pairs": "some"},
    ):
        with pytest.raises(InputError):
            Labelling(**settings)


def test_bradley_terry_labels_are_drawn_with_their_probability():
    lists = [of("a", "bb", prompt=f"p{i}") for i in range(4000)]
    rows = build(lists, labels="bradley_terry", seed=1)
    better = sum(row["margin"] > 0 for row in rows)
    p = 1 / (1 + math.exp(-1))
    assert abs(better - 4000 * p) < 4 * math.sqrt(4000 * p * (1 - p))
    assert all((row["margin"] > 0) == (row["chosen"] == "bb") for row in rows)
    # A prompt's labels are the same whatever stands around it.
    assert build(lists[1:50], labels="bradley_terry", seed=1) == rows[1:50]


def test_a_judge_ranks_first_and_then_scores():
    longer = lambda prompts, a, b: [float(len(x) > len(y)) for x, y in zip(a, b, strict=True)]  # noqa: E731
    (row,) = build([of("aaaa", "b", "cc")], score=by_judge(longer), shape="lists")
    high, low, middle = row["scores"]
    assert high > middle > low
    assert high == pytest.approx(-low)


@pytest.mark.filterwarnings("ignore:the judge came to nothing")
def test_a_tie_gives_no_pair_and_no_verdict_is_counted():
    ties, account = [of("aa", "bb", prompt=f"p{i}") for i in range(50)], Account()
    assert build(ties, account, labels="bradley_terry") == []
    assert account.left_out == {"tie": 50}
    account = Account()
    circle = {("a", "b"): 1.0, ("b", "c"): 1.0, ("a", "c"): 0.0}
    judge = lambda prompts, a, b: [circle[pair] for pair in zip(a, b, strict=True)]  # noqa: E731
    assert build([of("a", "b", "c")], account, by_judge(judge)) == []
    assert account.left_out == {"tie": 3}
    silent, account = lambda prompts, a, b: [None] + [1.0] * (len(a) - 1), Account()
    assert len(build([of("a", "b", "c")], account, by_judge(silent))) == 2
    assert account.no_verdict == account.to_dict()["no_verdict"] == 1
    assert "1 comparisons without a verdict" in account.summary("pairs")


def test_a_judge_behind_an_endpoint_is_asked_as_the_options_say(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_KEY", "sk-not-to-be-written")
    source = write(tmp_path / "c.jsonl", {"prompt": "p", "completions": ["aaa", "bbbbb"]})
    (tmp_path / "ask.txt").write_text("Q {prompt}\n1 {first}\n2 {second}\nAnswer 'Preferred: A' or so.")
    with judge_server(
        lambda text, n: f"Preferred: {'B' if 'bbbbb' in text.split('2 ')[1] else 'A'}"
    ) as server:
        options = (
            "--judge-model",
            "tiny",
            "--judge-prompt",
            tmp_path / "ask.txt",
            "--judge-key-env",
            "JUDGE_KEY",
        )
        setting = ("--judge-setting", "max_tokens=9", "--judge-concurrency", 1, "--json")
        out = tmp_path / "pairs.jsonl"
        assert run("data", "build", source, "--out", out, "--judge", server.url, *options, *setting) == 0
    assert [row["chosen"] for row in load_pairs(out)] == ["bbbbb"]
    assert {(body["model"], body["max_tokens"]) for body in server.requests} == {("tiny", 9)}
    assert all(text.startswith("Q p\n1 ") for text in server.texts)
    assert set(server.keys) == {"Bearer sk-not-to-be-written"}


def test_building_from_the_command_line(folder, tmp_path, capsys):
    rows = (
        {"prompt": "p", "completions": ["aaa", "bbbbb", "c"]},
        {"prompt": "q", "completions": ["e", "eee"]},
    )
    source = write(tmp_path / "c.jsonl", *rows)
    reward = f"{folder / 'reward.py'}:reward"
    out = tmp_path / "pairs.jsonl"
    assert run("data", "build", source, "--out", out, "--reward", reward, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert [row["chosen"] for row in load_pairs(out)] == ["bbbbb", "bbbbb", "aaa", "eee"]
    lists = tmp_path / "lists.parquet"
    assert (
        run("data", "build", source, "--out", lists, "--judge", f"reward:{reward}", "--shape", "lists") == 0
    )
    assert load_pairs(lists, shape="lists")[1]["scores"] == pytest.approx(
        [-math.log(11) / 2, math.log(11) / 2]
    )
    capsys.readouterr()
    assert run("data", "build", source, "--out", tmp_path / "x.jsonl") == 2
    assert "--reward or --judge" in capsys.readouterr().err
    tied = write(tmp_path / "tied.jsonl", {"prompt": "p", "completions": ["aa", "bb"]})
    assert run("data", "build", tied, "--out", tmp_path / "x.jsonl", "--reward", reward) == 2
    assert "left out 1: the replies are equally good" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_scored_samples_load_as_ranked_lists(folder, tmp_path):
    sample(folder, tmp_path / "a.jsonl")
    rows = [row | {"scores": [1.0, 2.0]} for row in read(tmp_path / "a.jsonl")]
    data = load_pairs(write(tmp_path / "scored.jsonl", *rows), shape="lists", invalid="drop")
    assert data[0]["completions"] == rows[0]["completions"]


def test_sampling_building_and_training_by_turns(folder, tmp_path):
    """Offline data made and remade, as iterated methods do: sample, build, train, and again."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    policy, lengths = folder, []
    for turn in range(2):
        samples, pairs = tmp_path / f"samples{turn}.jsonl", tmp_path / f"pairs{turn}.jsonl"
        drawn = ("--n", 12, "--max-new-tokens", 6, "--seed", turn)
        assert run("sample", policy, tmp_path / "prompts.txt", "--out", samples, *drawn) == 0
        reward = f"{folder / 'reward.py'}:reward"
        assert run("data", "build", samples, "--out", pairs, "--reward", reward, "--pairs", "best_worst") == 0
        lengths.append(sum(len(reply) for row in read(samples) for reply in row["completions"]))
        recipe = tmp_path / f"recipe{turn}.yaml"
        recipe.write_text(
            f"model: {{path: {policy}}}\ndata: {{train: {pairs}, cache_dir: {tmp_path / 'cache'}}}\n"
            "loss: {name: dpo, beta: 0.1}\nreport: {enabled: false}\nreference: {mode: live}\n"
            f"train: {{output_dir: {tmp_path / f'run{turn}'}, batch_size: 7, max_steps: 20, "
            "learning_rate: 3.0e-3, disable_tqdm: true, bf16: false, save_strategy: 'no', use_cpu: true}\n"
        )
        assert run("train", recipe) == 0
        policy = tmp_path / f"run{turn}" / "model"
    assert lengths[1] > lengths[0]
