"""Steps dealt to ranks: every row once, in one process's steps, and equal work for all."""

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_dealing import make_dataset as make_rows
from test_trainer import make_dataset, make_trainer
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoConfig, Trainer

from dpo_kit.dealing import PromptGroups, TokenRows, mismatched_partners
from dpo_kit.errors import InputError
from dpo_kit.examples import example_of
from dpo_kit.packing import pack_tree
from dpo_kit.pairs import load_pairs
from dpo_kit.rank_batches import Costs, Pieces, RankBatches, RowWork, deal_to_ranks
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-base/test.jsonl.gz"
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256}

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=80).map(np.array)


def alone(work):
    rows = np.arange(len(work))
    return Pieces(rows, rows, rows, work)


def of_prompts(prompts, replies, groups):
    """Each row its prompt, and a reply that no other has."""
    rows = np.arange(len(groups))
    keys = np.concatenate([groups, len(groups) + rows])
    return Pieces(groups, np.concatenate([rows, rows]), keys, np.concatenate([prompts, replies]))


def loads(work, owners, ranks):
    return np.bincount(owners, weights=work, minlength=ranks)


@given(sizes, st.integers(1, 9))
def test_no_rank_is_longer_than_the_mean_and_one_row(work, ranks):
    """Graham's bound for any list schedule: the mean, and (1 - 1/m) of the longest."""
    owners = deal_to_ranks(alone(work), ranks)
    longest = loads(work, owners, ranks).max()
    assert longest <= work.sum() / ranks + (1 - 1 / ranks) * work.max() + 1e-6
    assert len(np.unique(owners)) == min(ranks, len(work))


def test_the_longest_goes_first_to_the_rank_with_the_least():
    # 7 -> 0; 6 -> 1; 5 -> 1 has 6, 0 has 7: 1; 4 -> 0 (7 < 11); 3 and 2: 11 and 11: 0, then 1.
    assert deal_to_ranks(alone(np.array([2, 7, 5, 3, 6, 4])), 2).tolist() == [1, 0, 1, 0, 1, 0]


def test_rows_of_one_prompt_stay_on_one_rank_where_that_is_even():
    groups = np.array([0, 1, 0, 1, 2, 3])
    prompts, replies = np.full(6, 100), np.array([10, 10, 10, 10, 20, 20])
    owners = deal_to_ranks(of_prompts(prompts, replies, groups), 2)
    assert owners[0] == owners[2] != owners[1] == owners[3]
    assert owners[4] != owners[5]


def test_rows_of_one_prompt_are_parted_where_one_rank_would_have_most_of_the_work():
    # Together 100 + 8 x 50 = 500; in two halves 300 each, and no cut is shorter.
    owners = deal_to_ranks(of_prompts(np.full(8, 100), np.full(8, 50), np.zeros(8, int)), 2)
    assert np.bincount(owners).tolist() == [4, 4]
    # Prompts of 1000 and replies of 1: what is parted is dearer than what is whole.
    owners = deal_to_ranks(of_prompts(np.full(8, 1000), np.full(8, 1), np.arange(8) // 4), 4)
    assert len(set(owners[:4])) == len(set(owners[4:])) == 1


@pytest.mark.parametrize(("rows", "ranks", "drop_last"), [(21, 2, False), (21, 3, True), (19, 4, False)])
def test_ranks_together_have_one_processs_steps(rows, ranks, drop_last):
    """The last step of 19 rows in steps of 8 has 3, and so nothing for one of 4 ranks."""
    dataset = make_rows(rows)
    work = RowWork(TokenRows(dataset), Costs())

    def sampler():
        return SeedableRandomSampler(dataset, data_seed=5)

    expected = list(BatchSampler(sampler(), 8, drop_last))
    parts = [
        RankBatches(sampler(), 8, drop_last=drop_last, rank=rank, ranks=ranks, work=work)
        for rank in range(ranks)
    ]
    assert [len(part) for part in parts] == [len(expected)] * ranks
    for step, *own in zip(expected, *parts, strict=True):
        assert sorted(chain(*own)) == sorted(step)
        assert sum(not one for one in own) == max(0, ranks - len(step))
        # In the order of the step, as one process would plan them.
        assert all(one == [row for row in step if row in one] for one in own)


def test_without_work_neighbours_are_dealt_as_one_process_would_take_them():
    parts = [RankBatches(SequentialSampler(range(10)), 6, rank=rank, ranks=2) for rank in (0, 1)]
    assert [list(part) for part in parts] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9]]]


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "lists"])
@pytest.mark.parametrize("picked", [False, True])
def test_work_is_counted_from_the_rows_lengths(kind, picked):
    dataset = make_rows(30, kind=kind)
    if picked:
        dataset = dataset.select([3, 17, 2, 2, 29])
    partners = mismatched_partners(dataset)
    work = RowWork(TokenRows(dataset, partners), Costs(reply=0.5, seen=0.01))
    expected = []
    for row in dataset:
        prompt = len(row["prompt_ids"])
        replies = row.get("completions_ids") or [
            row[n] for n in ("chosen_ids", "rejected_ids", "completion_ids") if n in row
        ]
        # A token at depth d sees d of them, and half of its own.
        own = sum(1.5 * len(r) + 0.01 * len(r) * (prompt + len(r) / 2) for r in replies)
        expected.append((prompt + 0.01 * prompt**2 / 2, own))
    prompts, own = np.array(expected).T
    assert np.abs(work.prompts / 1024 - prompts).max() < 1e-3
    # The partner's replies to this prompt, forward alone.
    assert np.abs(work.replies / 1024 - own - (prompts + own[partners]) / 3).max() < 1e-3


