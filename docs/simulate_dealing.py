"""How evenly a step's pairs are dealt to ranks: pairs of drawn lengths, dealt in order and by their work.

Work is a pair's distinct tokens: prompt, chosen and rejected reply. A part of plan_large_run.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dpo_kit.rank_batches import Pieces, deal_to_ranks

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from lengths import LENGTHS

BATCHES = (512, 1024, 2048)
STEPS = 100


def longest_over_mean(work_BR: np.ndarray) -> np.ndarray:
    """[B] of each step, from [B, R] the work of its ranks."""
    return work_BR.max(1) / work_BR.mean(1)


def in_order(pairs_BN: np.ndarray, ranks: int) -> np.ndarray:
    """[B, R] work, with neighbouring pairs of a shuffled order on one rank."""
    return pairs_BN.reshape(len(pairs_BN), ranks, -1).sum(2)


def by_work(pairs_BN: np.ndarray, ranks: int) -> np.ndarray:
    """[B, R] work, as `dpo_kit.rank_batches` deals it; no two pairs share anything."""
    own = np.arange(pairs_BN.shape[1])
    owners = (deal_to_ranks(Pieces(own, own, own, pairs), ranks) for pairs in pairs_BN)
    return np.stack([np.bincount(o, pairs, ranks) for o, pairs in zip(owners, pairs_BN, strict=True)])


def simulated(ranks: int) -> list[tuple[str, ...]]:
    """Rows of the page's table: the longest rank over the mean, mean and worst of `STEPS` steps."""
    rows = []
    for name, label in (("hh-like", "HH-like"), ("ultrafeedback", "UltraFeedback-like")):
        known, random = LENGTHS[name], np.random.default_rng(0)
        for batch in BATCHES:
            kinds = (known.prompt, known.chosen, known.rejected)
            drawn = (kind.draw(random, STEPS * batch).reshape(STEPS, batch) for kind in kinds)
            pairs_BN = sum(drawn, np.zeros((STEPS, batch), np.int64))
            found = [longest_over_mean(deal(pairs_BN, ranks)) for deal in (in_order, by_work)]
            cells = (f"{value:.3f}" for ratios in found for value in (ratios.mean(), ratios.max()))
            rows.append((f"{label}, {batch}", *cells))
    return rows
