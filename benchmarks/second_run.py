"""The second run of a recipe against the first: the reference's log-probs are on disk by then.

    python benchmarks/second_run.py [--case fp32 ...] [--side first ...] [--repeats N]

Each run is `dpo-kit train` in a process of its own, on the benchmark's model and the first pairs of HH. What
was measured is kept beside the table, so that a call may measure a part of it; `--fresh` forgets. README.md
beside this file says what is measured; the speed against other trainers is speed.py's business.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from machine import DISTURBED, OthersClock, machine, machine_in_words
from presets import DEFAULT, PRESETS, model_fields
from runner import HERE, SideFailed, git_commit, write_whole
from workload import BPE_TOKENS, HH

from dpo_kit.models import load_model
from dpo_kit.pairs import read_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

CASES = {
    "fp32": ["train.bf16=false"],
    "bf16": ["train.bf16=true"],
    "LoRA, fp32": ["train.bf16=false", "model.lora={r: 16, target_modules: all-linear}"],
    "LoRA, bf16": ["train.bf16=true", "model.lora={r: 16, target_modules: all-linear}"],
}
# The live reference is there for its memory; "second" follows "first" on the same cache.
SIDES = ("first", "second", "live")
Runs = dict[str, dict[str, list[dict[str, Any]]]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--case", choices=CASES, action="append", help="repeatable; default: all")
    made.add_argument("--side", choices=("pair", "live"), action="append", help="pair: first and second")
    made.add_argument("--repeats", type=int, default=1, help="runs of each side, added to those kept")
    made.add_argument("--pairs", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    made.add_argument("--model", choices=PRESETS, default=DEFAULT)
    made.add_argument("--fresh", action="store_true", help="forget the runs that are kept")
    made.add_argument("--out", type=Path, default=HERE / "results")
    return made.parse_args(arguments)


def prepare(folder: Path, given: argparse.Namespace) -> Path:
    """Model, tokenizer and pairs on disk -> the recipe of all runs."""
    fields = model_fields(given.model)
    rows, _ = read_pairs(HH, invalid="drop")
    texts = (row["prompt"] + row[reply] for row in rows for reply in ("chosen", "rejected"))
    train_byte_level_bpe(texts, min(BPE_TOKENS, fields["vocab_size"])).save_pretrained(folder / "model")
    load_model(fields, torch.float32, 0).save_pretrained(folder / "model")
    columns = ("prompt", "chosen", "rejected")
    lines = [json.dumps({name: row[name] for name in columns}) + "\n" for row in rows[: given.pairs]]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": None},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {
            "batch_size": given.batch_size,
            "num_train_epochs": 1,
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
            "disable_tqdm": True,
        },
        "report": {"enabled": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def run(recipe: Path, cache: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """`dpo-kit train` in a process of its own -> its summary, losses, and seconds of the whole process."""
    folder = recipe.parent / "run"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dpo_kit", "train", str(recipe), f"train.output_dir={folder}"]
    environment = {**os.environ, "DPO_KIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    clock, started = OthersClock(), time.perf_counter()
    done = subprocess.run(
        [*command, *overrides], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SideFailed(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    figures = ("reference_runtime", "reference_computed", "train_runtime", "peak_memory_bytes")
    # A live reference has nothing to compute ahead.
    return {name: summary.get(name, 0) for name in figures} | {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "process_seconds": seconds,
        "others_cores": clock.cores(),
    }


def measure(recipe: Path, case: str, sides: Sequence[str], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Add a run of each side to a case."""
    if "pair" in sides:
        with tempfile.TemporaryDirectory(prefix="dpo-kit-cache-") as cache:
            pair = [run(recipe, Path(cache), CASES[case]) for _ in range(2)]
        for side, result in zip(SIDES, pair, strict=False):
            runs[side].append(result)
    if "live" in sides:
        with tempfile.TemporaryDirectory(prefix="dpo-kit-cache-") as cache:
            runs["live"].append(run(recipe, Path(cache), [*CASES[case], "reference.mode=live"]))


def middle(runs: Sequence[dict[str, Any]], *names: str) -> float:
    """Median over runs of the sum of these figures."""
    return median(sum(each[name] for name in names) for each in runs)


