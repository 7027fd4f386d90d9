"""The token tree: what goes in comes out, and every distinct prefix is computed once."""

from hypothesis import given
from hypothesis import strategies as st

from dpo_kit.tree import build_tree, sort_sequences

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


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(sequences)
def test_sorted_sequences_know_what_neighbours_share(given):
    found = sort_sequences(given)
    ordered = sorted(given)
    assert found.tokens.tolist() == [token for sequence in ordered for token in sequence]
    assert found.lengths.tolist() == [len(sequence) for sequence in ordered]
    assert found.shared.tolist() == [0, *map(common_prefix, ordered, ordered[1:])][: len(given)]
    assert [ordered[place] for place in found.places] == given
    assert sorted(found.places.tolist()) == list(range(len(given)))


@given(sequences.filter(len), st.data())
def test_a_selection_is_what_sorting_it_alone_gives(given, data):
    numbers = data.draw(st.lists(st.integers(0, len(given) - 1), unique=True, min_size=1))
    found, expected = sort_sequences(given).select(numbers), sort_sequences([given[i] for i in numbers])
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.shared.tolist() == expected.shared.tolist()
    assert [build_tree(found).tokens[rows].tolist() for rows in build_tree(found).sequence_rows] == [
        given[i] for i in numbers
    ]
