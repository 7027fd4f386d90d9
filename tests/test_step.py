"""A step's gradient where the loss couples its examples, and every registered loss in the trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import make_model, make_pairs
from test_trainer import make_dataset, make_trainer, step_gradients

from dpo_kit.dealing import TokenRows, mismatched_partners
from dpo_kit.errors import InputError
from dpo_kit.losses import LogProbs, get_loss, loss_names, make_objective
from dpo_kit.scoring import full_logit_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

OURS = [name for name in loss_names() if get_loss(name).function.__module__.startswith("dpo_kit.")]
COUPLED = [name for name in OURS if get_loss(name).batch]
ON_PAIRS = [name for name in OURS if not get_loss(name).rewards]


def plain_losses(name, policy, reference, pairs, strangers):
    """The objective on all of a step at once, from full logits of separate sequences."""

    def sums(model, given):
        with torch.enable_grad():
            entries = full_logit_logprobs.__wrapped__(model, given)
        lengths = torch.tensor([len(r) for p in zip(*(q.replies for q in given), strict=True) for r in p])
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        return entries.new_zeros(len(lengths)).index_add(0, owner, entries), entries, owner, lengths

    policy_sums, tokens, owner, lengths = sums(policy, pairs)
    half = len(pairs)
    with torch.no_grad():
        reference_sums = sums(reference, pairs)[0].detach()
        mismatched = sums(policy, strangers)[0].detach() - sums(reference, strangers)[0].detach()
    logps = LogProbs.of_pairs(
        policy_sums[:half], policy_sums[half:], reference_sums[:half], reference_sums[half:],
        lengths[:half], lengths[half:], margins=torch.zeros(half), token_logps=tokens,
        token_sequence=owner, mismatched=mismatched,
    )  # fmt: skip
    return make_objective(name)(logps)


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_step_does_not_depend_on_its_cut(tmp_path, name):
    """Loss and gradients equal those of the plain definition on the whole step, however it is cut."""
    dataset, reference = make_dataset(), make_model("llama", seed=9)
    results = []
    for settings in ({}, {"tokens_per_micro_batch": 60}, {"layout": "padded", "tokens_per_micro_batch": 150}):
        trainer = make_trainer(
            tmp_path, dataset=dataset, ref_model=reference, batch_size=12, loss=name, reference_mode="live",
            **settings,
        )  # fmt: skip
        rows = TokenRows(dataset, mismatched_partners(dataset)).__getitems__(range(12))
        batch = trainer.data_collator(rows)
        results.append((len(batch["micro_batches"]), *step_gradients(trainer, batch)))
    assert results[0][0] == 1
    assert results[1][0] > 2
    assert results[2][0] > 2

    policy, pairs = make_model("llama"), make_pairs(12)
    partners = mismatched_partners(dataset)
    strangers = [
        type(p)(p.prompt, pairs[partners[i]].chosen, pairs[partners[i]].rejected) for i, p in enumerate(pairs)
    ]
    plain_losses(name, policy, reference, pairs, strangers).mean().backward()
    expected = {n: p.grad for n, p in policy.named_parameters()}
    for _, loss, gradients in results:
        torch.testing.assert_close(loss, results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_every_loss_trains_on_pairs(tmp_path, name):
    data = make_dataset(margin=[0.5, 1.0, 2.0] * 4)
    trainer = make_trainer(tmp_path, dataset=data, eval_dataset=data, loss=name, tokens_per_micro_batch=80)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def unpaired_dataset(count=13):
    pairs = make_pairs(count)
    return Dataset.from_dict(
        {
            "prompt_ids": [p.prompt.tolist() for p in pairs],
            "completion_ids": [(p.chosen if i % 3 else p.rejected).tolist() for i, p in enumerate(pairs)],
            "label": [bool(i % 3) for i in range(count)],
        }
    )


def ranked_dataset(count=9):
    pairs, others = make_pairs(count), make_pairs(count, seed=5)
    replies = [
        [p.chosen, p.rejected, o.chosen, o.rejected][: 2 + i % 3]
        for i, (p, o) in enumerate(zip(pairs, others, strict=True))
    ]
    return Dataset.from_dict(
        {
            "prompt_ids": [p.prompt.tolist() for p in pairs],
            "completions_ids": [[r.tolist() for r in rs] for rs in replies],
            "scores": [[float(len(rs) - i) for i in range(len(rs))] for rs in replies],
        }
    )


@pytest.mark.parametrize("batch_size", [1, 3, 13])
@pytest.mark.parametrize("name", [n for n in OURS if get_loss(n).shape == "unpaired"])
def test_losses_on_labelled_replies(tmp_path, name, batch_size):
    trainer = make_trainer(
        tmp_path, dataset=unpaired_dataset(), loss=name, batch_size=batch_size, tokens_per_micro_batch=60
    )
    result = trainer.train()
    assert np.isfinite(result.training_loss)


OF_LISTS = [n for n in OURS if get_loss(n).shape == "lists" and not get_loss(n).rewards]


@pytest.mark.parametrize("name", OF_LISTS)
def test_losses_on_ranked_lists(tmp_path, name):
    trainer = make_trainer(tmp_path, dataset=ranked_dataset(), loss=name, batch_size=3, max_steps=20)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])


@pytest.mark.parametrize(("loss", "data"), [("dpo", unpaired_dataset), ("dpo", ranked_dataset),
                                            ("kto", ranked_dataset), ("lipo", unpaired_dataset)])  # fmt: skip
def test_data_that_a_loss_cannot_learn_from_is_refused(tmp_path, loss, data):
    with pytest.raises(InputError, match=f"'{loss}' learns from .* Losses for them: "):
        make_trainer(tmp_path, dataset=data(), loss=loss)


@pytest.mark.parametrize("columns", [{}, {"margin": [None] * 12}])
def test_a_loss_without_its_margins_is_refused(tmp_path, columns):
    with pytest.raises(InputError, match="'odpo' needs margins"):
        make_trainer(tmp_path, dataset=make_dataset(**columns), loss="odpo")


def long_and_short():
    """A long prompt with a short reply, and the reverse, again and again; at most 24 tokens in all."""
    random = np.random.default_rng(0)

    def ids(length):
        return random.integers(5, 90, length).tolist()

    lengths = [(23, 1), (4, 20), (12, 3)] * 3
    return Dataset.from_dict(
        {
            "prompt_ids": [ids(prompt) for prompt, _ in lengths],
            "completion_ids": [ids(reply) for _, reply in lengths],
            "label": [i % 2 == 0 for i in range(len(lengths))],
        }
    )


@pytest.mark.parametrize("mode", ["live", "cached"])
def test_kto_mixes_no_sequence_that_is_longer_than_the_datas_own(tmp_path, mode):
    model = make_model("gpt2", n_positions=24, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = {"loss": "kto", "batch_size": 9, "max_steps": 1, "reference_mode": mode}
    trainer = make_trainer(
        tmp_path, model, long_and_short(), reference_cache_dir=str(tmp_path / "cache"), **settings
    )
    batch = next(iter(trainer.get_train_dataloader()))
    longest = [int(part.position_ids.max()) + 1 for part in batch["mismatched"]]
    assert max(longest) == 24
    assert sum(len(part.lengths) for part in batch["mismatched"]) == 9
    assert min(int(part.lengths.min()) for part in batch["mismatched"]) == 1
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_before_training_a_cached_reference_and_the_policy_tie(tmp_path, loss):
    data = make_dataset(40)
    trainer = make_trainer(
        tmp_path, dataset=data, eval_dataset=data, loss=loss, reference_mode="cached",
        reference_cache_dir=str(tmp_path / "cache"), batch_size=5, tokens_per_micro_batch=70,
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_rewards/accuracies"] == 0.5
    assert found["eval_displaced"] == 0


def test_a_runs_log_has_the_margins_that_its_loss_compares(tmp_path):
    trainer = make_trainer(tmp_path, loss={"name": "simpo", "beta": 2.0, "gamma": 0.0}, batch_size=1)
    trainer.train()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        expected = np.log1p(np.exp(-logged["rewards/margins"]))
        assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_running_mean_survives_a_resume(tmp_path):
    weights = []
    for stop in (None, 3):
        folder = tmp_path / str(stop)
        settings = {"loss": {"name": "bco_pair"}, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        trainer = make_trainer(folder, **settings)
        if stop:
            trainer.train()
            for checkpoint in Path(folder).glob("checkpoints/step-6"):
                checkpoint.rename(folder / "gone")
            trainer = make_trainer(folder, **settings)
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
