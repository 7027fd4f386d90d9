"""Log-probs of known sequences in memory, found by their keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_kit.reference.shards import Shard


class Lookup:
    """Sequences, sorted by their keys; 2 million are sorted in about a second.

    Args:
        shard: what is known; of a sequence that is there more than once the first counts.
    """

    def __init__(self, shard: Shard) -> None:
        # Fixed-length strings of bytes: numpy sorts and searches them, and takes no notice of what is equal
        # in all 16 of them.
        keys = _as_strings(shard.keys)
        # Stable: of what is equal the first stays first, and a search finds it.
        self._order = keys.argsort(kind="stable")
        self._sorted = keys[self._order]
        self._sums = shard.sums
        self._lengths, self._logprobs = shard.lengths, shard.logprobs
        self._starts = None if shard.lengths is None else np.cumsum(shard.lengths) - shard.lengths

    def __len__(self) -> int:
        """Distinct sequences."""
        return int(np.count_nonzero(self._sorted[1:] != self._sorted[:-1])) + bool(len(self._sorted))

    def find(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """[S] where each of [S, 16] keys is; -1 where it is not known."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        wanted = _as_strings(keys)
        at = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def sums(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[S] log-probs of the sequences at these places."""
        return self._sums[places]

    def entries(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """[M] log-probs of their tokens, one sequence after the other."""
        if self._lengths is None or self._logprobs is None or self._starts is None:
            raise ValueError("only sums are known")
        lengths = self._lengths[places]
        ends = lengths.cumsum()
        within = np.arange(int(ends[-1]) if len(ends) else 0) - (ends - lengths).repeat(lengths)
        return self._logprobs[self._starts[places].repeat(lengths) + within]


def _as_strings(keys: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(keys).view("S16").reshape(-1)
