"""A reward model trained by dpo_kit against TRL's RewardTrainer: same pairs, same order, same weights.

    python benchmarks/reward_model.py [--start FOLDER] [--steps N] [--only SIDE ...]

The pairs and the policy are those of the small world's comparison (`make frontier` makes them): six pairs of
the four replies to a prompt, next to each other. Each side trains in a process of its own. Runs are kept
beside the table, so that a call may measure one side; `--fresh` forgets. Loss by loss the sides must agree,
else no speed is reported and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import load_from_disk
from machine import DISTURBED, OthersClock, machine, machine_in_words
from runner import HERE, ROOT, SideFailed, git_commit, write_whole

from dpo_kit.evaluation import load_reward
from dpo_kit.models import load_reward_model
from dpo_kit.pairs import load_pairs
from dpo_kit.run_folder import peak_memory_bytes
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer

SIDES = ("dpo_kit", "trl")
# Between losses of one step, nats: rounding that training has carried on.
TOLERANCE = 2e-3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--start", type=Path, default=ROOT / "runs" / "frontier" / "start")
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--batch-size", type=int, default=48, help="pairs in a step")
    made.add_argument("--only", choices=SIDES, action="append", help="repeatable; default: ours, TRL, ours")
    made.add_argument("--fresh", action="store_true", help="forget the runs that are kept")
    made.add_argument("--out", type=Path, default=HERE / "results" / "reward-model.md")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made.parse_args(arguments)


def prepare(start: Path, folder: Path) -> None:
    """Weights with a new value head, tokenizer, and tokenised pairs for both sides."""
    policy = start / "sft" / "model"
    tokenizer = load_tokenizer(policy)
    load_reward_model(policy)[0].save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = load_pairs(start / "pairs" / "train.jsonl")
    pairs = tokenize_pairs(rows, tokenizer, max_length=None).dataset
    pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).save_to_disk(folder / "pairs")


def train(side: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train one side -> its losses, and seconds from the call of `train` to its end."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder / side),
        "max_steps": given.steps,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "seed": 0,
    }
    made = _ours if side == "dpo_kit" else _theirs
    trainer = made(folder, arguments, given.batch_size)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(str(folder / side / "model"))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "seconds": seconds, "memory": peak_memory_bytes(torch.device("cpu"))}


def _ours(folder: Path, arguments: dict[str, Any], batch_size: int) -> Any:
    from dpo_kit import PreferenceConfig, PreferenceTrainer

    return PreferenceTrainer(
        load_reward_model(folder / "model")[0],
        args=PreferenceConfig(loss="bradley_terry", batch_size=batch_size, **arguments),
        train_dataset=load_from_disk(folder / "pairs"),
        processing_class=load_tokenizer(folder / "model"),
    )


def _theirs(folder: Path, arguments: dict[str, Any], batch_size: int) -> Any:
    from trl import RewardConfig, RewardTrainer

    def whole(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}

    args = RewardConfig(
        per_device_train_batch_size=batch_size, gradient_checkpointing=False, max_length=None, **arguments
    )
    pairs = load_from_disk(folder / "pairs").map(whole, remove_columns=["prompt_ids"])
    tokenizer = load_tokenizer(folder / "model")
    return RewardTrainer(str(folder / "model"), args=args, train_dataset=pairs, processing_class=tokenizer)


def run(side: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """`train` in a process of its own, and how well the model does on held-out pairs."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--steps", str(given.steps), "--batch-size", str(given.batch_size)]
    clock = OthersClock()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SideFailed(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    others = clock.cores()
    return json.loads((folder / f"{side}.json").read_text()) | {
        "others": others,
        "accuracy": accuracy(folder / side / "model", given.start / "pairs" / "heldout.jsonl"),
        "work": [given.steps, given.batch_size],
    }


def accuracy(model: Path, held_out: Path) -> float:
    """Share of held-out pairs whose chosen reply has the higher reward."""
    rows = load_pairs(held_out)
    reward, prompts = load_reward(f"model:{model}"), rows["prompt"][:]
    chosen, rejected = (reward(prompts, rows[side][:]) for side in ("chosen", "rejected"))
    return sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(prompts)


def page(given: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], gap: float) -> str:
    """The results as they are kept."""
    seconds = {side: median(r["seconds"] for r in found) for side, found in runs.items()}
    lines = [
        "# Reward model: dpo_kit against TRL's RewardTrainer\n",
        f"{machine_in_words(machine())}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {git_commit()}. "
        "Written by `python benchmarks/reward_model.py`.\n",
        "| | seconds | TRL's time over it | peak memory | held-out accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side, label in (("dpo_kit", "dpo_kit"), ("trl", f"TRL {version('trl')} RewardTrainer")):
        found = runs[side]
        times = ", ".join(f"{r['seconds']:.1f}" for r in found)
        memory, right = max(r["memory"] for r in found) / 1e9, found[-1]["accuracy"]
        ratio = seconds["trl"] / seconds[side]
        lines.append(f"| {label} | {times} | **{ratio:.2f}** | {memory:.2f} GB | {right:.3f} |")
    others = max((r["others"] or 0.0) for found in runs.values() for r in found)
    lines.append(
        "\nBradley-Terry on the small world's pairs, six of the four replies to a prompt: "
        f"{given.steps} steps of {given.batch_size} pairs in the order of the file, AdamW (fused), fp32, "
        "both from the small world's policy with the same new value head. TRL without gradient "
        f"checkpointing. Losses of all steps differ by at most {gap:.1e} nats. Seconds are those of "
        "`train()`, each run's; the ratio is of medians."
        + (f" Other processes took {others:.2f} of a core." if others > DISTURBED else "")
    )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, compare, write; 1 where the losses differ."""
    given = parse(arguments)
    if given.side:
        result = train(given.side, given.folder, given)
        (given.folder / f"{given.side}.json").write_text(json.dumps(result))
        return 0
    kept = given.out.with_suffix(".json")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    if kept.exists() and not given.fresh:
        for side, found in json.loads(kept.read_text()).items():
            runs[side] = [r for r in found if r["work"] == [given.steps, given.batch_size]]
    with tempfile.TemporaryDirectory(prefix="reward-model-") as place:
        prepare(given.start, Path(place))
        for side in given.only or ("dpo_kit", "trl", "dpo_kit"):
            runs[side].append(run(side, Path(place), given))
            print(f"{side}: {runs[side][-1]['seconds']:.1f} s", file=sys.stderr)
            write_whole(kept, json.dumps(runs))
    if not all(runs.values()):
        return 0
    losses = [torch.tensor(runs[side][-1]["losses"]) for side in SIDES]
    gap = float((losses[0] - losses[1]).abs().max())
    if gap > TOLERANCE:
        print(f"the losses differ by {gap:.2e} nats: no speed is reported", file=sys.stderr)
        return 1
    text = page(given, runs, gap)
    write_whole(given.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
