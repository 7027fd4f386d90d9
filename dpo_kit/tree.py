"""Token sequences -> token tree: every distinct prefix of a set of sequences stands in one row, once.

The tree is kept as one packed row of tokens, depth first. It is made of *branches*: a branch sees
exactly `depth` earlier rows (its path) and itself, causally, and needs no further structure.

Only numpy here: what the rows mean (prompt, completion, loss) is not the tree's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenTree:
    """A set of token sequences with their common prefixes merged.

    Taken in lexicographic order, each sequence that is not there already adds one branch: the stretch
    of neighbouring rows behind the prefix that it shares with the one before it.

    Attributes:
        tokens: [T] token ids, depth first.
        positions: [T] depth of each token: its position in every sequence that it belongs to.
        parents: [T] row of the token before it, -1 at a root.
        branch_starts: [B] first row of each branch; the branches make up 0 .. T-1, in order.
        branch_depths: [B] tokens that a branch shares with earlier ones: the position of its first token.
        visible_rows: [R] the rows that each branch's last token sees, branch after branch: its path,
            root first, and then the branch itself.
        visible_offsets: [B + 1] where each branch's part of `visible_rows` begins, and R.
        sequence_rows: for each input sequence, in the order given, the [length] rows of its tokens.
    """

    tokens: IntArray
    positions: IntArray
    parents: IntArray
    branch_starts: IntArray
    branch_depths: IntArray
    visible_rows: IntArray
    visible_offsets: IntArray
    sequence_rows: list[IntArray]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branch_lengths(self) -> IntArray:
        """[B] rows of each branch, at least 1."""
        return np.diff(self.branch_starts, append=len(self))


def common_prefix_length(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> int:
    """Number of leading elements that two 1-D arrays share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def lexicographic_order(sequences: Sequence[npt.NDArray[np.integer]]) -> list[int]:
    """Indices that sort sequences of non-negative token ids; a prefix comes before what it begins."""
    # Big-endian bytes compare as the ids do, and Python compares bytes in C.
    keys = [np.asarray(s).astype(">u4").tobytes() for s in sequences]
    return sorted(range(len(keys)), key=keys.__getitem__)


def build_tree(sequences: Sequence[npt.ArrayLike]) -> TokenTree:
    """Merge the common prefixes of token sequences.

    Args:
        sequences: any number of 1-D sequences of token ids (0 <= id < 2**32), of any length; equal
            sequences and sequences that begin one another are allowed.

    Returns:
        The tree; `len(tree)` is the number of distinct non-empty prefixes.
    """
    arrays = [np.asarray(s, dtype=np.int64).reshape(-1) for s in sequences]
    order = lexicographic_order(arrays)
    ordered = [arrays[i] for i in order]
    lengths = np.fromiter(map(len, ordered), np.int64, len(ordered))
    shared = [common_prefix_length(a, b) for a, b in itertools.pairwise(ordered)]
    depths = np.array([0, *shared][: len(ordered)], np.int64)
    ends = lengths.cumsum()
    starts = ends - lengths

    # Every token of every sequence has a place; those behind the shared prefix are rows of the tree.
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    is_row = positions >= np.repeat(depths, lengths)
    rows = is_row.cumsum() - 1
    for i in np.flatnonzero(depths).tolist():
        # The rest are rows already, of the sequence before.
        rows[starts[i] : starts[i] + depths[i]] = rows[starts[i - 1] : starts[i - 1] + depths[i]]
    parents = np.where(positions > 0, np.roll(rows, 1), -1)

    branches = lengths > depths
    sequence_rows = [np.empty(0, np.int64)] * len(order)
    for i, start, end in zip(order, starts, ends, strict=True):
        sequence_rows[i] = rows[start:end]
    return TokenTree(
        tokens=np.concatenate([np.empty(0, np.int64), *ordered])[is_row],
        positions=positions[is_row],
        parents=parents[is_row],
        branch_starts=rows[(starts + depths)[branches]],
        branch_depths=depths[branches],
        visible_rows=rows[np.repeat(branches, lengths)],
        visible_offsets=np.concatenate([[0], lengths[branches].cumsum()]),
        sequence_rows=sequence_rows,
    )
