"""Every objective trains on real data through the command line: HH pairs, labelled replies, ranked lists."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_kit.cli import main
from dpo_kit.losses import get_loss, loss_names, make_objective
from dpo_kit.tokenizer import load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
KTO = DATA / "llama-factory" / "kto_en_demo.json"
OASST = DATA / "oasst" / "en_100_tree.jsonl"
pytestmark = pytest.mark.skipif(not HH.exists(), reason="the real data of ../shared/data is not here")

# Those of the package; tests may register their own.
LOSSES = [name for name in loss_names() if get_loss(name).function.__module__.startswith("dpo_kit.")]
LISTWISE = [name for name in LOSSES if get_loss(name).shape == "lists"]
UNPAIRED = [name for name in LOSSES if get_loss(name).shape == "unpaired"]
# A plain one, one that couples the pairs of a step, and a reward model.
QUICK = ("dpo", "beta_dpo", "bradley_terry")
STEPS = 3
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's, with a chat template for the data that are messages."""
    loaded = load_tokenizer(DATA / "gpt2-tokenizer")
    loaded.chat_template = CHAT
    # GPT-2's has none, and reward models need one that no reply ends with.
    loaded.pad_token = "!"
    folder = tmp_path_factory.mktemp("tokenizer")
    loaded.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, data: Path, tokenizer: Path, loss: Any, **reference: Any) -> Path:
    """Three steps of four examples."""
    content = {
        "model": {"config": MODEL, "tokenizer": str(tokenizer)},
        "data": {"train": str(data), "invalid": "drop", "max_length": 512},
        "loss": loss,
        "reference": reference,
        "train": {
            "output_dir": str(folder / "run"),
            "batch_size": 4,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "bf16": False,
            "disable_tqdm": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def check_run(folder: Path) -> list[dict[str, Any]]:
    """The run folder is whole and every step was finite; gives the steps."""
    found = {path.name for path in folder.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "model",
        "report.html",
    } <= found
    assert not [name for name in found if "writing" in name]
    assert (folder / "model" / "model.safetensors").exists()
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)
    return steps


def train(recipe: Path) -> list[dict[str, Any]]:
    """`dpo-kit train` in this process."""
    with pytest.raises(SystemExit) as left:
        main(["train", str(recipe)])
    assert not left.value.code
    return check_run(recipe.parent / "run")


@pytest.mark.parametrize(
    "loss", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_every_loss_trains_on_hh(loss: str, tokenizer: Path, tmp_path: Path) -> None:
    data = HH
    if make_objective(loss).needs_margins:
        # HH says who won, and not by how much: its first rows with a made-up margin.
        data = tmp_path / "margins.jsonl.gz"
        with gzip.open(HH, "rt") as given, gzip.open(data, "wt") as written:
            for i, line in enumerate(islice(given, 60)):
                written.write(json.dumps({**json.loads(line), "margin": 0.5 + i % 3}) + "\n")
    train(write_recipe(tmp_path, data, tokenizer, {"name": loss}))


@pytest.mark.slow
def test_a_process_of_its_own_trains_the_same(tokenizer: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, HH, tokenizer, [{"name": "dpo"}, {"name": "sft", "weight": 0.2}])
    here = train(recipe)
    command = [sys.executable, "-m", "dpo_kit", "train", str(recipe)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    for step, other in zip(here, check_run(tmp_path / "run"), strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", UNPAIRED)
def test_labelled_conversations(loss: str, tokenizer: Path, tmp_path: Path) -> None:
    train(write_recipe(tmp_path, KTO, tokenizer, {"name": loss}))


def siblings(message: dict[str, Any], before: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each conversation of an OASST tree that ends with a person's message, and the ranked replies to it."""
    asked = message["role"] == "prompter"
    text = f"{before}\n\n{'Human' if asked else 'Assistant'}: {message['text']}"
    if asked:
        yield f"{text}\n\nAssistant: ", [r for r in message["replies"] if r.get("rank") is not None]
    for reply in message["replies"]:
        yield from siblings(reply, text)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LISTWISE)
def test_ranked_replies(loss: str, tokenizer: Path, tmp_path: Path) -> None:
    trees = [json.loads(line)["prompt"] for line in OASST.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": prompt, "completions": [r["text"] for r in ranked], "scores": [-r["rank"] for r in ranked]}
        for tree in trees
        for prompt, ranked in siblings(tree)
        if len(ranked) > 1
    ]
    assert max(len(row["completions"]) for row in rows) > 3
    data = tmp_path / "lists.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(write_recipe(tmp_path, data, tokenizer, {"name": loss}))


@pytest.mark.slow
def test_a_moving_reference_follows_the_policy(tokenizer: Path, tmp_path: Path) -> None:
    """TR-DPO: replaced after each step, the reference is the policy, and every loss is that of no margin."""
    moving = {"mode": "moving", "update_every": 1, "update_weight": 1.0}
    steps = train(write_recipe(tmp_path, HH, tokenizer, "dpo", **moving))
    assert [step["loss"] for step in steps] == pytest.approx([math.log(2)] * STEPS, abs=1e-5)
