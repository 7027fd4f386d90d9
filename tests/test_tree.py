"""The token tree: what goes in comes out, and every distinct prefix is computed once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_kit.tree import build_tree, common_prefix_length

# Few distinct ids, so that long common prefixes and equal sequences are common.
sequences = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12)
ids = st.integers(0, 2**32 - 1)


@given(sequences)
def test_any_set_of_sequences_comes_back(given):
    tree = build_tree(given)
    assert [tree.tokens[rows].tolist() for rows in tree.sequence_rows] == given


@given(st.lists(st.lists(ids, max_size=3), max_size=4))
def test_large_ids_are_ordered_as_numbers(given):
    tree = build_tree(given)
    assert [tree.tokens[rows].tolist() for rows in tree.sequence_rows] == given


@given(sequences)
def test_a_row_for_every_distinct_prefix(given):
    prefixes = {tuple(s[: i + 1]) for s in given for i in range(len(s))}
    assert len(build_tree(given)) == len(prefixes)


@given(sequences)
def test_parents_and_positions_follow_each_sequence(given):
    tree = build_tree(given)
    for rows in tree.sequence_rows:
        assert tree.positions[rows].tolist() == list(range(len(rows)))
        assert tree.parents[rows].tolist() == [-1, *rows[:-1]][: len(rows)]


@given(sequences)
def test_branches_cover_the_rows_in_order_and_see_only_earlier_ones(given):
    tree = build_tree(given)
    ends = tree.branch_starts + tree.branch_lengths
    row = 0
    for i, (start, end, depth) in enumerate(zip(tree.branch_starts, ends, tree.branch_depths, strict=True)):
        visible = tree.visible_rows[tree.visible_offsets[i] : tree.visible_offsets[i + 1]].tolist()
        assert start == row < end
        assert visible[depth:] == list(range(start, end))
        assert all(seen < start for seen in visible[:depth])
        # The path is that of the branch's first token, parent by parent.
        assert [tree.parents[r] for r in visible] == [-1, *visible[:-1]]
        row = end
    assert row == len(tree)


def test_a_pair_shares_its_prompt_and_the_replies_common_beginning():
    prompt, chosen, rejected = [5, 6], [7, 8, 9], [7, 3]
    tree = build_tree([prompt + chosen, prompt + rejected])
    assert tree.tokens.tolist() == [5, 6, 7, 3, 8, 9]  # the smaller continuation comes first
    assert tree.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 2, 4]
    assert tree.sequence_rows[0].tolist() == [0, 1, 2, 4, 5]
    assert tree.sequence_rows[1].tolist() == [0, 1, 2, 3]


def test_common_prefix_length():
    assert common_prefix_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix_length(np.array([1, 2]), np.array([1, 2, 3])) == 2
    assert common_prefix_length(np.array([1]), np.array([2])) == 0
    assert common_prefix_length(np.array([], int), np.array([2])) == 0
