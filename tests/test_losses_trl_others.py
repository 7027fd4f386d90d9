"""The same losses against TRL's own code: its trainers on a small model, one batch, CPU, fp32.

Ours come from log-probs of the same models, one sequence at a time without padding. Where TRL departs from a
paper the test says how, and computes TRL's value from ours.
"""

import dataclasses
import random

import pytest
import torch
from datasets import Dataset
from loss_cases import value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dpo_kit.losses import LogProbs, dpo, get_loss

pytest.importorskip("trl", reason="trl is not installed (the ppo extra)")

VOCABULARY = 61
COMMON = {"bf16": False, "use_cpu": True, "report_to": "none"}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-5, atol=1e-6)


def small(kind=LlamaForCausalLM, seed=0, **changes):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", pad_token="0", bos_token="1")


def text(draw, longest):
    return " ".join(str(draw.randint(4, VOCABULARY - 1)) for _ in range(draw.randint(1, longest)))


def rows(count=6, seed=1):
    draw = random.Random(seed)
    return [
        {"prompt": text(draw, 6) + " ", "chosen": text(draw, 9), "rejected": text(draw, 9)}
        for _ in range(count)
    ]


def labelled(labels):
    draw = random.Random(2)
    return [{"prompt": text(draw, 6) + " ", "completion": text(draw, 9), "label": label} for label in labels]


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def replies(ids, mask, reply):
    """The rows of a padded batch without their padding, and how many tokens each has before its reply."""
    taken = [(i[m.bool()], r[m.bool()].bool()) for i, m, r in zip(ids, mask, reply, strict=True)]
    return [(i, int((~r).sum())) for i, r in taken]


@torch.no_grad()
def token_statistics(model, sequences):
    """Per reply: its tokens' log-probs, and the sums of squared probabilities of their distributions."""
    found = []
    for ids, start in sequences:
        logps = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        found.append((logps.gather(1, ids[start:, None]).squeeze(1), (2 * logps).exp().sum(-1)))
    return found


def logprobs(sequences, policy, reference=None, labels=None):
    """Of replies with labels, or of pairs: chosen ones first."""
    lengths = torch.tensor([len(ids) - start for ids, start in sequences])
    ours = token_statistics(policy, sequences)
    theirs = token_statistics(reference, sequences) if reference else None
    count = len(sequences) if labels is not None else len(sequences) // 2
    return LogProbs(
        torch.stack([tokens.sum() for tokens, _ in ours]),
        torch.arange(count).repeat(1 if labels is not None else 2),
        count,
        "pairs" if labels is None else "unpaired",
        reference=torch.stack([tokens.sum() for tokens, _ in theirs]) if theirs else None,
        lengths=lengths,
        scores=torch.tensor([1.0, 0.0]).repeat_interleave(count) if labels is None else labels.float(),
        token_logps=torch.cat([tokens for tokens, _ in ours]),
        token_sequence=torch.arange(len(sequences)).repeat_interleave(lengths),
        reference_token_logps=torch.cat([tokens for tokens, _ in theirs]) if theirs else None,
        token_extras={"squared_probs": torch.cat([squares for _, squares in ours])},
    )


