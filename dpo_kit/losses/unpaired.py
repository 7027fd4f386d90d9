"""Objectives on single replies with a label, desirable or not: one value per reply, [S].

On pairs the chosen replies are the desirable ones and the rejected ones the undesirable. An objective
averages over an example's replies, so on pairs the losses here are halves of what their papers' sums over
both sides give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_at_least_zero, require_momentum, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


def _signed(values: Tensor, logps: LogProbs) -> Tensor:
    """[S] values of desirable replies, and minus those of the undesirable ones."""
    return torch.where(logps.labels, values, -values)


def _weighted(losses: Tensor, logps: LogProbs, desirable: float, undesirable: float) -> Tensor:
    """[S] losses times the weight of their label.

    Raises:
        ValueError: a negative weight.
    """
    require_at_least_zero(desirable_weight=desirable, undesirable_weight=undesirable)
    return torch.where(logps.labels, desirable * losses, undesirable * losses)


@register_loss(
    "kto",
    shape="unpaired",
    mismatched=True,
    paper="Ethayarajh et al. 2024, arXiv 2402.01306, section 4",
    title="KTO",
    incumbents=("TRL KTOTrainer kto", "LLaMA-Factory stage kto", "axolotl kto"),
)
def kto(
    logps: LogProbs, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w (1 - sigmoid(s beta (r - z))), s = 1 for desirable replies and -1 for others, r the log-ratio.

    z estimates KL(policy || reference) of the data's prompts. The estimate: the mean log-ratio of the
    step's `mismatched` replies (each prompt with a reply to another prompt of the data), over all
    micro-batches and ranks; 0 where it is negative or nothing is mismatched; without gradient. It is the
    paper's, but for where the replies come from: the paper (and TRL) shift those of a batch by one, so that a
    batch of one, such as a data set's last, pairs a prompt with its own reply. Here every batch size is
    right. Where a prompt with another's reply would be longer than the longest sequence of the data, the
    reply loses its end, so the estimate is then one over its first tokens.

    Args:
        logps: needs labels, the reference, and the log-ratios of mismatched replies.
        beta: strength of the KL constraint, positive.
        desirable_weight: w of desirable replies, at least 0; the paper's lambda_D. With n_D desirable and
            n_U undesirable replies the paper wants (lambda_D n_D) / (lambda_U n_U) in [1, 4/3].
        undesirable_weight: w of undesirable ones, the paper's lambda_U.

    Returns:
        [S] loss per reply, between 0 and its weight.
    """
    require_positive(beta=beta)
    mismatched = logps.need("mismatched").detach()
    divergence = (mismatched.sum() / max(len(mismatched), 1)).clamp(min=0)
    # 1 - sigmoid(x) = sigmoid(-x), without cancellation.
    losses = torch.sigmoid(-_signed(beta * (logps.logratios - divergence), logps))
    return _weighted(losses, logps, desirable_weight, undesirable_weight)


def reward_shift(logps: LogProbs, *, beta: float = 0.01, momentum: float = 0.9) -> Tensor:
    """[] mean reward of a step's desirable replies and of its undesirable ones, averaged; see `bco`.

    Where a step has replies of one label only, their mean alone. `momentum` is for who averages over steps.
    """
    labels, rewards = logps.labels, beta * logps.logratios.detach()
    sums = torch.stack([(rewards * labels).sum(), (rewards * ~labels).sum()])
    counts = torch.stack([labels.sum(), (~labels).sum()])
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()


@register_loss(
    "bco",
    shape="unpaired",
    running=reward_shift,
    paper="Jung et al. 2024, arXiv 2404.04656, section 4",
    title="BCO",
    incumbents=("TRL 1.12 BCOTrainer",),
)
def bco(logps: LogProbs, *, beta: float = 0.01, momentum: float = 0.9) -> Tensor:
    """-log sigmoid(s (beta r - d)), s = 1 for desirable replies and -1 for others, r the log-ratio.

    The log-ratio is the logit of a classifier. The shift d is an exponential moving average of half the
    sum of the mean rewards beta r of both labels (`reward_shift`), this step included; without gradient.
    TRL has the mean over all replies seen since the start of the run, whatever their label. The paper's
    weights for prompts that differ between the labels (underlying distribution matching) are left out.

    Args:
        logps: needs labels, the reference and `running`.
        beta: strength of the KL constraint, positive; 0.01 in the paper, 0.1 in TRL.
        momentum: weight of the past in the moving average, in [0, 1). The default is ours.

    Returns:
        [S] binary cross-entropy per reply, nats.
    """
    require_positive(beta=beta)
    require_momentum(momentum)
    shifted = beta * logps.logratios - logps.need("running").detach()
    return -F.logsigmoid(_signed(shifted, logps))


@register_loss(
    "apo_zero_unpaired",
    shape="unpaired",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
    title="APO-zero, unpaired",
    incumbents=("TRL KTOTrainer apo_zero_unpaired",),
)
def apo_zero_unpaired(
    logps: LogProbs, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w (1 - sigmoid(s beta r)), s = 1 for desirable replies and -1 for others, r the log-ratio.

    The two terms of APO-zero, each on replies of its own (up to the constant 1, which the paper leaves
    out); KTO with the divergence held at 0.

    Args:
        logps: needs labels and the reference.
        beta: strength of the KL constraint, positive.
        desirable_weight: w of desirable replies, at least 0; not in the paper, as TRL has it.
        undesirable_weight: w of undesirable ones.

    Returns:
        [S] loss per reply, between 0 and its weight.
    """
    require_positive(beta=beta)
    losses = torch.sigmoid(-_signed(beta * logps.logratios, logps))
    return _weighted(losses, logps, desirable_weight, undesirable_weight)


@register_loss(
    "npo",
    shape="unpaired",
    paper="Zhang et al. 2024, arXiv 2404.05868, section 3",
    title="NPO",
)
def npo(logps: LogProbs, *, beta: float = 0.1, retain: float = 0.0) -> Tensor:
    """-(2 / beta) log sigmoid(-beta r) for undesirable replies, r the log-ratio: they are unlearned.

    As beta goes to 0 it is gradient ascent on them, up to a constant.

    Args:
        logps: needs labels and the reference.
        beta: how soon the loss saturates, positive.
        retain: weight of -log pi(reply) for desirable replies, at least 0; 0 leaves them alone, 1 is the
            paper's NPO with its retain loss.

    Returns:
        [S] loss per reply, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(retain=retain)
    unlearned = -2 / beta * F.logsigmoid(-beta * logps.logratios)
    return torch.where(logps.labels, -retain * logps.need("policy"), unlearned)
