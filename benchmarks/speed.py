"""Time one epoch of DPO against other trainers on the same work: `python benchmarks/speed.py --help`.

What is measured, and how, stands in README.md beside this file; suite.py is `make bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compare import compared
from lengths import LENGTHS
from machine import machine
from presets import DEFAULT, PRESETS, default_weights, model_fields
from runner import Runner, SideFailed, check_side, is_ours, write_whole
from tables import comparison_details, comparison_table
from workload import Task, described, settled_work, write_task

from dpo_kit.errors import InputError

PEERS = ("trl-newest", "trl-1.12", "naive")
OURS = ("dpo_kit", "dpo_kit-loop", "dpo_kit-within-pairs", "dpo_kit-padded")


def default_ours() -> str:
    """The Trainer, or the loop where the Trainer's data sets are not installed."""
    return "dpo_kit" if importlib.util.find_spec("datasets") else "dpo_kit-loop"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument(
        "--work",
        default="hh",
        help=f"hh (the real file where it is, else its lengths), {', '.join(LENGTHS)}, fixed-P-R, or a file",
    )
    made.add_argument("--pairs", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    made.add_argument("--replies", type=int, default=2, help="ranked replies per prompt of generated pairs")
    made.add_argument("--order", choices=("random", "sorted"), default="random", help="sorted: by length")
    made.add_argument("--reference", choices=("live", "precomputed"), default="live")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    made.add_argument("--weights", choices=("fp32", "bf16"), help="default: fp32, bf16 for llama-8b")
    made.add_argument("--model", choices=PRESETS, default=DEFAULT)
    for name in ("--layers", "--hidden", "--vocabulary"):
        made.add_argument(name, type=int, help="in place of the model's own")
    made.add_argument(
        "--peer", choices=(*PEERS, "none"), action="append", help="default: trl-1.12; repeatable"
    )
    made.add_argument("--ours", choices=OURS, default=default_ours())
    made.add_argument("--only", choices=(*OURS, *PEERS), help="run this side alone")
    made.add_argument(
        "--profile", action="store_true", help="with --only: print where the time goes, no speed"
    )
    made.add_argument("--repeats", type=int, default=1, help="runs of each peer, ours in between")
    made.add_argument("--warmup-steps", type=int, help="first steps not timed; default: 0, on CUDA 2")
    made.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    made.add_argument("--tokens-per-micro-batch", type=_budget, default="auto", help="of dpo_kit")
    made.add_argument("--out", type=Path, help="write the results as JSON")
    made.add_argument("--kept", type=Path, help="a folder of finished runs, which are not run again")
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with what does not go together refused."""
    made = parser()
    given = made.parse_args(arguments)
    if given.profile and not given.only:
        made.error("--profile needs --only")
    if (
        min(given.pairs, given.batch_size, given.repeats) < 1
        or min(given.threads, given.warmup_steps or 0) < 0
    ):
        made.error(
            "--pairs, --batch-size, --repeats must be at least 1, --threads, --warmup-steps at least 0"
        )
    if given.replies < 2:
        made.error("--replies must be at least 2")
    if given.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no GPU here")
    return given


def _budget(text: str) -> int | str:
    return text if text == "auto" else int(text)


def task_of(given: argparse.Namespace) -> Task:
    """What the command line asks for."""
    warmup = given.warmup_steps
    return Task(
        model=model_fields(given.model, given.layers, given.hidden, given.vocabulary),
        work=settled_work(given.work),
        pairs=given.pairs,
        batch_size=given.batch_size,
        replies=given.replies,
        order=given.order,
        dtype=given.dtype,
        weights=given.weights or default_weights(given.model),
        device=given.device,
        reference=given.reference,
        warmup_steps=(2 if given.device == "cuda" else 0) if warmup is None else warmup,
        threads=given.threads,
        tokens_per_micro_batch=given.tokens_per_micro_batch,
    )


def compare(runner: Runner, task: Task, ours: str, peers: Sequence[str], repeats: int = 1) -> dict[str, Any]:
    """Run peers with ours before, between and after -> everything that is reported of them.

    Args:
        runner: runs, or finds what was run before.
        task: the work.
        ours: the side of dpo_kit that ratios are taken against; "" to run the peers alone.
        peers: the other sides.
        repeats: runs of each peer.
    """
    for side in peers:
        check_side(side)
    with tempfile.TemporaryDirectory(prefix="dpo-kit-bench-") as folder:
        work = write_task(task, Path(folder))
    if task.threads:
        torch.set_num_threads(task.threads)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*peers, *([ours] if ours else []))}
    order = [side for _ in range(repeats) for peer in peers for side in (ours, peer)] + [ours]
    for side in filter(None, order):
        runs[side].append(runner.run(side, task, repeat=len(runs[side])))
    every = [run for side in runs.values() for run in side]
    return {
        "task": asdict(task),
        "described": described(task.work),
        "work": asdict(work),
        "ours": ours,
        "machine": machine(task.device),
        "others_cores": max(run["others_cores"] or 0.0 for run in every),
        "threads": every[-1]["threads"],
        "versions": {side: runs[side][0]["versions"] for side in runs},
        "commit": runs[ours][-1].get("commit", "") if ours else "",
        "at": [min(run["at"] for run in every), max(run["at"] for run in every)],
        **compared(runs, ours, work.flops, task.dtype),
        "runs": _without_times_where_unequal(runs, ours, task.dtype),
    }


def _without_times_where_unequal(
    runs: dict[str, list[dict[str, Any]]], ours: str, dtype: str
) -> dict[str, list[dict[str, Any]]]:
    """Every run as it was; of those that computed something else, no times."""
    found = compared(runs, ours, 1, dtype)["sides"]
    timed = {"seconds", "step_seconds", "setup_seconds", "precompute_seconds", "peak_memory_bytes"}
    return {
        side: [{k: v for k, v in run.items() if "seconds" in found[side] or k not in timed} for run in each]
        for side, each in runs.items()
    }


def agrees(found: dict[str, Any]) -> bool:
    """Whether all sides of a comparison computed the same."""
    return all(side.get("agreement", {"agree": True})["agree"] for side in found["sides"].values())


def main(arguments: list[str] | None = None) -> int:
    """-> 0 done, 1 the sides disagree or one of them failed, 2 wrong input."""
    given = parse(arguments)
    try:
        task, runner = task_of(given), Runner(given.kept)
        if given.only and given.profile:
            check_side(given.only)
            runner.run(given.only, task, profile=True)
            return 0
        peers = [peer for peer in given.peer or ["trl-1.12"] if peer != "none"]
        ours = given.ours
        if given.only:
            ours, peers = (given.only, []) if is_ours(given.only) else ("", [given.only])
        found = compare(runner, task, ours, peers, given.repeats)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except SideFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([*comparison_table([found]), "", *comparison_details(found)]))
    if given.out:
        write_whole(given.out, json.dumps(found, indent=1))
    return 0 if agrees(found) else 1


if __name__ == "__main__":
    sys.exit(main())
