"""Reward at matched KL, with bootstrap intervals over the prompts -> matched.csv.

Each evaluation of a method's runs is a policy, and so is a mixture of two: the one with probability 1 - t,
else the other. With t such that their mean KLs mix to a level, its reward is the mixed reward exactly and
its KL the level at most (KL is convex). So what a method can have at a KL is its best mixture of an
evaluation on this side of it and one on the other; nothing is extrapolated. The best is chosen on one half of
the prompts and measured on the other, both ways, so that trying many settings is no advantage in itself.

The intervals are those of the rewards of these mixtures over prompts; what the level owes to the estimate of
the KLs is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.comparison.record import Interval, Record
from dpo_kit.comparison.results import write_table
from dpo_kit.errors import InputError

COLUMNS = ("method", "label", "kl", "reward", "low", "high", "run")
DIFFERENCES = ("difference", "difference_low", "difference_high")
RESAMPLES = 1000


def mixtures_at(
    level: float, kl_E: np.ndarray, reward_EP: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Rewards of the mixtures of two evaluations whose mean KLs mix to a level.

    Args:
        level: KL, nats.
        kl_E: mean KL of each evaluation of a method, in any order.
        reward_EP: reward of each evaluation on each prompt.

    Returns:
        [M, P] rewards and the M pairs of evaluations, that of the smaller KL first; none where no two lie on
        either side of the level. Evaluations with a KL or reward that is not finite take no part.
    """
    finite = np.isfinite(kl_E) & np.isfinite(reward_EP).all(axis=1)
    below = np.flatnonzero(finite & (kl_E <= level))
    above = np.flatnonzero(finite & (kl_E >= level))
    ends = [(int(low), int(high)) for low in below for high in above]
    found = []
    for low, high in ends:
        apart = kl_E[high] - kl_E[low]
        share = (level - kl_E[low]) / apart if apart else 0.0
        found.append((1 - share) * reward_EP[low] + share * reward_EP[high])
    return np.array(found).reshape(-1, reward_EP.shape[1]), ends


def best_by_halves(reward_CP: np.ndarray, weight_BP: np.ndarray) -> np.ndarray:
    """[B] mean reward of the best candidate: chosen on one half of the prompts, measured on the other.

    Args:
        reward_CP: of each candidate on each prompt; prompts of even and odd number are the halves.
        weight_BP: how often each prompt counts in each of B resamples; no half may be without weight.

    Returns:
        The mean of both ways, each by its half's weight.
    """
    halves = [slice(0, None, 2), slice(1, None, 2)]
    totals = [weight_BP[:, half].sum(axis=1) for half in halves]
    means_BC = [
        weight_BP[:, half] @ reward_CP[:, half].T / total[:, None]
        for half, total in zip(halves, totals, strict=True)
    ]
    rows = np.arange(len(weight_BP))
    measured = [means_BC[1 - i][rows, means_BC[i].argmax(axis=1)] for i in (0, 1)]
    return (measured[0] * totals[1] + measured[1] * totals[0]) / (totals[0] + totals[1])


def resampled(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """[1 + resamples, prompts] weights: each prompt once, then bootstrap resamples within each half."""
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, prompts))
    for half in (slice(0, None, 2), slice(1, None, 2)):
        count = len(range(prompts)[half])
        weights[1:, half] = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return weights


def interval(values_B: np.ndarray) -> Interval:
    """The first value, and the 2.5% and 97.5% percentiles of the others."""
    low, high = np.percentile(values_B[1:], [2.5, 97.5])
    return Interval(float(values_B[0]), float(low), float(high))


def write_matched(folder: Path) -> None:
    """matched.csv: of each method and level its best reward, and how much better DPO is.

    The columns `difference*` are the reward of `dpo`, or of the recipe's first method where it has none of
    that name, minus this method's, resampled together; empty where one of the two never reaches the level.
    """
    record = Record(folder)
    evaluated = {method: _evaluated(record, method) for method in record.methods}
    rows: list[dict[str, Any]] = []
    for level in record.section["kl_levels"]:
        values = {method: _at(level, found) for method, found in evaluated.items()}
        for method in record.section["methods"]:
            row: dict[str, Any] = {"method": method, "label": record.label(method), "kl": level}
            if (found := values.get(method)) is not None:
                row |= _cells(COLUMNS[3:6], found[0]) | {"run": found[1]}
                if method != record.base and (other := values.get(record.base)) is not None:
                    row |= _cells(DIFFERENCES, other[0] - found[0])
            rows.append(row)
    write_table(folder / "matched.csv", COLUMNS + DIFFERENCES, rows)


def _cells(names: Sequence[str], values_B: np.ndarray) -> dict[str, float]:
    found = interval(values_B)
    return dict(zip(names, (found.value, found.low, found.high), strict=True))


def _at(level: float, method: _Method) -> tuple[np.ndarray, str] | None:
    """[1 + RESAMPLES] best reward of a method at a level, and the run that it owes most to."""
    reward_CP, ends = mixtures_at(level, method.kls, method.rewards)
    if not ends:
        return None
    if reward_CP.shape[1] < 2:
        raise InputError(
            "reward at matched KL needs two prompts at least",
            field="eval.prompts",
            mend="Name more prompts; 100 give useful intervals.",
        )
    low, high = ends[int(reward_CP.mean(axis=1).argmax())]
    nearer = low if level - method.kls[low] < method.kls[high] - level else high
    return best_by_halves(reward_CP, resampled(reward_CP.shape[1])), method.runs[nearer]


@dataclass(frozen=True)
class _Method:
    """Each evaluation of a method's runs: its run, mean KL [E], and reward on each prompt [E, P]."""

    runs: list[str]
    kls: np.ndarray
    rewards: np.ndarray


def _evaluated(record: Record, method: str) -> _Method:
    """All evaluations of a method; all methods' must be on the same prompts."""
    prompts = list(record.rewards(record.points[0]))
    points = record.of(method)
    for point in points:
        if list(record.rewards(point)) != prompts:
            raise InputError(
                f"the replies of step {point.step} are not to the prompts of the other runs",
                file=record.folder / "runs" / point.run,
                mend="Remove the run's folder, and go on: it is then run again.",
            )
    rewards = [list(record.rewards(point).values()) for point in points]
    return _Method([point.run for point in points], np.array([p.kl for p in points]), np.array(rewards))
