"""Time one epoch of DPO against the incumbents on the same work: `python benchmarks/speed.py --help`.

What is measured, and how, stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from machine import OthersClock, machine
from matmul_rate import DTYPES, matmul_rates, shapes_in_use
from results import OURS, agreement, markdown, speeds
from workload import GENERATED, HH, count_work, model_fields, write_workload

from dpo_kit.errors import InputError

PEERS = ("trl-1.12",)


class SideFailed(Exception):  # noqa: N818
    """A side's process ended without a result; the message is what it printed last."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with what does not go together refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=None, help=f"pairs, or '{GENERATED}'; default: HH where it is, else {GENERATED}"
    )
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast, weights in fp32")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--only", choices=(OURS, *PEERS), help="run this side alone")
    parser.add_argument(
        "--profile", action="store_true", help="with --only: print where the time goes, and no speed"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each side, taking turns; medians are reported"
    )
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--tokens-per-micro-batch", type=_budget, default="auto", help="of dpo_kit")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(arguments)
    if given.profile and not given.only:
        parser.error("--profile needs --only")
    if min(given.pairs, given.batch_size, given.repeats, given.layers) < 1 or given.threads < 0:
        parser.error("--pairs, --batch-size, --repeats and --layers must be at least 1, --threads at least 0")
    return given


def _budget(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check_peer(side: str) -> None:
    """A peer's name says its version; the number must not be another's."""
    package, _, wanted = side.partition("-")
    if not wanted:
        return
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "not installed"
    if not found.startswith(f"{wanted}."):
        raise InputError(
            f"{package} {wanted} is asked for, and {package} here is {found}",
            field="--peer",
            mend=f"pip install '{package}=={wanted}.*', or run --only {OURS}.",
        )


def source_of(data: str | None) -> Path | None:
    """The file of pairs, None for generated ones."""
    if data is None:
        return HH if HH.exists() else None
    return None if data == GENERATED else Path(data)


def run_side(side: str, folder: Path, threads: int, profile: bool) -> dict[str, Any]:
    """One epoch of one side in a fresh process."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), side, str(folder), str(out)]
    print(f"{side} ...", file=sys.stderr, flush=True)
    clock = OthersClock()
    done = subprocess.run(
        command + ["--profile"] * profile, env=environment, capture_output=True, text=True, check=False
    )
    others = clock.cores()
    if done.returncode or not out.exists():
        raise SideFailed(
            f"{side} failed with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    if profile:
        print(done.stdout)
    return json.loads(out.read_text(encoding="utf-8")) | {"others_cores": others}


def prepare(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the work to the folder -> its description and the model's configuration."""
    source = source_of(given.data)
    fields = model_fields(given.layers, given.hidden, given.vocabulary)
    pairs = write_workload(folder, source, given.pairs, fields)
    told = ("pairs", "batch_size", "dtype", "threads", "tokens_per_micro_batch")
    work = {
        "data": "random tokens with lengths as in HH" if source is None else source.name,
        "source": GENERATED if source is None else str(source),
        **{name: vars(given)[name] for name in told},
        "model": ", ".join(f"{name} {value}" for name, value in fields.items()),
        **asdict(count_work(pairs, given.batch_size, fields)),
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    return work, fields


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, and what came of them."""
    sides = (given.only,) if given.only else (given.peer, OURS)
    for side in sides:
        check_peer(side)
    if given.threads:
        torch.set_num_threads(given.threads)
    work, fields = prepare(given, folder)
    shapes = shapes_in_use(given.hidden, fields["intermediate_size"], given.vocabulary)
    before = matmul_rates(given.dtype, shapes)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(given.repeats):
        for side in sides:
            runs[side].append(run_side(side, folder, given.threads, given.profile))
    after = matmul_rates(given.dtype, shapes)
    # The best that the machine showed: a rate that was disturbed would flatter the share.
    best = {shape: max(before[shape], after[shape]) for shape in before}
    shape = max(best, key=best.__getitem__)

    agreed = agreement(runs, given.dtype)
    results = {
        "machine": machine(),
        "others_cores": max(run["others_cores"] or 0.0 for side in sides for run in runs[side]),
        "threads": runs[sides[-1]][0]["threads"],
        "versions": runs[sides[-1]][0]["versions"],
        "work": work,
        "agreement": agreed,
        "matmul": {"rate": best[shape], "shape": shape, "before": before, "after": after},
    }
    if agreed is not None and not agreed["agree"]:
        return results | {"steps": {side: runs[side][0]["steps"] for side in sides}}
    if not given.profile:
        results["speed"] = speeds(runs, work["flops"], best[shape])
        results["runs"] = runs
    return results


def main(arguments: list[str] | None = None) -> int:
    """-> 0 done, 1 the sides disagree or one of them failed, 2 wrong input."""
    given = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-kit-speed-") as folder:
            results = measure(given, Path(folder))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except SideFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(results))
    if given.out:
        written = given.out.with_name(given.out.name + ".writing")
        written.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(written, given.out)
    agreed = results["agreement"]
    return 0 if agreed is None or agreed["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