def row_of(case: str, sides: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table's row of a case with both runs; no speed where their losses differ or nothing was kept."""
    first, second, live = (sides[side] for side in SIDES)
    equal = all(each["losses"] == first[0]["losses"] for each in (*first, *second))
    kept = all(each["reference_computed"] for each in first) and not any(
        each["reference_computed"] for each in second
    )
    both = ("reference_runtime", "train_runtime")
    times = [f"{middle(side, both[0]):.2f} + {middle(side, both[1]):.1f} s" for side in (first, second)]
    ratio = middle(first, *both) / middle(second, *both)
    whole = middle(first, "process_seconds") / middle(second, "process_seconds")
    memory = [
        f"{middle(side, 'peak_memory_bytes') / 1e9:.2f} GB" if side else "-" for side in (first, second, live)
    ]
    speed = [*times, f"**{ratio:.2f}**", f"{whole:.2f}"] if equal and kept else ["-"] * 4
    return [
        case,
        *speed,
        *memory,
        "equal" if equal else "**unequal**",
        _beside_live(second, live),
        str(len(first)),
    ]


def _beside_live(second: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]) -> str:
    """The largest difference of a step's loss from that with a live reference."""
    if not live:
        return "-"
    pairs = zip(second[0]["losses"], live[0]["losses"], strict=True)
    return f"{max(abs(a - b) for a, b in pairs):.0e}"


COLUMNS = (
    "recipe",
    "first: reference + training",
    "second",
    "**ratio**",
    "of the whole process",
    "peak memory, first",
    "second",
    "live reference",
    "losses, line by line",
    "from a live reference's",
    "runs",
)


def page(kept: dict[str, Any]) -> str:
    """The table, with what it says."""
    runs: Runs = kept["runs"]
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [row_of(case, runs[case]) for case in CASES if case in runs and runs[case]["second"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    others = max(
        each["others_cores"] or 0.0 for sides in runs.values() for side in sides.values() for each in side
    )
    disturbed = f" Other processes kept {others:.1f} cores busy meanwhile." if others > DISTURBED else ""
    work = kept["work"]
    return f"""# The second run of a recipe

{kept["machine"]}; {kept["at"]}, commit {kept["commit"]}.{disturbed} Written by `{kept["command"]}`.

{table}

DPO on the first {work["pairs"]} pairs of HH harmless-base, {work["batch_size"]} a step, one epoch, AdamW, the
model `{work["model"]}` of `presets.py`; `dpo-kit train` in a fresh process each time, medians where there are
several runs. Ratio: reference and training of the first run over those of the second. The live reference is
a second model in memory.

With every weight trained, the reference's forward is a third of the policy's forward and backward: over one
epoch the second run can be 4/3 as fast, over two 7/6, over three 10/9. Optimiser and planning, which both
runs have, take from that; what the first does but once, whatever the size of the data, adds to it on so few
pairs. With LoRA the gradients of the frozen matrices are not computed, and the bound is near 3/2.
"""


def main(arguments: list[str] | None = None) -> int:
    """-> 0 done, 1 the losses of the two runs differ or a run failed."""
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    written = given.out / "second-run.json"
    work = {"pairs": given.pairs, "batch_size": given.batch_size, "model": given.model}
    kept = json.loads(written.read_text(encoding="utf-8")) if written.exists() and not given.fresh else {}
    if kept.get("work") != work:
        kept = {"work": work, "runs": {}}
    kept |= {
        "machine": machine_in_words(machine()),
        "commit": git_commit(),
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": "python benchmarks/second_run.py",
    }
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-kit-bench-") as folder:
            recipe = prepare(Path(folder), given)
            for case in given.case or CASES:
                runs = kept["runs"].setdefault(case, {side: [] for side in SIDES})
                for _ in range(given.repeats):
                    measure(recipe, case, given.side or ("pair", "live"), runs)
                    write_whole(written, json.dumps(kept, indent=1))
    except SideFailed as error:
        print(error, file=sys.stderr)
        return 1
    text = page(kept)
    write_whole(given.out / "second-run.md", text)
    print(text)
    return int("unequal" in text)


if __name__ == "__main__":
    sys.exit(main())
