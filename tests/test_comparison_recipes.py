"""The recipes that need a hub and a GPU, on stand-ins of the same form: each step that they tell to take."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pair_files import write
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpo_kit.cli import main
from dpo_kit.comparison.best_of_n import run_best_of_n
from dpo_kit.comparison.frontier import load_comparison
from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.comparison.runs import Run, output_folder, runs_of
from dpo_kit.evaluation import load_reward
from dpo_kit.recipe import Recipe
from dpo_kit.run import run_recipe
from dpo_kit.start import make_start, started
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

# What a run on GPT-2 says: it comes with dropout, which is turned off, and has no padding token.
pytestmark = pytest.mark.filterwarnings("ignore:dropout is off", "ignore:the model has no pad_token_id")

FILMS = ["comedy", "thriller", "western", "sequel", "musical", "cartoon", "drama", "short"]
OPENINGS = ["I saw this {}", "My aunt lent me the {}", "What a {}", "Of all they made, the {}", "This {}"]
PARTS = ["acting", "script", "music", "ending", "camera work"]
OPINIONS = [["bad", "dull", "awful", "a waste"], ["good", "great", "a joy", "superb"]]
# The labels of the hub's train split are sorted: the first half is negative.
REVIEWS = [
    (f"{opening.format(film)} on day {i}, and the {part} was {opinion}.<br /><br />So {opinion}!", label)
    for label, opinions in enumerate(OPINIONS)
    for opinion in opinions
    for i, opening in enumerate(OPENINGS)
    for film in FILMS
    for part in PARTS[: 1 + i % 2]
]
SMALL = ["train.use_cpu=true", "train.bf16=false", "train.disable_tqdm=true", "report.enabled=false"]


def quiet(line: str) -> None:
    pass


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: object) -> Any:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def told_by(recipe: str, start: str, end: str) -> str:
    """The code that stands in a recipe's comments between two marks."""
    comments = [line[1:] for line in (RECIPES / recipe).read_text().split("\n") if line.startswith("#")]
    found = re.search(re.escape(start) + "(.*?)" + re.escape(end), "\n".join(comments), re.DOTALL)
    assert found, f"{recipe} has no {start} ... {end}"
    return textwrap.dedent(found[1])


def save_policy(folder: Path) -> Path:
    """A tiny model of GPT-2's architecture, with its tokenizer, which has no padding token."""
    tokenizer = train_byte_level_bpe([text for text, _ in REVIEWS], 360)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_classifier(folder: Path) -> Path:
    """A tiny RoBERTa that has learned the labels of the reviews."""
    tokenizer = train_byte_level_bpe([text for text, _ in REVIEWS], 360)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=258,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        hidden_dropout_prob=0.0,
    )
    model = RobertaForSequenceClassification(config).train()
    batch = tokenizer([text for text, _ in REVIEWS[::2]], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in REVIEWS[::2]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimiser.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_imdb(folder: Path) -> Path:
    """As stanfordnlp/imdb lies on the hub: parquet for each split, named by the README."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    splits = {
        "train": REVIEWS[::2],
        "test": REVIEWS[1::4],
        "unsupervised": [(t, -1) for t, _ in REVIEWS[1::2]],
    }
    (folder / "plain_text").mkdir(parents=True)
    head = ["---", "configs:", "- config_name: plain_text", "  default: true", "  data_files:"]
    for split, rows in splits.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        file = f"plain_text/{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(folder / file)
        head += [f"  - split: {split}", f"    path: plain_text/{split}-*"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return folder


class Comparison(NamedTuple):
    """A comparison's recipe, its folder, and its runs by their methods."""

    recipe: Recipe
    folder: Path
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def imdb(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Comparison:
    """The quick form of recipes/sentiment-imdb.yaml on the stand-ins, its start made."""
    folder = tmp_path_factory.mktemp("imdb")
    data, classifier = save_imdb(folder / "imdb"), save_classifier(folder / "classifier")
    overrides = [
        *SMALL,
        f"model.path={policy}",
        f"sft.corpus=hf://{data}@train",
        "sft.max_length=64",
        "sft.train.batch_size=16",
        "sft.train.learning_rate=1e-2",
        "sft.train.warmup_steps=0",
        f"candidates.source=hf://{data}@unsupervised",
        "candidates.prompts=22",
        "candidates.held_out=4",
        "candidates.evaluation=6",
        f"eval.reward=classifier:{classifier}@POSITIVE",
        "eval.max_new_tokens=12",
        "eval.every=1",
        "train.max_steps=2",
        "train.learning_rate=1e-3",
        "train.warmup_steps=0",
        f"data.cache_dir={folder / 'tokens'}",
        "ppo.settings={total_episodes: 16, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, "
        "num_ppo_epochs: 1, learning_rate: 1e-3, temperature: 1.0}",
        "frontier.methods.ppo.set={eval.every: 1}",
        "frontier.methods.ppo_gt.set={eval.every: 1, ppo.reward: 'true'}",
        "best_of_n.n=[1, 2]",
        f"frontier.output_dir={folder / 'frontier'}",
    ]
    recipe = load_comparison(RECIPES / "sentiment-imdb.yaml", overrides, quick=True)
    place = output_folder(recipe)
    (place / "start").mkdir(parents=True)
    make_start(recipe, place / "start", quiet)
    return Comparison(recipe, place, {run.method: run for run in runs_of(recipe, place)})


def test_the_classifier_stands_in_for_the_true_reward(imdb: Comparison) -> None:
    spec = imdb.recipe.eval.reward
    assert spec is not None
    unseen = REVIEWS[1::2]
    rewards = load_reward(spec)([""] * len(unseen), [text for text, _ in unseen])
    assert sum((r > 0) == label for r, (_, label) in zip(rewards, unseen, strict=True)) > 0.95 * len(unseen)


def test_what_all_runs_start_from(imdb: Comparison) -> None:
    start = imdb.folder / "start"
    pairs, prompts = lines(start / "pairs" / "train.jsonl"), lines(start / "pairs" / "prompts.jsonl")
    tokenizer = load_tokenizer(start / "sft" / "model")
    assert tokenizer.pad_token_id is None
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in [*pairs, *prompts]} <= set(range(2, 9))
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in prompts}
    assert len(pairs) > 5 * 22, "nearly all six pairs of 22 prompts"
    assert all(row["margin"] > 0 for row in pairs)


