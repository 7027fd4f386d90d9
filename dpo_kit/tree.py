"""Token sequences -> token tree: every distinct prefix of a set of sequences stands in one row, once.

The tree is kept as one packed row of tokens, depth first. It is made of *branches*: taken in
lexicographic order, each sequence shares some prefix with the one before it and adds the rest as a
stretch of neighbouring rows. So a branch sees exactly `depth` earlier rows (its path) and itself,
causally, and needs no further structure.

Only numpy here: what the rows mean (prompt, completion, loss) is not the tree's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Branch:
    """The rows one sequence adds to the tree.

    Attributes:
        start: first row of the branch; its rows are `start .. start + length - 1`.
        length: number of rows.
        path: [depth] rows of the ancestors, root first.
    """

    start: int
    length: int
    path: IntArray

    @property
    def depth(self) -> int:
        """Number of tokens shared with an earlier sequence: the position of the branch's first token."""
        return len(self.path)


@dataclass(frozen=True)
class TokenTree:
    """A set of token sequences with their common prefixes merged.

    Attributes:
        tokens: [T] token ids, depth first.
        positions: [T] depth of each token: its position in every sequence that it belongs to.
        parents: [T] row of the token before it, -1 at a root.
        branches: the stretches of rows that make up 0 .. T-1, in order.
        sequence_rows: for each input sequence, in the order given, the [length] rows of its tokens.
    """

    tokens: IntArray
    positions: IntArray
    parents: IntArray
    branches: list[Branch]
    sequence_rows: list[IntArray]

    def __len__(self) -> int:
        return len(self.tokens)


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
    branches: list[Branch] = []
    rows_of: list[IntArray] = [np.empty(0, np.int64)] * len(arrays)
    added: list[IntArray] = []
    previous = path = np.empty(0, np.int64)
    total = 0
    for index in lexicographic_order(arrays):
        tokens = arrays[index]
        depth = common_prefix_length(previous, tokens)
        length = len(tokens) - depth
        rows = np.concatenate([path[:depth], np.arange(total, total + length)])
        if length:
            branches.append(Branch(total, length, rows[:depth]))
            added.append(tokens[depth:])
            total += length
        rows_of[index] = rows
        previous, path = tokens, rows
    positions = [np.arange(b.depth, b.depth + b.length) for b in branches]
    parents = np.arange(-1, total - 1)
    for branch in branches:
        parents[branch.start] = branch.path[-1] if branch.depth else -1
    return TokenTree(_concatenate(added), _concatenate(positions), parents, branches, rows_of)


def _concatenate(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