def test_rejected_replies_cost_nothing_where_no_loss_needs_them():
    rows = TokenRows(make_rows(30))
    chosen = [len(row["chosen_ids"]) * 1024 for row in rows]
    assert RowWork(rows, Costs(), with_rejected=False).replies.tolist() == chosen


def test_groups_are_prompts():
    dataset = make_rows(30, prompts=7)
    prompts = dataset["prompt_ids"]
    groups = RowWork(TokenRows(dataset), Costs()).pieces(np.arange(30)).groups
    assert all((groups[i] == groups[j]) == (prompts[i] == prompts[j]) for i in range(30) for j in range(30))


def test_rows_together_cost_what_their_tree_has():
    """Pairs of ranked replies: each prompt and each reply once; in two parts, some again."""
    replies = [[i] * length for i, length in enumerate((3, 5, 8, 2), start=10)]
    rows = [([p] * 9, replies[a], replies[b]) for p in (1, 2) for a in range(4) for b in range(a)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    pieces = RowWork(TokenRows(dataset), Costs()).pieces(np.arange(12))
    for units in (np.arange(12), np.arange(12) // 3, np.arange(12) // 6, np.zeros(12, int)):
        trees = [
            pack_tree([example_of(r) for r in dataset.select(np.flatnonzero(units == u))]) for u in set(units)
        ]
        assert (pieces.sizes(units) / 1024).tolist() == [tree.num_tokens for tree in trees]


def test_costs_of_a_model():
    # 128256 / (12 x 32 x 4096), and a token sees 1 / (6 x 4096) of its work in each other one.
    costs = Costs.of(AutoConfig.for_model("llama", **LLAMA_8B))
    assert (costs.reply, costs.seen) == pytest.approx((0.081543, 4.0690e-5), rel=1e-4)
    assert Costs.of(AutoConfig.for_model("llama", **LLAMA_8B), with_head=False).reply == 0


def hh_like(count, seed=0):
    """Lengths as in HH harmless-base (mean 126, 42 and 53 tokens), and no prompt twice."""
    random = np.random.default_rng(seed)

    def ids(mean, spread, most):
        lengths = np.exp(random.normal(mean, spread, count)).clip(4, most).astype(int)
        return [np.full(length, row, np.int32) for row, length in enumerate(lengths)]

    return Dataset.from_dict(
        {"prompt_ids": ids(4.5, 0.8, 850), "chosen_ids": ids(3.3, 1, 280), "rejected_ids": ids(3.5, 1, 570)}
    )


def unevenness(dataset, costs, batch_size, ranks, epochs=4, tree_tokens=None):
    """{"work" | "tokens": [steps] longest rank over the mean, less 1} of ours, and of neighbours."""
    rows = TokenRows(dataset)
    work, tokens = RowWork(rows, costs), RowWork(rows, Costs())

    def shares(dealt_by):
        parts = [
            RankBatches(
                SeedableRandomSampler(dataset, data_seed=0),
                batch_size,
                drop_last=True,
                rank=rank,
                ranks=ranks,
                work=dealt_by,
            )
            for rank in range(ranks)
        ]
        found = {"work": [], "tokens": []}
        for _ in range(epochs):
            for step in zip(*parts, strict=True):
                for name, counted in (("work", work), ("tokens", tokens)):
                    if name == "tokens" and tree_tokens is not None:
                        each = np.array([tree_tokens(own) for own in step])
                    else:
                        each = np.array([(counted.prompts[own] + counted.replies[own]).sum() for own in step])
                    found[name].append(each.max() / each.mean() - 1)
        return {name: np.array(value) for name, value in found.items()}

    return shares(work), shares(None)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("sizes", [None, LLAMA_8B])
def test_the_longest_rank_is_within_5_percent_of_the_mean(ranks, sizes):
    """In work and in tokens, in every step of 64 pairs; neighbours would leave it far longer."""
    costs = Costs() if sizes is None else Costs.of(AutoConfig.for_model("llama", **sizes))
    ours, neighbours = unevenness(hh_like(2000), costs, 64, ranks)
    assert max(ours["work"].max(), ours["tokens"].max()) < 0.05
    assert neighbours["work"].mean() > 0.05
    assert ours["work"].mean() < neighbours["work"].mean() / 10


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="the HH sample is not in ../shared/data")
def test_the_longest_rank_on_hh_is_within_5_percent_of_the_mean():
    pairs = load_pairs(HH, invalid="drop")
    tokenizer = train_byte_level_bpe([*pairs["prompt"], *pairs["chosen"], *pairs["rejected"]], 8192)
    dataset = tokenize_pairs(pairs, tokenizer, max_length=1024).dataset
    rows = TokenRows(dataset)

    def tree_tokens(own):
        return pack_tree([example_of(row) for row in rows.__getitems__(own)]).num_tokens

    costs = Costs.of(AutoConfig.for_model("llama", **LLAMA_8B))
    for ranks in (2, 4, 8):
        ours, neighbours = unevenness(dataset, costs, 64, ranks, epochs=1, tree_tokens=tree_tokens)
        for name in ("work", "tokens"):
            print(
                f"{ranks} ranks, {name}: mean {ours[name].mean():.2%} worst {ours[name].max():.2%}; "
                f"neighbours {neighbours[name].mean():.1%} {neighbours[name].max():.1%}"
            )
            assert ours[name].max() < 0.05


def sources_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return [[source for batch in inputs["micro_batches"] for source in batch.sources] for inputs in loader]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_seed": 11},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"train_sampling_strategy": "sequential"},
        {"dataloader_num_workers": 2},
        {"dataloader_drop_last": True},
        {"group_by_prompt": True},
    ],
)
def test_one_process_takes_its_rows_as_transformers_and_accelerate_would(settings, tmp_path):
    trainer = make_trainer(
        tmp_path, dataset=make_dataset(21), eval_dataset=make_dataset(10, seed=7), reference_mode="live",
        per_device_eval_batch_size=4, **settings,
    )  # fmt: skip
    theirs = Trainer._get_dataloader(
        trainer, trainer.train_dataset, "", 4, trainer._get_train_sampler, is_training=True
    )
    ours = trainer.get_train_dataloader()
    assert len(ours) == len(theirs) == 5 + ("dataloader_drop_last" not in settings)
    assert trainer.num_examples(ours) == 21
    for epoch in (0, 1, 5):
        orders = []
        for loader in (ours, theirs):
            torch.manual_seed(epoch)
            orders.append(sources_of(loader, epoch))
        assert orders[0] == orders[1]
    held_out = [f"pairs:{i}" for i in range(10)]
    assert sources_of(trainer.get_eval_dataloader()) == [held_out[:4], held_out[4:8], held_out[8:]]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_strategies_that_sort_by_a_length_are_refused(strategy, tmp_path):
    with pytest.raises(InputError, match="a pair has no one length"):
        make_trainer(tmp_path, train_sampling_strategy=strategy)