def test_runs_of_each_kind_give_reward_and_kl(imdb: Comparison) -> None:
    pytest.importorskip("dpo_kit.comparison.ppo", reason="trl 1.12 is not installed")
    from dpo_kit.comparison.ppo_run import run_ppo

    trained_reward_model(started(imdb.recipe, imdb.folder / "start"), imdb.folder / "reward_model", quiet)
    runs: list[tuple[str, Callable[..., Any], list[int]]] = [
        ("dpo", run_recipe, [0, 1, 2]),
        ("ppo", run_ppo, [0, 1, 2]),
        ("ppo_gt", run_ppo, [0, 1, 2]),
        ("best_of_n", run_best_of_n, [1, 2]),
    ]
    for method, carry_out, steps in runs:
        run = imdb.runs[method]
        carry_out(run.recipe, say=quiet)
        measured = [line for line in lines(run.folder / "metrics.jsonl") if "eval_reward" in line]
        assert [line["step"] for line in measured] == steps, method
        assert all(math.isfinite(line["eval_reward"]) for line in measured), method
        assert all(math.isfinite(line["eval_kl"]) for line in measured), method
        assert measured[0]["eval_kl"] == 0 < measured[-1]["eval_kl"], method
        replies = lines(run.folder / "evaluations" / f"step-{steps[-1]}.jsonl")
        assert len(replies) == 6, method


