"""Runs of the benchmark's sides -> whether they computed the same, what they took, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from machine import DISTURBED

OURS = "dpo_kit"

# Largest relative difference between two sides, at any step. The losses of a short run stay near log 2
# whatever is trained, so the log-probs (same pairs in the same order, same model) and the norm of the
# gradient (same backward) must agree as well.
TOLERANCES = {
    "fp32": {"loss": 1e-3, "logps/chosen": 1e-3, "logps/rejected": 1e-3, "grad_norm": 1e-3},
    "bf16": {"loss": 2e-2, "logps/chosen": 2e-2, "logps/rejected": 2e-2, "grad_norm": 5e-2},
}

Run = Mapping[str, Any]


def largest_differences(ours: Run, theirs: Run, names: Sequence[str]) -> dict[str, float]:
    """Largest relative difference over the steps of two runs, for each value; inf where steps are missing."""
    if len(ours["steps"]) != len(theirs["steps"]) or not ours["steps"]:
        return dict.fromkeys(names, math.inf)
    steps = list(zip(ours["steps"], theirs["steps"], strict=True))
    return {name: _largest([_relative(a[name], b[name]) for a, b in steps]) for name in names}


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _largest(values: Sequence[float]) -> float:
    # max() would pass over a NaN that does not come first.
    return math.inf if any(map(math.isnan, values)) else max(values)


def agreement(runs: Mapping[str, Sequence[Run]], dtype: str) -> dict[str, Any] | None:
    """Largest differences between our runs and the peer's, with the tolerances; None without a peer."""
    peers = [name for name in runs if name != OURS]
    if not peers or OURS not in runs:
        return None
    allowed = TOLERANCES[dtype]
    found = [
        largest_differences(ours, theirs, list(allowed))
        for peer in peers
        for ours, theirs in zip(runs[OURS], runs[peer], strict=True)
    ]
    worst = {name: max(each[name] for each in found) for name in allowed}
    return {
        "agree": all(worst[name] <= allowed[name] for name in allowed),
        "largest_relative_differences": worst,
        "allowed": allowed,
    }


def speeds(runs: Mapping[str, Sequence[Run]], flops: int, rate: float) -> dict[str, Any]:
    """Medians over the repeats, share of the limit, and ratios of every peer to us."""
    limit = flops / rate
    sides: dict[str, dict[str, float]] = {}
    for name, repeats in runs.items():
        seconds = median(run["seconds"] for run in repeats)
        sides[name] = {
            "seconds": seconds,
            "setup_seconds": median(run["setup_seconds"] for run in repeats),
            "peak_memory_bytes": median(run["peak_memory_bytes"] for run in repeats),
            "share_of_limit": limit / seconds,
        }
    found: dict[str, Any] = {"limit_seconds": limit, "sides": sides}
    if OURS in sides:
        found["against"] = {
            name: {
                "time_ratio": side["seconds"] / sides[OURS]["seconds"],
                "memory_ratio": sides[OURS]["peak_memory_bytes"] / side["peak_memory_bytes"],
            }
            for name, side in sides.items()
            if name != OURS
        }
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a reader wants them; no speed where the sides did not compute the same."""
    work, agreed = results["work"], results["agreement"]
    lines = []
    if agreed and not agreed["agree"]:
        lines += ["**The sides did not compute the same, so there is no speed to report.**", ""]
    if "speed" in results:
        lines += _table(results)
        rate, limit = results["matmul"]["rate"], results["speed"]["limit_seconds"]
        lines += [
            f"- Limit: {work['flops'] / 1e12:.3g} TFLOP on distinct tokens at {rate / 1e9:.0f} GFLOP/s "
            f"({results['matmul']['shape']}) take {limit:.3g} s."
        ]
    if agreed:
        lines += ["- Largest relative difference at any step (allowed): " + _differences(agreed) + "."]
    else:
        lines += ["- One side only: its numbers were compared with nothing."]
    cpu = results["machine"]
    lines += [
        f"- Work: {work['pairs']} pairs ({work['data']}), {work['batch_size']} a step, {work['dtype']}; "
        f"{work['distinct_tokens']} distinct tokens, {work['separate_tokens']} separate, "
        f"{work['padded_tokens']} padded.",
        f"- Model: {work['model']}.",
        f"- Machine: {cpu['cpu']}, {cpu['cores']} cores, {results['threads']} threads"
        f"{_disturbance(results)}.",
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in results["versions"].items()) + ".",
    ]
    return "\n".join(lines)


def _table(results: Mapping[str, Any]) -> list[str]:
    speed = results["speed"]
    lines = [
        "| | seconds | peak memory | share of the limit | its time / ours | our memory / its |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in speed["sides"].items():
        against = speed.get("against", {}).get(name)
        ratios = f"{against['time_ratio']:.2f} | {against['memory_ratio']:.2f}" if against else "|"
        lines += [
            f"| {name} | {side['seconds']:.4g} | {side['peak_memory_bytes'] / 1e9:.2f} GB "
            f"| {side['share_of_limit']:.1%} | {ratios} |"
        ]
    return [*lines, ""]


def _disturbance(results: Mapping[str, Any]) -> str:
    cores = results["others_cores"]
    if cores <= DISTURBED:
        return ""
    return f"; **other processes took up to {cores:.1f} cores meanwhile: the times are not to be trusted**"


def _differences(agreed: Mapping[str, Any]) -> str:
    worst, allowed = agreed["largest_relative_differences"], agreed["allowed"]
    return ", ".join(f"{name} {worst[name]:.1e} ({allowed[name]:.0e})" for name in worst)
