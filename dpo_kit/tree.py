"""Token sequences -> token tree: every distinct prefix of a set of sequences stands in one row, once.

The tree is kept as one packed row of tokens, depth first. It is made of *branches*: a branch sees
exactly `depth` earlier rows (its path) and itself, causally, and needs no further structure.

All of it follows from the sorted sequences and what neighbours share (`sort_sequences`), so a step is
sorted once and the tree of any part of it is cut out of that.

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
class SortedSequences:
    """Token sequences in lexicographic order; one that begins another comes before it.

    Attributes:
        tokens: [sum of lengths] the sequences' token ids, end to end.
        lengths: [S] tokens of each.
        shared: [S] tokens that each has in common with the one before it, 0 for the first.
        places: [S] for each sequence, in the order given, its place here.
    """

    tokens: IntArray
    lengths: IntArray
    shared: IntArray
    places: IntArray

    @property
    def num_prefixes(self) -> int:
        """Distinct non-empty prefixes: rows of the tree."""
        return len(self.tokens) - int(self.shared.sum())

    def select(self, numbers: Sequence[int]) -> SortedSequences:
        """Some of the sequences, at least one, by their numbers in the order given; each at most once."""
        places = self.places[numbers]
        order = places.argsort()
        kept = places[order]
        # Sorted sequences share what all neighbours between them share.
        shared = np.minimum.reduceat(self.shared[: kept[-1] + 1], kept[:-1] + 1)
        lengths = self.lengths[kept]
        moved = (self.lengths.cumsum()[kept] - lengths.cumsum()).repeat(lengths)
        return SortedSequences(
            tokens=self.tokens[moved + np.arange(len(moved))],
            lengths=lengths,
            shared=np.concatenate([[0], shared]),
            places=_inverse(order),
        )


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


def sort_sequences(sequences: Sequence[npt.ArrayLike]) -> SortedSequences:
    """Sort token sequences (1-D, 0 <= id < 2**32, of any length) and find what neighbours share."""
    arrays = [np.asarray(s, np.int64) for s in sequences]
    # Big-endian bytes compare as the ids do, and Python compares bytes in C.
    empty = np.empty(0, np.int64)
    raw = np.concatenate([empty, *arrays]).astype(">u4").tobytes()
    ends = [4 * end for end in itertools.accumulate(map(len, arrays), initial=0)]
    keys = [raw[a:b] for a, b in itertools.pairwise(ends)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    tokens = np.concatenate([empty, *(arrays[i] for i in order)])
    lengths = np.array([len(arrays[i]) for i in order], np.int64)
    return SortedSequences(tokens, lengths, _shared(tokens, lengths), _inverse(np.array(order, np.int64)))


def _shared(tokens: IntArray, lengths: IntArray) -> IntArray:
    """[S] length of the common prefix of each sequence with the one before it, 0 for the first."""
    limits = np.minimum(lengths[1:], lengths[:-1])
    # Every token that has one above it is compared with that; the first difference ends the prefix.
    ends = limits.cumsum()
    begins = ends - limits
    here = np.arange(limits.sum()) + (lengths[:-1].cumsum() - begins).repeat(limits)
    above = here - lengths[:-1].repeat(limits)
    differs = np.append(np.flatnonzero(tokens[here] != tokens[above]), len(here))
    firsts = differs[differs.searchsorted(begins)] - begins
    return np.concatenate([np.zeros(len(lengths[:1]), np.int64), np.minimum(firsts, limits)])


def _inverse(order: IntArray) -> IntArray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def build_tree(sequences: Sequence[npt.ArrayLike] | SortedSequences) -> TokenTree:
    """Merge the common prefixes of token sequences.

    Args:
        sequences: any number of 1-D sequences of token ids (0 <= id < 2**32), of any length; equal
            sequences and sequences that begin one another are allowed. Or the same sorted already.

    Returns:
        The tree; `len(tree)` is the number of distinct non-empty prefixes.
    """
    given = sequences if isinstance(sequences, SortedSequences) else sort_sequences(sequences)
    lengths, depths, ends = given.lengths, given.shared, given.lengths.cumsum()
    starts = ends - lengths

    # Every token of every sequence has a place; those behind the shared prefix are rows of the tree.
    positions = np.arange(len(given.tokens)) - starts.repeat(lengths)
    is_row = positions >= depths.repeat(lengths)
    rows = is_row.cumsum() - 1
    shares = np.flatnonzero(depths)
    for above, here, depth in zip(
        starts[shares - 1].tolist(), starts[shares].tolist(), depths[shares].tolist(), strict=True
    ):
        # The rest are rows already, of the sequence before.
        rows[here : here + depth] = rows[above : above + depth]
    at = np.flatnonzero(is_row)
    positions = positions[at]
    parents = rows[at - 1]
    parents[positions == 0] = -1

    branches = lengths > depths
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return TokenTree(
        tokens=given.tokens[at],
        positions=positions,
        parents=parents,
        branch_starts=rows[(starts + depths)[branches]],
        branch_depths=depths[branches],
        visible_rows=rows if branches.all() else rows[branches.repeat(lengths)],
        visible_offsets=np.concatenate([[0], lengths[branches].cumsum()]),
        sequence_rows=[rows[slice(*spans[place])] for place in given.places.tolist()],
    )
