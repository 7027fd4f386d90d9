"""Scores from comparisons: Bradley-Terry strengths of replies, fitted to who wins against whom."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dpo_kit.errors import DpoKitWarning

Compare = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[float | None]]
"""(prompts, a first reply to each, a second) -> the preference for each first reply, in [0, 1]; None where
there is no saying. As `judges.Judge.compare`."""

# Wins each way that every pair of replies has beside its own.
PRIOR = 0.1
_TOLERANCE = 1e-10
_MOST_ROUNDS = 100_000
# Strengths that the iteration cannot tell apart are the same.
_SAME = 1e-7


def bradley_terry_strengths(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """The log-strengths s of P(i beats j) = sigmoid(s_i - s_j) that the wins are likeliest under.

    Zermelo's iteration, as the MM algorithm of Hunter 2004 (doi 10.1214/aos/1079120141, eq. 3): each round
    sets a strength p_i to W_i / sum over j of n_ij / (p_i + p_j).

    Args:
        wins: [K, K], how often i won against j; shares of a win count. The diagonal is ignored.
        prior: wins each way added to every pair, above 0: without them a reply that always wins has no
            finite strength.

    Returns:
        [K] fp64, of mean 0. Those of equal strength are equal to the last digit.

    Raises:
        ValueError: wins that are not a square of numbers from 0, or no prior.
    """
    wins = np.array(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not (wins >= 0).all() or not prior > 0:
        raise ValueError(f"expected [K, K] wins from 0 and a prior above 0, got {wins.shape} and {prior}")
    wins += prior
    np.fill_diagonal(wins, 0.0)
    games, won = wins + wins.T, wins.sum(1)
    if len(wins) < 2:
        return np.zeros(len(wins))
    strengths = np.zeros(len(wins))
    for _ in range(_MOST_ROUNDS):
        p = np.exp(strengths)
        new = np.log(won / (games / (p[:, None] + p[None, :])).sum(1))
        new -= new.mean()
        moved = np.abs(new - strengths).max()
        strengths = new
        if moved < _TOLERANCE:
            break
    return _settled(strengths)


def _settled(strengths: np.ndarray) -> np.ndarray:
    """Neighbours closer than _SAME take their common mean."""
    order = np.argsort(strengths)
    group = np.cumsum(np.diff(strengths[order], prepend=strengths[order[0]]) > _SAME)
    means = np.bincount(group, strengths[order]) / np.bincount(group)
    found = np.empty_like(strengths)
    found[order] = means[group]
    return found


def judged_scores(
    prompts: Sequence[Any], replies: Sequence[Sequence[str]], compare: Compare, prior: float = PRIOR
) -> list[list[float]]:
    """Rank first, then score: all pairs of a prompt's replies are compared, and strengths fitted to that.

    Args:
        prompts: texts or lists of messages.
        replies: of each prompt; equal ones are compared once and get one score.
        compare: the judge; gets all comparisons in one call.
        prior: of `bradley_terry_strengths`.

    Warns (`DpoKitWarning`) of comparisons that the judge came to nothing about: they count as not made.

    Raises:
        ValueError: a preference outside [0, 1], or not one for each comparison.
    """
    distinct = [list(dict.fromkeys(own)) for own in replies]
    places = [(i, a, b) for i, own in enumerate(distinct) for a, b in combinations(range(len(own)), 2)]
    preferences = compare(
        [prompts[i] for i, _, _ in places],
        [distinct[i][a] for i, a, _ in places],
        [distinct[i][b] for i, _, b in places],
    )
    wins = [np.zeros((len(own), len(own))) for own in distinct]
    for (i, a, b), preference in zip(places, preferences, strict=True):
        if preference is None:
            continue
        if not 0 <= preference <= 1:
            raise ValueError(f"a preference lies in [0, 1], and the judge gave {preference!r}")
        wins[i][a, b], wins[i][b, a] = preference, 1 - preference
    if unread := sum(preference is None for preference in preferences):
        message = f"the judge came to nothing about {unread} of {len(places)} comparisons: they do not count"
        warnings.warn(message, DpoKitWarning, stacklevel=2)
    found = []
    for own, all_of_prompt, won in zip(distinct, replies, wins, strict=True):
        scores = dict(zip(own, bradley_terry_strengths(won, prior).tolist(), strict=True))
        found.append([scores[reply] for reply in all_of_prompt])
    return found