def test_accumulating_beside_the_batch_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="a step would be of 4 times as many pairs"):
        make_trainer(tmp_path, accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 4}})


def test_the_order_is_the_settings_alone(tmp_path):
    """Not what a process's generator was seeded with since: ranks often seed theirs differently."""
    orders = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path, dataset=make_dataset(21), reference_mode="live")
        torch.manual_seed(seed)
        orders.append(sources_of(trainer.get_train_dataloader()))
    assert orders[0] == orders[1]


def test_grouped_rows_meet_in_the_same_steps_on_any_number_of_ranks(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_rows(30), group_by_prompt=True, batch_size=8)
    sampler = trainer._get_train_sampler()
    assert list(sampler) == list(PromptGroups(trainer.train_dataset, 8, trainer.args.seed))


@pytest.mark.parametrize("settings", [{}, {"group_by_prompt": True}, {"dataloader_num_workers": 1}])
def test_resuming_within_the_second_epoch_is_bit_equal(settings, tmp_path):
    def run(folder, **more):
        settings_ = {"dataset": make_dataset(11), "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
        return make_trainer(tmp_path / folder, **settings_ | settings | more)

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/step-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_plan_of_no_rows_is_empty_and_planners_travel_to_workers(tmp_path):
    planner = make_trainer(tmp_path, loss="kto").planner
    rows = planner.rows_of(make_dataset())
    here, there = planner(rows.__getitems__([])), pickle.loads(pickle.dumps(planner))
    assert here["micro_batches"] == here["mismatched"] == here["examples"] == []
    few = rows.__getitems__([4, 2])
    assert there(few)["micro_batches"][0].sources == planner(few)["micro_batches"][0].sources
