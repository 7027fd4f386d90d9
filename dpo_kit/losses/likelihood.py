"""Objectives on the policy's likelihoods alone: no reference takes part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_kit.losses.inputs import LogProbs, log1mexp
from dpo_kit.losses.registry import register_loss


@register_loss(
    "sft",
    reference=False,
    rejected=False,
    paper="arXiv 2305.18290, section 6",
    title="Preferred-FT",
    incumbents=("TRL sft",),
)
def sft(logps: LogProbs, *, per_token: bool = True) -> Tensor:
    """-log pi(chosen): supervised fine-tuning on the chosen replies (Preferred-FT).

    Args:
        logps: needs the chosen reply.
        per_token: divide by the number of the reply's tokens.

    Returns:
        [P] negative log-likelihood per pair, nats (per token).
    """
    return -logps.chosen / logps.need("chosen_lengths") if per_token else -logps.chosen


@register_loss(
    "unlikelihood",
    reference=False,
    paper="Welleck et al. 2019, arXiv 1908.04319, equation 4",
    title="Unlikelihood",
)
def unlikelihood(logps: LogProbs, *, alpha: float = 0.5, smallest: float = 1e-5) -> Tensor:
    """-sum_t log p(chosen_t) - alpha sum_t log(1 - p(rejected_t)), token by token.

    Args:
        logps: needs the policy's token log-probs of both replies.
        alpha: weight of the unlikelihood term, in [0, 1].
        smallest: log(1 - p) is taken of at least this, as in the authors' code: a token that is all
            but certain would have an unbounded gradient. It has none beyond.

    Returns:
        [P] loss per pair, nats.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie in (0, 1), got {smallest}")
    token_logps = logps.need("token_logps")
    # Clamped before the logarithm, for log1mexp has no finite gradient at log p = 0.
    unlikely = -log1mexp(token_logps.clamp(max=math.log1p(-smallest)))
    _, rejected = logps.sum_per_sequence(unlikely)
    return -logps.chosen + alpha * rejected


@register_loss(
    "log_ratio",
    reference=False,
    paper="arXiv 2305.18290, section 6 and appendix (naive objective)",
    title="Log-ratio (DPO without its weight)",
)
def log_ratio(logps: LogProbs, *, alpha: float = 1.0) -> Tensor:
    """-log pi(chosen) + alpha log pi(rejected): DPO's gradient without its dynamic weight.

    It has no lower bound and degenerates, as the paper shows; it is here to be compared with.

    Args:
        logps: needs both replies under the policy.
        alpha: weight of the rejected reply, in [0, 1].

    Returns:
        [P] loss per pair, nats.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    rejected: torch.Tensor = logps.need("rejected")
    return -logps.chosen + alpha * rejected
