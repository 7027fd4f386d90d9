"""Steps and micro-batches: every pair once, every completion token once, under the budget."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kit.examples import PairTokens
from dpo_kit.packing import cut_step, pack_padded, pack_tree, plan_step

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)
pairs_strategy = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=8)


def as_pairs(given):
    return [PairTokens(*(np.array(part) for part in triple), source=str(i)) for i, triple in enumerate(given)]


def completions(batch):
    """The targets of each sequence's predictions."""
    return [
        batch.prediction_targets[batch.entry_prediction[batch.entry_sequence == s]].tolist()
        for s in range(batch.num_sequences)
    ]


def contexts(batch):
    """For each sequence, the token that each of its predictions is made from."""
    flat = batch.input_ids.flatten()
    return [
        flat[batch.prediction_rows[batch.entry_prediction[batch.entry_sequence == s]]].tolist()
        for s in range(batch.num_sequences)
    ]


@given(pairs_strategy)
def test_a_micro_batch_predicts_each_completion_from_its_own_context(given):
    pairs = as_pairs(given)
    replies = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    prompts = [p.prompt for p in pairs] * 2
    for batch in (pack_tree(pairs), pack_padded(pairs)):
        assert completions(batch) == [r.tolist() for r in replies]
        assert contexts(batch) == [
            [p[-1].item(), *r[:-1].tolist()] for p, r in zip(prompts, replies, strict=True)
        ]
        assert batch.lengths.tolist() == [len(r) for r in replies]
        assert batch.num_separate_tokens == sum(
            len(p) + len(r) for p, r in zip(prompts, replies, strict=True)
        )


@given(pairs_strategy)
def test_a_tree_computes_distinct_prefixes_and_predicts_each_once(given):
    pairs = as_pairs(given)
    batch = pack_tree(pairs)
    sequences = [
        (len(p.prompt), tuple(np.concatenate([p.prompt, reply]))) for p in pairs for reply in p.replies
    ]
    assert batch.num_tokens == len({s[: i + 1] for _, s in sequences for i in range(len(s))})
    predicted = {s[: i + 1] for start, s in sequences for i in range(start, len(s))}
    assert len(batch.prediction_targets) == len(predicted)


@given(pairs_strategy, st.integers(1, 60), st.sampled_from(["tree", "padded"]))
@settings(deadline=None)
def test_every_pair_is_in_one_micro_batch_under_the_budget(given, budget, layout):
    pairs = as_pairs(given)
    assert sorted(i for cut in cut_step(pairs, budget, layout) for i in cut) == list(range(len(pairs)))
    for batch in plan_step(pairs, budget, layout):
        size = batch.num_tokens if layout == "tree" else batch.input_ids.numel()
        assert size <= budget or batch.num_pairs == 1


@given(pairs_strategy, st.integers(1, 60))
@settings(deadline=None)
def test_no_two_neighbouring_trees_would_fit_in_one(given, budget):
    pairs = as_pairs(given)
    for cut, following in itertools.pairwise(cut_step(pairs, budget)):
        assert pack_tree([pairs[i] for i in cut + following]).num_tokens > budget


def test_pairs_of_one_prompt_meet_in_one_tree():
    prompts = [np.full(20, i) for i in range(4)]
    pairs = [PairTokens(prompts[i % 4], np.array([7, i]), np.array([8, i])) for i in range(8)]
    cuts = cut_step(pairs, token_budget=30)
    assert sorted(map(sorted, cuts)) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_micro_batches_of_a_step_are_about_alike():
    generator = np.random.default_rng(0)
    pairs = [PairTokens(*(generator.integers(0, 10**6, n) for n in (30, 10, 10))) for _ in range(8)]
    sizes = [batch.num_tokens for batch in plan_step(pairs, 350)]
    assert sizes == [200, 200]


def test_micro_batches_go_to_another_device_whole():
    batch = pack_tree(as_pairs([([1], [2], [3])])).to("meta")
    assert batch.input_ids.device.type == "meta"
    assert batch.tree.output_index.device.type == "meta"
    assert all(bucket.key_rows.device.type == "meta" for bucket in batch.tree.buckets)


def test_wrong_pairs_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match="at least one token"):
        pack_tree([PairTokens(np.array([], int), one, one)])
    with pytest.raises(ValueError, match="all alike"):
        pack_tree([PairTokens(one, one, one), PairTokens(one, one, None)])
    with pytest.raises(ValueError, match="token_budget"):
        cut_step([PairTokens(one, one, one)], 0)


def test_weights_and_margins_travel():
    pair = PairTokens.from_row(
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "weight": 0.5, "margin": None}
    )
    batch = pack_tree([pair])
    torch.testing.assert_close(batch.weights, torch.tensor([0.5]))
    torch.testing.assert_close(batch.margins, torch.tensor([0.0]))