def dpo_trainer(tmp_path, tokenizer, **options):
    import trl

    trainer = trl.DPOTrainer(
        small(), small(seed=9), trl.DPOConfig(str(tmp_path), beta=0.3, **COMMON, **options),
        train_dataset=Dataset.from_list(rows()), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = batch_of(trainer)
    sequences = replies(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    logps = logprobs(sequences, small(), small(seed=9))
    return trainer.compute_loss(trainer.model, batch), logps


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ld_dpo(tmp_path, tokenizer, alpha):
    theirs, logps = dpo_trainer(tmp_path, tokenizer, ld_alpha=alpha)
    assert (logps.chosen_lengths != logps.rejected_lengths).any()
    close(value("ld_dpo", logps, beta=0.3, alpha=alpha).mean(), theirs)


def test_wpo(tmp_path, tokenizer):
    """TRL does not cap the product of the weights at 1, as the authors' code does."""
    theirs, logps = dpo_trainer(tmp_path, tokenizer, use_weighting=True)
    aligned = logps.token_logps - logps.token_extras["squared_probs"].log()
    chosen, rejected = logps.halves(logps.sum_per_reply(aligned) / logps.lengths)
    weights = (chosen + rejected).exp()
    assert (weights < 1).any()
    ours = value("wpo", logps, beta=0.3)
    torch.testing.assert_close(ours, weights.clamp(max=1) * dpo(logps, beta=0.3))
    close((ours * weights.clamp(min=1)).mean(), theirs)


def cpo_batch(kind, tmp_path, tokenizer, **options):
    """The loss of CPOTrainer or ORPOTrainer, our log-probs, and the batch."""
    from trl.experimental import cpo, orpo

    made, config = {"cpo": (cpo.CPOTrainer, cpo.CPOConfig), "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig)}[kind]
    trainer = made(
        model=small(), args=config(str(tmp_path), beta=0.3, max_length=64, **COMMON, **options),
        train_dataset=Dataset.from_list(rows()), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = batch_of(trainer)
    sequences = [
        sequence
        for side in ("chosen", "rejected")
        for sequence in replies(
            batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100
        )
    ]
    return trainer.get_batch_loss_metrics(trainer.model, batch)[0], logprobs(sequences, small()), sequences


def test_cpo(tmp_path, tokenizer):
    """The paper adds -log pi(chosen); TRL the mean over the tokens of the batch's chosen replies."""
    theirs, logps, _ = cpo_batch("cpo", tmp_path, tokenizer)
    ours = value("cpo", logps, beta=0.3)
    likelihood = logps.chosen.sum() / logps.chosen_lengths.sum()
    close((ours + logps.chosen).mean() - likelihood, theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_simpo_and_alphapo(tmp_path, tokenizer, alpha):
    theirs, logps, _ = cpo_batch(
        "cpo", tmp_path, tokenizer, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7, alpha=alpha
    )
    close(value("alphapo", logps, beta=0.3, gamma=0.7, alpha=alpha).mean(), theirs)
    if not alpha:
        close(value("simpo", logps, beta=0.3, gamma=0.7).mean(), theirs)


def test_orpo(tmp_path, tokenizer):
    """The paper's likelihood is of the chosen reply's tokens; TRL's of the prompts' as well, in one mean."""
    theirs, logps, sequences = cpo_batch("orpo", tmp_path, tokenizer)
    odds = value("orpo", logps, odds_weight=0.3) + logps.chosen / logps.chosen_lengths
    whole = torch.cat(
        [t for t, _ in token_statistics(small(), [(ids, 1) for ids, _ in sequences[: len(odds)]])]
    )
    close(odds.mean() - whole.mean(), theirs)


def kto_trainer(tmp_path, tokenizer, labels, batch_size, **options):
    import trl

    trainer = trl.KTOTrainer(
        small(), small(seed=9),
        trl.KTOConfig(str(tmp_path), beta=0.3, per_device_train_batch_size=batch_size, **COMMON, **options),
        train_dataset=Dataset.from_list(labelled(labels)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = batch_of(trainer)
    sequences = replies(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    logps = logprobs(sequences, small(), small(seed=9), labels=batch["label"])
    return trainer, batch, logps


@pytest.mark.parametrize(("seeds", "clamped"), [((0, 9), False), ((9, 0), True)])
def test_kto(tmp_path, tokenizer, seeds, clamped):
    """With TRL's mismatched replies, which it makes by shifting a batch by one."""
    trainer, batch, logps = kto_trainer(
        tmp_path, tokenizer, [True, False, True, True, False], 5, desirable_weight=1.2, undesirable_weight=0.7
    )
    policy, reference = (small(seed=seed) for seed in seeds)
    trainer.model.load_state_dict(policy.state_dict())
    trainer.ref_model.load_state_dict(reference.state_dict())
    if seeds != (0, 9):
        logps = dataclasses.replace(logps, policy=logps.reference, reference=logps.policy)
    shifted = replies(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    mismatched = logprobs(shifted, policy, reference, labels=batch["label"]).logratios
    ours = value(
        "kto",
        dataclasses.replace(logps, mismatched=mismatched),
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    )
    assert (mismatched.mean() < 0) == clamped
    close(ours.mean(), trainer.compute_loss(trainer.model, batch))


def test_kto_of_a_last_batch_of_one(tmp_path, tokenizer):
    """There TRL's "mismatched" reply is the prompt's own: it estimates the KL as that reply's log-ratio."""
    trainer, _, logps = kto_trainer(tmp_path, tokenizer, [True, False, True, True, False], 4)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[4]]))
    ours = value("kto", dataclasses.replace(logps, mismatched=logps.logratios[4:]), beta=0.3)
    close(ours[4], theirs)


@pytest.mark.parametrize("labels", [[True, False, True, True], [True, True], [False]])
def test_apo_zero_unpaired(tmp_path, tokenizer, labels):
    trainer, batch, logps = kto_trainer(tmp_path, tokenizer, labels, 4, loss_type="apo_zero_unpaired")
    ours = value("apo_zero_unpaired", logps, beta=0.3)
    close(ours.mean(), trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("labels", [[True, False, False, True], [True, False, True, True, True]])
def test_bco(tmp_path, tokenizer, labels):
    """TRL shifts by the mean reward of all replies so far, the paper by the mean of both labels' means."""
    bco = pytest.importorskip("trl.experimental.bco", reason="this trl has no BCOTrainer")
    trainer = bco.BCOTrainer(
        model=small(), ref_model=small(seed=9),
        args=bco.BCOConfig(str(tmp_path), beta=0.3, max_length=64, **COMMON),
        train_dataset=Dataset.from_list(labelled(labels)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = batch_of(trainer)
    sequences = replies(
        batch["completion_input_ids"], batch["completion_attention_mask"], batch["completion_labels"] != -100
    )
    logps = logprobs(sequences, small(), small(seed=9), labels=torch.tensor(batch["label"]))
    mean = 0.3 * logps.logratios.mean()
    theirs = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    close(value("bco", dataclasses.replace(logps, running=mean), beta=0.3).mean(), theirs)
    paper = get_loss("bco").running(logps, beta=0.3)
    balanced = sum(labels) * 2 == len(labels)
    assert torch.isclose(mean, paper).item() == balanced


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_bradley_terry(tmp_path, tokenizer, margin, centring):
    import trl

    data = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in rows()
    ]
    if margin:
        data = [{**row, "margin": i / 4} for i, row in enumerate(data)]
    model = small(LlamaForSequenceClassification, num_labels=1)
    trainer = trl.RewardTrainer(
        model, trl.RewardConfig(str(tmp_path), center_rewards_coefficient=centring or None, **COMMON),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = batch_of(trainer)
    sequences = replies(batch["input_ids"], batch["attention_mask"], batch["attention_mask"])
    with torch.no_grad():
        rewards = torch.cat([model(ids[None]).logits[0] for ids, _ in sequences])
    assert rewards.std() > 0.1
    logps = LogProbs.of_pairs(rewards[:6], rewards[6:], rewards=rewards, margins=batch.get("margin"))
    ours = value("bradley_terry", dataclasses.replace(logps, policy=None), margin=margin, centring=centring)
    close(ours.mean(), trainer.compute_loss(trainer.model, batch))
