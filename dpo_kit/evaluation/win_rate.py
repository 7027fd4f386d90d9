"""Win rate, its interval, and a judge's bias to a position, from verdicts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dpo_kit.evaluation.judges import Verdict

_95 = 1.959963984540054  # quantile 0.975 of the normal distribution


@dataclass(frozen=True)
class WinRate:
    """How often one side is preferred.

    Attributes:
        wins, ties, losses: comparisons; a preference above 1/2 is a win.
        no_verdict: comparisons that the judge came to nothing on; in no other figure.
        rate: mean preference, that is (wins + ties / 2) / decided where preferences are 0, 1/2 and 1; None
            where nothing was decided.
        low, high: Wilson's 95% interval of it.
    """

    wins: int
    ties: int
    losses: int
    no_verdict: int
    rate: float | None
    low: float | None
    high: float | None


def win_rate(preferences: Sequence[float | None], groups: Sequence[Hashable] | None = None) -> WinRate:
    """Count preferences of one side over the other.

    Args:
        preferences: in [0, 1], or None; as `Verdict.preference`.
        groups: what is drawn independently, e.g. the prompt of each comparison: the interval counts a group
            once, since replies to one prompt win or lose together. Default: every comparison by itself.

    Wilson's interval (1927) is that of a proportion. With ties the variance is less than a proportion's,
    so it is then wider than it need be.
    """
    decided = [p for p in preferences if p is not None]
    wins, losses = sum(p > 0.5 for p in decided), sum(p < 0.5 for p in decided)
    counts = (wins, len(decided) - wins - losses, losses, len(preferences) - len(decided))
    if not decided:
        return WinRate(*counts, None, None, None)
    rate = sum(decided) / len(decided)
    units = len(decided)
    if groups is not None:
        units = len({g for g, p in zip(groups, preferences, strict=True) if p is not None})
    return WinRate(*counts, rate, *wilson(rate, units))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion seen in n draws; n is at least 1."""
    square = _95**2 / n
    middle = (rate + square / 2) / (1 + square)
    half = _95 / (1 + square) * math.sqrt(rate * (1 - rate) / n + square / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class PositionBias:
    """What a judge's answers owe to the order that it was shown the replies in.

    Attributes:
        comparisons: those with a readable answer in both orders.
        share: part of them where both answers name the same position, so not the same reply.
        first: part of them where that position was the first; `share - first` the second.
        unreadable: answers, of two a comparison, that said neither A nor B nor tie.
    """

    comparisons: int
    share: float | None
    first: float | None
    unreadable: int


def position_bias(verdicts: Sequence[Verdict]) -> PositionBias | None:
    """Count it; None where no verdict was come to by looking at replies in an order."""
    answers = [verdict.answers for verdict in verdicts if verdict.answers is not None]
    if not answers:
        return None
    both = [pair for pair in answers if None not in pair]
    unreadable = sum(answer is None for pair in answers for answer in pair)
    if not both:
        return PositionBias(0, None, None, unreadable)
    first, second = (sum(pair == (position,) * 2 for pair in both) for position in "AB")
    return PositionBias(len(both), (first + second) / len(both), first / len(both), unreadable)
