"""Runs of the benchmark's sides on one task -> whether they computed the same, and what they took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dpo_kit.roofline import share_of_limit

# Largest relative difference between two sides, at any step. The losses of a short run stay near log 2
# whatever is trained, so the log-probs (same pairs in the same order, same model) and the norm of the
# gradient (same backward) must agree as well.
TOLERANCES = {
    "fp32": {"loss": 1e-3, "logps/chosen": 1e-3, "logps/rejected": 1e-3, "grad_norm": 1e-3},
    "bf16": {"loss": 2e-2, "logps/chosen": 2e-2, "logps/rejected": 2e-2, "grad_norm": 5e-2},
}

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]


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


def agreement(ours: Sequence[Run], theirs: Sequence[Run], dtype: str) -> dict[str, Any]:
    """Largest differences between any run of ours and any of theirs, with the tolerances."""
    allowed = TOLERANCES[dtype]
    found = [largest_differences(a, b, list(allowed)) for a in ours for b in theirs]
    worst = {name: max(each[name] for each in found) for name in allowed}
    return {
        "agree": all(worst[name] <= allowed[name] for name in allowed),
        "largest_relative_differences": worst,
        "allowed": allowed,
    }


def best_rate(runs: Runs) -> tuple[str, float]:
    """The shape and the rate of the fastest matrix product before or after any of the runs.

    The best that the machine showed: a rate that was disturbed would flatter the share of the limit.
    """
    rates = [
        (rate, shape)
        for side in runs.values()
        for run in side
        for rates in run["matmul_rates"]
        for shape, rate in rates.items()
    ]
    rate, shape = max(rates)
    return shape, rate


def side_figures(runs: Sequence[Run], flops: int, rate: float) -> dict[str, float]:
    """Medians over a side's runs, and its share of the limit."""
    seconds = median(run["seconds"] for run in runs)
    found = {
        "runs": len(runs),
        "seconds": seconds,
        "setup_seconds": median(run["setup_seconds"] for run in runs),
        "peak_memory_bytes": median(run["peak_memory_bytes"] for run in runs),
        "share_of_limit": share_of_limit(flops, rate, seconds),
    }
    if "precompute_seconds" in runs[0]:
        found["precompute_seconds"] = median(run["precompute_seconds"] for run in runs)
    return found


def compared(runs: Runs, ours: str, flops: int, dtype: str) -> dict[str, Any]:
    """What a comparison reports.

    Returns:
        limit (seconds, rate and shape of the matrix products), and under `sides` for each side its figures
        and, but for ours, `agreement` and `against_ours` (time_ratio, memory_ratio and, where log-probs
        were computed ahead, total_ratio). A side that did not compute what ours computed has its steps and
        no figures; where none agrees, ours has none either, and there is no limit.
    """
    shape, rate = best_rate(runs)
    sides: dict[str, dict[str, Any]] = {}
    for name, theirs in runs.items():
        sides[name] = (
            {} if name == ours or ours not in runs else {"agreement": agreement(runs[ours], theirs, dtype)}
        )
    agreed = [name for name, side in sides.items() if side.get("agreement", {}).get("agree", name != ours)]
    alone = len(runs) == 1
    if not agreed and not alone:
        return {"sides": {name: sides[name] | {"steps": runs[name][0]["steps"]} for name in runs}}
    for name in sides:
        if name in agreed or name == ours:
            sides[name] |= side_figures(runs[name], flops, rate)
        else:
            sides[name]["steps"] = runs[name][0]["steps"]
    if ours in sides:
        for name in agreed:
            sides[name]["against_ours"] = _ratios(sides[name], sides[ours])
    return {"limit": {"seconds": flops / rate, "rate": rate, "shape": shape}, "sides": sides}


def _ratios(theirs: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    found = {
        "time_ratio": theirs["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_memory_bytes"] / theirs["peak_memory_bytes"],
    }
    if "precompute_seconds" in theirs:
        totals = [side["seconds"] + side["precompute_seconds"] for side in (theirs, ours)]
        found["total_ratio"] = totals[0] / totals[1]
    return found
