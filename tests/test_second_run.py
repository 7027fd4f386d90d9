"""A sweep over the real HH file computes its reference once, and how a second run's speed is reported."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import second_run
from families import make_model

from dpo_kit import PreferenceConfig, PreferenceTrainer
from dpo_kit.cli import main
from dpo_kit.tokenizer import train_byte_level_bpe

HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-base/test.jsonl.gz"
needs_hh = pytest.mark.skipif(not HH.exists(), reason="the HH sample is not in ../shared/data")

LOSSES, BETAS = ("dpo", "ipo", "hinge"), (0.01, 0.05, 0.1, 0.5)
CLOCK = ("pairs_per_second",)
CUT = "\n\nAssistant:"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


def usable_dialogues() -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of HH, read with nothing but json."""
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = []
    for row in rows:
        prompt, cut, chosen = row["chosen"].rpartition(CUT)
        other, _, rejected = row["rejected"].rpartition(CUT)
        if prompt == other and chosen.strip() and rejected.strip():
            found.append((prompt + cut, chosen, rejected))
    return found


class Sweep:
    """Runs of one model over all of HH, with one cache."""

    def __init__(self, folder: Path, dialogues: list[tuple[str, str, str]]) -> None:
        self.folder = folder
        tokenizer = train_byte_level_bpe((p + c for p, c, _ in dialogues[:300]), 512)
        tokenizer.save_pretrained(folder / "model")
        make_model("llama", vocab_size=len(tokenizer), **SIZES).save_pretrained(folder / "model")

    def run(self, name: str, loss: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """One epoch -> summary.json, with the losses of all steps and the weights beside it."""
        content = {
            "model": {"path": str(self.folder / "model")},
            "reference": {"cache_dir": str(self.folder / "cache")},
            "data": {"train": str(HH), "invalid": "drop", "max_length": None},
            "loss": loss,
            "report": {"enabled": False},
            "train": {
                "output_dir": str(self.folder / name),
                "batch_size": 64,
                "num_train_epochs": 1,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "tokens_per_micro_batch": 8192,
                "bf16": False,
                "disable_tqdm": True,
            }
            | changes,
        }
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit) as left:
            main(["train", str(recipe)])
        assert not left.value.code
        folder = self.folder / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines if "loss" in line]
        weights = (folder / "model" / "model.safetensors").read_bytes()
        return json.loads((folder / "summary.json").read_text()) | {"lines": steps, "weights": weights}


@needs_hh
@pytest.mark.slow
def test_a_sweep_over_hh_runs_the_reference_exactly_once(tmp_path: Path) -> None:
    dialogues = usable_dialogues()
    assert len(dialogues) == 2303
    distinct = {(prompt, reply) for prompt, *replies in dialogues for reply in replies}
    sweep = Sweep(tmp_path, dialogues)
    found = []
    for number, (loss, beta) in enumerate(itertools.product(LOSSES, BETAS)):
        options = {"name": loss, "beta": beta}
        # Another order and learning rate in each run: neither changes what the reference says.
        found.append(sweep.run(f"{loss}-{beta}", options, seed=number, learning_rate=1e-3 / (1 + number % 3)))
    assert [run["steps"] for run in found] == [36] * 12
    assert [run["reference_computed"] for run in found] == [len(distinct)] + [0] * 11
    assert len({run["lines"][-1]["loss"] for run in found}) == 12

    again = sweep.run("again", {"name": LOSSES[0], "beta": BETAS[0]}, seed=0)
    assert again["reference_computed"] == 0
    assert again["lines"] == found[0]["lines"]
    assert again["weights"] == found[0]["weights"]


def made_up_run(reference: float, training: float, computed: int = 4, loss: float = 0.5) -> dict[str, Any]:
    return {
        "reference_runtime": reference,
        "train_runtime": training,
        "reference_computed": computed,
        "process_seconds": reference + training + 10.0,
        "peak_memory_bytes": 2 * 10**9,
        "losses": [0.7, loss],
        "others_cores": 0.0,
    }


def test_the_ratio_is_of_medians_and_of_reference_and_training() -> None:
    first = [made_up_run(*seconds) for seconds in ((3.0, 9.0), (4.0, 9.0), (30.0, 90.0))]
    second = [made_up_run(0.0, seconds, computed=0) for seconds in (9.0, 10.0, 50.0)]
    live = [made_up_run(0.0, 13.0, computed=0, loss=0.501)]
    row = second_run.row_of("fp32", {"first": first, "second": second, "live": live})
    found = dict(zip(second_run.COLUMNS, row, strict=True))
    assert found["**ratio**"] == "**1.30**"
    assert found["of the whole process"] == "1.15"
    assert found["from a live reference's"] == "1e-03"


@pytest.mark.parametrize("change", [{"loss": 0.5000001}, {"computed": 1}])
def test_no_speed_where_the_second_run_is_not_the_first_without_its_reference(change: dict[str, Any]) -> None:
    second = made_up_run(0.0, 9.0, **({"computed": 0} | change))
    row = second_run.row_of("fp32", {"first": [made_up_run(3.0, 9.0)], "second": [second], "live": []})
    found = dict(zip(second_run.COLUMNS, row, strict=True))
    assert found["**ratio**"] == found["of the whole process"] == "-"
    assert ("unequal" in found["losses, line by line"]) == ("loss" in change)


@needs_hh
@pytest.mark.slow
def test_the_script_measures_two_processes(tmp_path: Path) -> None:
    asked = ["--model", "tiny", "--pairs", "8", "--batch-size", "4", "--case", "fp32", "--side", "pair"]
    assert second_run.main([*asked, "--out", str(tmp_path)]) == 0
    first, second = (
        json.loads((tmp_path / "second-run.json").read_text())["runs"]["fp32"][s][0]
        for s in ("first", "second")
    )
    assert (first["reference_computed"], second["reference_computed"]) == (16, 0)
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 2
    assert "equal" in (tmp_path / "second-run.md").read_text()


def test_a_fresh_adapter_depends_on_the_runs_seed_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        args = PreferenceConfig(str(tmp_path / "run"), seed=0)
        lora = peft.LoraConfig(r=2, target_modules="all-linear")
        trainer = PreferenceTrainer(make_model("llama"), args=args, peft_config=lora)
        found.append({name: p for name, p in trainer.model.named_parameters() if "lora_" in name})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
