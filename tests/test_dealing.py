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

from dpo_kit.dealing import PromptGroups, TokenRows, deal, mismatched_partners, prompt_groups
from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens
from dpo_kit.packing import plan_step

group_numbers = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)


def make_dataset(count=30, prompts=7, kind="pairs"):
    random = np.random.default_rng(0)
    known = [random.integers(0, 90, random.integers(1, 9)).tolist() for _ in range(prompts)]

    def reply(length):
        return random.integers(0, 90, length).tolist()

    def judged(i):
        if kind == "pairs":
            return {"chosen_ids": reply(1 + i % 4), "rejected_ids": reply(1 + i % 3), "margin": i / 4}
        if kind == "unpaired":
            return {"completion_ids": reply(1 + i % 4), "label": i % 3 == 0}
        many = 2 + i % 4
        return {
            "completions_ids": [reply(1 + j) for j in range(many)],
            "scores": [i / 7 - j for j in range(many)],
        }

    rows = [
        {
            "prompt_ids": known[i % prompts],
            **judged(i),
            "weight": None if i % 5 == 0 else i / 2,
            "source": f"file:{i}",
        }
        for i in range(count)
    ]
    # Several parts, as a data set that was written in batches has.
    return concatenate_datasets([Dataset.from_list(rows[i : i + 8]) for i in range(0, count, 8)])


def plain(value):
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def chosen_part(dataset, choose):
    if choose == "sliced table":
        return Dataset(dataset.data.table.slice(5, 22))
    if choose == "slice":
        return dataset.select(range(5, 27))
    return dataset.shuffle(seed=1) if choose == "shuffle" else dataset


CHOICES = ["all", "slice", "shuffle", "sliced table"]


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "lists"])
@pytest.mark.parametrize("choose", CHOICES)
def test_rows_are_those_of_the_data_set(choose, kind):
    dataset = chosen_part(make_dataset(kind=kind), choose)
    for rows in (TokenRows(dataset), pickle.loads(pickle.dumps(TokenRows(dataset)))):
        asked = [3, len(dataset) - 1, 0, 3]
        found = [{name: plain(value) for name, value in row.items()} for row in rows.__getitems__(asked)]
        assert found == [dataset[i] for i in asked]
        assert len(rows) == len(dataset)


def test_ids_are_views():
    rows = TokenRows(make_dataset(kind="lists"))
    for one, other in zip(rows[9]["completions_ids"], rows[9]["completions_ids"], strict=True):
        assert not one.flags.owndata
        assert np.shares_memory(one, other)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "lists"])
@pytest.mark.parametrize("choose", CHOICES)
def test_a_partner_is_the_replies_of_a_row_with_another_prompt(choose, kind):
    dataset = chosen_part(make_dataset(kind=kind), choose)
    partners = mismatched_partners(dataset)
    rows = TokenRows(dataset, partners)
    replies = {"pairs": ["chosen_ids", "rejected_ids"], "unpaired": ["completion_ids"]}.get(kind)
    for copy in (rows, pickle.loads(pickle.dumps(rows))):
        for i, row in enumerate(copy.__getitems__(range(len(dataset)))):
            other = dataset[int(partners[i])]
            assert other["prompt_ids"] != row["prompt_ids"].tolist()
            expected = other["completions_ids"] if replies is None else [other[name] for name in replies]
            assert plain(row.pop("partner")) == expected
            assert {name: plain(value) for name, value in row.items()} == dataset[i]
    one_by_one = [batch[0]["partner"] for batch in DataLoader(rows, batch_size=1, collate_fn=list)]
    at_once = [row["partner"] for row in next(iter(DataLoader(rows, batch_size=99, collate_fn=list)))]
    assert plain(one_by_one) == plain(at_once)


def of_prompts(numbers):
    return Dataset.from_dict(
        {"prompt_ids": [[n, 1] for n in numbers], "completion_ids": [[7]] * len(numbers)}
    )


@pytest.mark.parametrize(
    ("numbers", "partners"),
    [
        ([0, 1], [1, 0]),
        ([0, 1, 2], [1, 2, 0]),
        ([0, 0, 1, 1, 2, 2], [2, 3, 4, 5, 0, 1]),
        ([0, 0, 0, 1], [3, 3, 3, 0]),
        ([0, 0, 0, 1, 2, 3, 4], [3, 4, 5, 4, 5, 6, 0]),
        ([0, 1, 1, 0], [1, 3, 0, 2]),
        ([0, 1, 0, 0, 0], [1, 2, 1, 1, 1]),
        ([0, 1, 0, 2], [1, 2, 1, 0]),
    ],
)
def test_partners_by_hand(numbers, partners):
    assert mismatched_partners(of_prompts(numbers)).tolist() == partners


@given(group_numbers)
def test_rows_of_a_prompt_have_different_partners_with_other_prompts(groups):
    dataset = of_prompts(groups.tolist())
    if len(set(groups.tolist())) == 1:
        with pytest.raises(InputError, match=r"field 'data\.train'.*the same prompt"):
            mismatched_partners(dataset)
        return
    partners = mismatched_partners(dataset)
    for group in set(groups.tolist()):
        own, others = np.flatnonzero(groups == group), np.flatnonzero(groups != group)
        assert partners[own].tolist() == [others[i % len(others)] for i in own]
        if own[-1] - own[0] < len(others):
            assert len(set(partners[own].tolist())) == len(own)


def test_partners_of_labelled_replies_are_of_both_labels():
    # A desirable reply and then an undesirable one of each of 20 prompts.
    partners = mismatched_partners(of_prompts([i // 2 for i in range(40)]))
    assert sorted(partners.tolist()) == list(range(40))


def test_partners_must_be_as_many_as_the_rows():
    with pytest.raises(ValueError, match="3 partners for 2 rows"):
        TokenRows(of_prompts([0, 1]), np.array([1, 0, 0]))


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


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "lists"])
def test_prompts_are_told_apart_by_their_ids(kind):
    dataset = make_dataset(count=30, prompts=7, kind=kind)
    assert sorted(PromptGroups(dataset, batch_size=4, seed=0)) == list(range(30))
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