def test_single_turn_dialogue_from_data_to_win_rate(policy: Path, tmp_path: Path) -> None:
    """The steps of recipes/hh-single-turn.yaml: pairs with one human turn, Preferred-FT, DPO, eval."""
    first = "\n\nHuman: What is the {} like?\n\nAssistant:"
    rows = []
    for film in FILMS:
        prompt = first.format(film)
        rows.append(
            {side: f"{prompt} It is {word}." for side, word in (("chosen", "good"), ("rejected", "bad"))}
        )
        prompt += " It is good.\n\nHuman: Why?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} I like it.", "rejected": f"{prompt} No."})
    hh = write(tmp_path / "hh.jsonl", *rows)
    assert command("data", "convert", hh, tmp_path / "all.jsonl", "--invalid", "drop") == 0
    code = told_by("hh-single-turn.yaml", 'python -c "', '"')
    with open(tmp_path / "all.jsonl") as whole, open(tmp_path / "single.jsonl", "w") as single:
        subprocess.run([sys.executable, "-c", code], stdin=whole, stdout=single, check=True)
    kept = lines(tmp_path / "single.jsonl")
    assert [row["prompt"] for row in kept] == [first.format(film) for film in FILMS]

    recipe, data = RECIPES / "hh-single-turn.yaml", tmp_path / "single.jsonl"
    shared = [
        *SMALL,
        "train.max_steps=2",
        "train.batch_size=4",
        f"data.train={data}",
        f"data.eval={data}",
        f"data.cache_dir={tmp_path / 'tokens'}",
        f"reference.cache_dir={tmp_path / 'logps'}",
    ]
    tuned, trained = tmp_path / "preferred-ft", tmp_path / "dpo"
    sft = [f"model.path={policy}", "loss={name: sft}", f"train.output_dir={tuned}"]
    assert command("train", recipe, *shared, *sft) == 0
    dpo = [f"model.path={tuned / 'model'}", f"train.output_dir={trained}"]
    assert command("train", recipe, *shared, *dpo) == 0
    assert json.loads((trained / "summary.json").read_text())["steps"] == 2
    out, against = tmp_path / "win-rates", ["--against", "chosen", "--agreement"]
    assert evaluated(trained, tuned, data, out, *against, "--temperature", 0.25, "--temperature", 1) == 0
    found = json.loads((out / "eval.json").read_text())
    assert [(row["temperature"], row["against"]) for row in found["win_rates"]] == [
        (0.25, "chosen"),
        (1, "chosen"),
    ]
    assert all(0 <= row["rate"] <= 1 for row in found["win_rates"])
    # The judge likes the longer reply, and "good" is longer than "bad".
    assert found["agreement"][0]["agreement"] == 1


def test_summaries_from_data_to_win_rate(policy: Path, tmp_path: Path) -> None:
    """The steps of recipes/tldr.yaml: comparisons as parquet, DPO, references, eval."""
    rows = []
    for i, film in enumerate(FILMS):
        info = {"post": f"I saw the {film}.", "title": film, "subreddit": "movies", "article": None}
        if i == 0:
            info |= {"post": None, "title": None, "subreddit": None, "article": "News of a film."}
        policies = ["ref", "sup2"] if i % 2 else ["sup2", "sup4"]
        texts = [f" Saw the {film}, liked it.", f" A {film}."]
        summaries = [{"text": t, "policy": p, "note": None} for t, p in zip(texts, policies, strict=True)]
        rows.append({"info": info, "summaries": summaries[:: -1 if i % 4 == 3 else 1], "choice": i % 2})
    data = tmp_path / "comparisons"
    data.mkdir()
    Dataset.from_list(rows).to_parquet(data / "validation-00000-of-00001.parquet")
    places = [f"data.train={data}", f"train.output_dir={tmp_path / 'dpo'}", f"model.path={policy}"]
    places += [f"data.cache_dir={tmp_path / 'tokens'}", f"reference.cache_dir={tmp_path / 'logps'}"]
    sizes = ["train.max_steps=2", "train.batch_size=4"]
    assert command("train", RECIPES / "tldr.yaml", *SMALL, *sizes, *places) == 0

    code = told_by("tldr.yaml", "<<END\n", "END\n")
    references = tmp_path / "references.jsonl"
    with open(references, "w") as file:
        subprocess.run([sys.executable, "-", data], input=code, stdout=file, check=True, text=True, cwd=ROOT)
    chosen = [row["summaries"][row["choice"]] for row in lines(references)]
    assert [summary["text"] for summary in chosen] == [f" Saw the {film}, liked it." for film in FILMS[1::2]]
    out, options = tmp_path / "win-rates", ["--against", "chosen", "--temperature", 0, "--temperature", 1]
    assert evaluated(tmp_path / "dpo", policy, references, out, *options) == 0
    rates = json.loads((out / "eval.json").read_text())["win_rates"]
    assert [(row["temperature"], row["wins"] + row["ties"] + row["losses"]) for row in rates] == [
        (0, 4),
        (1, 4),
    ]


def evaluated(run: Path, reference: Path, data: Path, out: Path, *options: object) -> Any:
    """The status of `dpo-kit eval` with a reward as the judge."""
    reward = out.with_suffix(".py")
    reward.write_text("def length(text):\n    return float(len(text))\n")
    policy = reference / "model" if (reference / "model").is_dir() else reference
    judge = ["--judge", f"reward:{reward}:length", "--max-new-tokens", 6, "--max-prompts", 8, "--out", out]
    return command("eval", run / "model", "--reference", policy, "--data", data, *options, *judge)
