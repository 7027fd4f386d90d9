"""Relatives of DPO that look at single tokens: their places, their distributions, their divergence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import logratio_margin, require_at_least_zero, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "wpo",
    extras=("squared_probs",),
    paper="Zhou et al. 2024, arXiv 2406.11827, section 3",
    title="WPO",
    incumbents=("TRL sigmoid with use_weighting",),
)
def wpo(logps: LogProbs, *, beta: float = 0.01) -> Tensor:
    """-w log sigmoid(beta m), m the difference of log-ratios: DPO on pairs weighted as if drawn on policy.

    w = min(1, w(chosen) w(rejected)), without gradient; w(reply) is the geometric mean over its tokens of
    p(token) / sum of p^2 over the vocabulary, which is 1 on average for tokens that the policy draws
    (the paper's sampled alignment). The cap at 1 is the authors' code's; TRL has none.

    Args:
        logps: needs both replies under policy and reference, the policy's token log-probs and the extra
            "squared_probs".
        beta: strength of the KL constraint, positive; 0.01 in the paper, 0.1 in TRL.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    aligned = logps.need("token_logps").detach() - logps.extra("squared_probs").detach().log()
    chosen, rejected = logps.halves(logps.sum_per_reply(aligned) / logps.need("lengths"))
    weight = (chosen + rejected).clamp(max=0).exp()
    return -weight * F.logsigmoid(beta * logratio_margin(logps))


@register_loss(
    "ld_dpo",
    reference_tokens=True,
    paper="Liu et al. 2024, arXiv 2409.06411",
    title="LD-DPO",
    incumbents=("TRL sigmoid with ld_alpha", "LLaMA-Factory LD-DPO", "ms-swift ld_alpha"),
)
def ld_dpo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """DPO with tokens beyond the shorter reply's length counted alpha times, under policy and reference.

    Args:
        logps: needs both replies' token log-probs under policy and reference, and their lengths.
        beta: strength of the KL constraint, positive.
        alpha: weight of the longer reply's surplus tokens, in [0, 1]; at 1 this is DPO. The paper tunes it
            by model, so the default is ours; TRL has none.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    shared = torch.minimum(logps.chosen_lengths, logps.rejected_lengths)
    surplus = logps.token_places >= shared[logps.example][logps.need("token_sequence")]
    logratios = logps.need("token_logps") - logps.need("reference_token_logps")
    chosen, rejected = logps.sum_per_sequence(torch.where(surplus, alpha * logratios, logratios))
    return -F.logsigmoid(beta * (chosen - rejected))


@register_loss(
    "tdpo1",
    extras=("reference_kl",),
    paper="Zeng et al. 2024, arXiv 2404.11999, section 4",
    title="TDPO1",
)
def tdpo1(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (m - (D(rejected) - D(chosen)))), m the difference of log-ratios.

    D(reply) is the sum over its tokens of KL(reference || policy) of their distributions (the paper's
    sequential KL); its gradient counts on both sides.

    Args:
        logps: needs both replies under policy and reference, and the extra "reference_kl".
        beta: strength of the KL constraint, positive.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    chosen, rejected = logps.sum_per_sequence(logps.extra("reference_kl"))
    return -F.logsigmoid(beta * (logratio_margin(logps) - (rejected - chosen)))


@register_loss(
    "tdpo2",
    extras=("reference_kl",),
    paper="Zeng et al. 2024, arXiv 2404.11999, section 4",
    title="TDPO2",
)
def tdpo2(logps: LogProbs, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """-log sigmoid(beta (m - alpha (D(rejected) - sg D(chosen)))), m the difference of log-ratios.

    D as in TDPO1; sg stops the gradient, so that the chosen replies' divergence is compared with and not
    itself driven up.

    Args:
        logps: needs both replies under policy and reference, and the extra "reference_kl".
        beta: strength of the KL constraint, positive.
        alpha: weight of the divergences, at least 0; at 0 this is DPO.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(alpha=alpha)
    chosen, rejected = logps.sum_per_sequence(logps.extra("reference_kl"))
    return -F.logsigmoid(beta * (logratio_margin(logps) - alpha * (rejected - chosen.detach())))
