"""`make bench`: everything that this machine can measure, as a table, details and pictures.

Writes `speed.md`, `speed.json` and pictures to benchmarks/results/, and the tables into the project's README.
Finished runs are kept beside them, so that a suite that was cut off goes on where it was; `--fresh` forgets
them. README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from curves import POINTS, QUICK_POINTS, draw_curves, measure_curves
from lengths import pairs_per_prompt
from machine import machine
from presets import DEFAULT, PRESETS, default_weights, model_fields
from ranked import all_shares, tree_tokens
from readme import embed
from report import report
from runner import HERE, Runner, SideFailed, check_side, write_whole
from speed import agrees, compare, default_ours
from tables import RANKED_SIDES
from workload import Task, settled_work, task_rows

from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens
from dpo_kit.roofline import count_work

SECTIONS = ("shares", "ranked", "curves", "speed")
RANKED_REPLIES = 4
# Prompts in a step, of which two are trained: UltraFeedback's replies are long.
RANKED_PROMPTS = {"tldr": 2, "hh-like": 2, "ultrafeedback": 1}
GPU_WORKS = ("hh-like", "ultrafeedback", "tldr", "capybara")
TRL = ("trl-newest", "trl-1.12")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are kept")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and 8 pairs: does the whole chain work"
    )
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="repeatable; the rest as last written"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=PRESETS, help=f"default: {DEFAULT}, on CUDA llama-1b")
    parser.add_argument("--pairs", type=int, help="default: 64; on CUDA 384")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args(arguments)
    given.model = given.model or (
        "tiny" if given.quick else "llama-1b" if given.device == "cuda" else DEFAULT
    )
    given.pairs = given.pairs or (8 if given.quick else 384 if given.device == "cuda" else 64)
    return given


def available(sides: Sequence[str]) -> list[str]:
    """Those of the peers that this machine has."""
    found = []
    for side in sides:
        try:
            check_side(side)
        except InputError as error:
            print(f"{side} is left out: {error}", file=sys.stderr)
        else:
            found.append(side)
    return found


def base_task(given: argparse.Namespace) -> Task:
    """What all comparisons of a suite have in common."""
    return Task(
        model=model_fields(given.model),
        work=settled_work("hh"),
        pairs=given.pairs,
        batch_size=4 if given.quick else 32 if given.device == "cuda" else 8,
        device=given.device,
        weights=default_weights(given.model),
        warmup_steps=2 if given.device == "cuda" and not given.quick else 0,
        threads=given.threads,
    )


def speed_plan(given: argparse.Namespace) -> list[tuple[Task, Sequence[str]]]:
    """Comparisons with other trainers: the task, and the sides that are run on it."""
    base = base_task(given)
    if given.device == "cuda":
        tasks = [replace(base, work=work, dtype="bf16") for work in GPU_WORKS]
        return [(task, available(["trl-newest"]) or ["naive"]) for task in tasks]
    trl = available(TRL) or ["naive"]
    fastest = trl[-1:]
    half = max(base.batch_size, given.pairs // 2)
    return [
        (base, trl),
        (replace(base, dtype="bf16"), trl),
        (replace(base, order="sorted"), fastest),
        (replace(base, reference="precomputed", pairs=half), fastest),
    ]


def measure_speed(given: argparse.Namespace, runner: Runner, done: Callable[[Any], None]) -> None:
    """Hand over the comparisons one after the other, all so far each time."""
    found, failed = [], []
    for task, peers in speed_plan(given):
        try:
            found.append(compare(runner, task, default_ours(), peers))
        except SideFailed as error:
            failed.append(f"{task.work}, {task.dtype}, {task.order}, {task.reference}: {error}")
        else:
            done(found)
    if failed:
        raise SideFailed("\n".join(failed))


def measure_ranked(given: argparse.Namespace, runner: Runner, done: Callable[[Any], None]) -> None:
    """Ranked replies as pairs: dpo_kit against itself with less shared."""
    base = base_task(given)
    dtype = "bf16" if given.device == "cuda" else "fp32"
    times = 8 if given.device == "cuda" else 1
    found = []
    for work, prompts in RANKED_PROMPTS.items():
        step = (1 if given.quick else prompts * times) * pairs_per_prompt(RANKED_REPLIES)
        pairs = step * (2 + base.warmup_steps)
        task = replace(base, work=work, replies=RANKED_REPLIES, batch_size=step, pairs=pairs, dtype=dtype)
        result = compare(runner, task, default_ours(), RANKED_SIDES)
        rows = [PairTokens.from_row(row) for row in task_rows(task)[task.warmup_steps * step :]]
        alone = count_work(rows, 1, task.model, reference=True)
        result["arithmetic_ratio"] = alone.flops / result["work"]["flops"]
        result["tokens"] = {
            "step": tree_tokens(rows, step),
            "within_pairs": alone.distinct_tokens,
            "separate": alone.separate_tokens,
        }
        found.append(result)
        done(found)


def measure_all_curves(given: argparse.Namespace, runner: Runner, done: Callable[[Any], None]) -> None:
    """Curves of ours, of the plain loop and of TRL where it is installed."""
    peers = available(["trl-1.12"] if given.device == "cpu" else ["trl-newest"])
    points = QUICK_POINTS if given.quick else POINTS
    sides = [default_ours(), *peers, "naive"]
    found = measure_curves(
        runner, sides, points, given.device, "bf16" if given.device == "cuda" else "fp32", given.quick
    )
    if importlib.util.find_spec("matplotlib"):
        found["pictures"] = draw_curves(found, given.out)
    done(found)


def measure_shares(given: argparse.Namespace, runner: Runner, done: Callable[[Any], None]) -> None:
    """Tokens saved on real data."""
    done(all_shares() if importlib.util.find_spec("datasets") else [])


Measure = Callable[[argparse.Namespace, Runner, Callable[[Any], None]], None]
MEASURES: Mapping[str, Measure] = {
    "shares": measure_shares,
    "ranked": measure_ranked,
    "curves": measure_all_curves,
    "speed": measure_speed,
}


def main(arguments: list[str] | None = None) -> int:
    """-> 0 done, 1 some sides disagree or a side failed, 2 wrong input."""
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(given.out / "runs")
    if given.fresh:
        runner.forget()
    if given.threads:
        torch.set_num_threads(given.threads)
    written = given.out / "speed.json"
    results: dict[str, Any] = {}
    if given.only and written.exists():
        before = json.loads(written.read_text(encoding="utf-8"))
        same = before["device"] == given.device and before["settings"]["quick"] == str(given.quick)
        results = before if same else {}
    settings = {name: str(value) for name, value in vars(given).items() if name != "out"}
    results |= {"machine": machine(given.device), "settings": settings, "device": given.device}

    failed = []
    for section in given.only or SECTIONS:
        # What stands there from another time must not look like this time's.
        results.pop(section, None)

        def done(found: Any, section: str = section) -> None:
            results[section] = found
            results["at"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            write_whole(written, json.dumps(results, indent=1))
            write_whole(given.out / "speed.md", report(results))

        try:
            MEASURES[section](given, runner, done)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        except SideFailed as error:
            print(error, file=sys.stderr)
            failed.append(section)
    page = given.out / "speed.md"
    write_whole(page, report(results))
    if given.out.resolve() == HERE / "results" and not given.quick and not failed:
        embed(page)
    print(page.read_text(encoding="utf-8"))
    equal = all(agrees(each) for each in (*results.get("speed", ()), *results.get("ranked", ())))
    return 0 if equal and not failed and not results.get("curves", {}).get("unequal") else 1


if __name__ == "__main__":
    sys.exit(main())
