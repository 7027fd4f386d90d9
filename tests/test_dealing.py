"""Rows as the data set has them, and an order that keeps prompts together."""

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dpo_kit.dealing import PromptGroups, TokenRows, deal, prompt_groups
from dpo_kit.examples import PairTokens
from dpo_kit.packing import plan_step

group_numbers = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)


def make_dataset(count=30, prompts=7):
    random = np.random.default_rng(0)
    known = [random.integers(0, 90, random.integers(1, 9)).tolist() for _ in range(prompts)]
    rows = [
        {
            "prompt_ids": known[i % prompts],
            "chosen_ids": random.integers(0, 90, 1 + i % 4).tolist(),
            "rejected_ids": random.integers(0, 90, 1 + i % 3).tolist(),
            "weight": None if i % 5 == 0 else i / 2,
            "source": f"file:{i}",
        }
        for i in range(count)
    ]
    # Several parts, as a data set that was written in batches has.
    return concatenate_datasets([Dataset.from_list(rows[i : i + 8]) for i in range(0, count, 8)])


@pytest.mark.parametrize("choose", ["all", "slice", "shuffle"])
def test_rows_are_those_of_the_data_set(choose):
    dataset = make_dataset()
    if choose != "all":
        dataset = dataset.select(range(5, 27)) if choose == "slice" else dataset.shuffle(seed=1)
    for rows in (TokenRows(dataset), pickle.loads(pickle.dumps(TokenRows(dataset)))):
        asked = [3, len(dataset) - 1, 0, 3]
        found = [
            {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
            for row in rows.__getitems__(asked)
        ]
        assert found == [dataset[i] for i in asked]
        assert len(rows) == len(dataset)


@given(group_numbers, st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_dealt_once_and_the_order_is_that_of_seed_and_epoch(groups, batch_size, epoch):
    order = deal(groups, batch_size, seed=5, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(groups)))
    assert order.tolist() == deal(groups, batch_size, seed=5, epoch=epoch).tolist()


def cut_groups(groups, order, batch_size):
    """Groups that lie in more batches than they must."""
    batches = np.empty(len(order), int)
    batches[order] = np.arange(len(order)) // batch_size
    return [
        g
        for g in np.unique(groups)
        if len(set(batches[groups == g].tolist())) > -(-(groups == g).sum() // batch_size)
    ]


def test_groups_that_fit_are_kept_whole():
    groups = np.repeat(np.arange(120), 4)
    order = deal(groups, 16, seed=0, epoch=0)
    assert cut_groups(groups, order, 16) == []
    mixed = np.repeat(np.arange(300), np.random.default_rng(0).integers(1, 7, 300))
    assert len(cut_groups(mixed, deal(mixed, 16, seed=0, epoch=0), 16)) < 10
    assert len(cut_groups(mixed, np.random.default_rng(0).permutation(len(mixed)), 16)) > 200


def test_a_group_larger_than_a_batch_fills_whole_batches():
    groups = np.array([0] * 11 + [1] * 2 + [2] * 3)
    order = deal(groups, 4, seed=0, epoch=0)
    dealt = [groups[order[i : i + 4]].tolist() for i in range(0, 16, 4)]
    assert sum(batch == [0, 0, 0, 0] for batch in dealt) == 2


def test_epochs_and_seeds_differ():
    groups = np.arange(50)
    orders = {tuple(deal(groups, 4, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_prompts_are_told_apart_by_their_ids():
    dataset = make_dataset(count=30, prompts=7)
    assert prompt_groups(dataset).tolist() == [i % 7 for i in range(30)]


def test_an_accelerate_loader_deals_each_epoch_anew_and_goes_on_within_one():
    dataset = make_dataset()
    sampler = PromptGroups(dataset, batch_size=4, seed=3)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(range(len(dataset)), batch_size=4, sampler=sampler, collate_fn=torch.tensor)
    )
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    for epoch, batches in enumerate(epochs):
        assert (
            np.concatenate(batches).tolist() == deal(prompt_groups(dataset), 4, seed=3, epoch=epoch).tolist()
        )
    resumed = skip_first_batches(loader, 3)
    resumed.set_epoch(1)
    assert [batch.tolist() for batch in resumed] == epochs[1][3:]


def plans(rows):
    return plan_step([PairTokens.from_row(row) for row in rows], token_budget=30)


def test_plans_made_by_a_worker_are_the_same():
    rows = TokenRows(make_dataset())
    here, there = (list(DataLoader(rows, batch_size=10, collate_fn=plans, num_workers=n)) for n in (0, 1))
    assert [len(step) for step in here] == [len(step) for step in there]
    for one, other in zip(chain(*here), chain(*there), strict=True):
        assert one.sources == other.sources
        for name in ("input_ids", "position_ids", "prediction_rows", "entry_prediction", "weights"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        for name in ("query_rows", "key_rows", "query_positions", "output_index"):
            torch.testing.assert_close(getattr(one.tree, name), getattr(other.tree, name))
        assert one.tree.sizes == other.tree.sizes
