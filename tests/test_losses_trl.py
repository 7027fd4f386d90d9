"""Losses on pairs against what TRL's own DPOTrainer computes on the same models and batch."""

import pytest
import torch
from datasets import Dataset
from families import make_model

from dpo_kit.losses import LogProbs, make_objective
from dpo_kit.tokenizer import train_byte_level_bpe

trl = pytest.importorskip("trl", reason="trl is not installed (the ppo extra)")

ROWS = {
    "prompt": ["a cat and", "one two", "red", "up and down", "what"],
    "chosen": [" a dog", " three", " blue is not green", " left", " a fine day"],
    "rejected": [" nothing at all", " four five", " blue", " right or left", " no"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe([text for column in ROWS.values() for text in column], 280)


def tiny_llama(seed):
    # Weights large enough for log-ratios of some nats between two of them.
    return make_model("llama", seed=seed, vocab_size=280, initializer_range=0.5).eval()


def trls_loss(tokenizer, folder, **options):
    """TRL's loss of the batch, and the batch."""
    trainer = trl.DPOTrainer(
        tiny_llama(0),
        tiny_llama(1),
        trl.DPOConfig(str(folder), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, **options),
        train_dataset=Dataset.from_dict(ROWS),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch)), batch


@torch.no_grad()
def logps_of(batch):
    """What our losses look at, from full logits of the collated batch: chosen rows first, then rejected."""
    mask = batch["completion_mask"][:, 1:].bool()
    sums = []
    for seed in (0, 1):
        logits = tiny_llama(seed)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        sums.append((logps * mask).sum(1))
    halves = (half for values in (*sums, mask.sum(1)) for half in values.chunk(2))
    return LogProbs.of_pairs(*halves)


# TRL's options, our loss, and by how much TRL's is larger.
SAME = [
    ({"loss_type": "sigmoid", "beta": 0.3}, {"name": "dpo", "beta": 0.3}, 0),
    (
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
        {"name": "robust_dpo", "beta": 0.3, "label_smoothing": 0.2},
        0,
    ),
    ({"loss_type": "sigmoid_norm", "beta": 2.0}, {"name": "dpo_norm", "beta": 2.0}, 0),
    ({"loss_type": "hinge", "beta": 0.3}, {"name": "hinge", "beta": 0.3}, 0),
    ({"loss_type": "ipo", "beta": 0.3}, {"name": "ipo", "beta": 0.3}, 0),
    (
        {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.001},
        {"name": "exo", "beta": 0.3, "label_smoothing": 0.001},
        0,
    ),
    ({"loss_type": "nca_pair", "beta": 0.3}, {"name": "nca", "beta": 0.3}, 0),
    ({"loss_type": "sppo_hard", "beta": 0.3}, {"name": "sppo", "beta": 0.3}, 0),
    ({"loss_type": "aot", "beta": 0.3}, {"name": "aot", "beta": 0.3}, 0),
    ({"loss_type": "aot_unpaired", "beta": 0.3}, {"name": "aot_unpaired", "beta": 0.3}, 0),
    # The paper's equations 7 and 8 have no constant; TRL writes 1 - sigmoid for -sigmoid.
    ({"loss_type": "apo_zero", "beta": 0.3}, {"name": "apo_zero", "beta": 0.3}, 1),
    ({"loss_type": "apo_down", "beta": 0.3}, {"name": "apo_down", "beta": 0.3}, 1),
    (
        {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.5},
        {"name": "discopop", "beta": 0.3, "tau": 0.5},
        0,
    ),
    (
        {"f_divergence_type": "forward_kl", "beta": 0.3},
        {"name": "f_dpo", "divergence": "forward_kl", "beta": 0.3},
        0,
    ),
    (
        {"f_divergence_type": "js_divergence", "beta": 0.3},
        {"name": "f_dpo", "divergence": "js", "beta": 0.3},
        0,
    ),
    # TRL's coefficient is the exponent's complement: 1 is the reverse KL there, 0 in the paper.
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "beta": 0.3},
        {"name": "f_dpo", "divergence": "alpha", "alpha": 0.3, "beta": 0.3},
        0,
    ),
]


@pytest.mark.parametrize(("theirs", "ours", "offset"), SAME)
def test_same_value_as_trl(theirs, ours, offset, tokenizer, tmp_path):
    loss, batch = trls_loss(tokenizer, tmp_path, **theirs)
    mine = make_objective(ours)(logps_of(batch)).mean()
    torch.testing.assert_close(mine + offset, loss, rtol=2e-5, atol=1e-6)


def test_the_batch_tells_the_losses_apart(tokenizer, tmp_path):
    _, batch = trls_loss(tokenizer, tmp_path)
    logps = logps_of(batch)
    assert logps.logratios.abs().min() > 0.1
    assert (logps.chosen_lengths != logps.rejected_lengths).any()
    values = [make_objective(ours)(logps).mean().item() for _, ours, _ in SAME]
    assert len({round(value, 3) for value in values}) == len(values)


def test_trls_bco_has_no_reward_shift(tokenizer, tmp_path):
    """The paper subtracts the mean reward delta; TRL's bco_pair is our loss with delta = 0."""
    loss, batch = trls_loss(tokenizer, tmp_path, loss_type="bco_pair", beta=0.3)
    logps, bco = logps_of(batch), make_objective({"name": "bco_pair", "beta": 0.3})
    torch.testing.assert_close(bco(logps, [0.0]).mean(), loss, rtol=2e-5, atol=1e-6)
    assert abs(bco(logps).mean() - loss) > 1e-3


def test_trls_sigmoid_passes_label_smoothing_over(tokenizer, tmp_path):
    """cDPO is not in TRL 1.12: label_smoothing changes nothing there."""
    loss, batch = trls_loss(tokenizer, tmp_path, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    logps = logps_of(batch)
    torch.testing.assert_close(
        make_objective({"name": "dpo", "beta": 0.3})(logps).mean(), loss, rtol=2e-5, atol=1e-6
    )
    assert abs(make_objective({"name": "cdpo", "beta": 0.3})(logps).mean() - loss) > 1e-3


def test_trls_sigmoid_and_sft_is_rpo_with_a_mean_over_tokens(tokenizer, tmp_path):
    """The paper divides each pair's NLL by its own length; TRL takes one mean over the batch's tokens."""
    loss, batch = trls_loss(
        tokenizer, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.3
    )
    logps = logps_of(batch)
    lengths = logps.chosen_lengths
    dpo, rpo = (
        make_objective(spec)(logps)
        for spec in ({"name": "dpo", "beta": 0.3}, {"name": "rpo", "beta": 0.3, "alpha": 0.5})
    )
    expected = dpo.mean() + ((rpo - dpo) * lengths).sum() / lengths.sum()
    torch.testing.assert_close(expected, loss, rtol=2e-5, atol=1e-6)
