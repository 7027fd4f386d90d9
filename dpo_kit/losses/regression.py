"""Regression of log-ratios on a target: IPO, SPPO, Cal-DPO and reward-aware DPO.

A log-ratio is log pi(y) - log pi_ref(y). The targets are finite, so the policy does not run away from the
reference where the labels are certain.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import bernoulli_kl, logratio_margin, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "ipo",
    title="IPO (length-normalised)",
    paper="Azar et al. 2023, arXiv 2310.12036, equation 17, per token",
    incumbents=("TRL ipo", "LLaMA-Factory ipo"),
    per_token=True,
)
def ipo(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """(log-ratio(chosen) / |chosen| - log-ratio(rejected) / |rejected| - 1 / (2 beta))^2.

    The paper writes sums; its authors confirmed that they average over tokens. `ipo_raw` is the sums.

    Args:
        logps: needs both replies under policy and reference, and their lengths.
        beta: the paper's tau, positive; it tries 0.1, 0.5 and 1.

    Returns:
        [P] squared error per pair.
    """
    require_positive(beta=beta)
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)).square()


@register_loss(
    "ipo_raw",
    title="IPO (sums)",
    paper="Azar et al. 2023, arXiv 2310.12036, equation 17",
    incumbents=("NeMo-Aligner ipo",),
)
def ipo_raw(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """(log-ratio(chosen) - log-ratio(rejected) - 1 / (2 beta))^2, as the paper writes it.

    Args:
        logps: needs both replies under policy and reference.
        beta: the paper's tau, positive; it tries 0.1, 0.5 and 1.

    Returns:
        [P] squared error per pair, nats^2.
    """
    require_positive(beta=beta)
    return (logratio_margin(logps) - 1 / (2 * beta)).square()


@register_loss(
    "sppo",
    title="SPPO (hard labels)",
    paper="Wu et al. 2024, arXiv 2405.00675, equation 4.7 with P = 1 and 0",
    incumbents=("TRL sppo_hard",),
)
def sppo(logps: LogProbs, *, beta: float = 1e-3) -> Tensor:
    """(log-ratio(chosen) - 1 / (2 beta))^2 + (log-ratio(rejected) + 1 / (2 beta))^2.

    The paper estimates the probability of winning against the policy by sampling; here the chosen reply wins
    with probability 1 and the rejected one with 0.

    Args:
        logps: needs both replies under policy and reference.
        beta: 1 / eta of the paper, positive; the paper has eta = 1000 (TRL: beta 0.1).

    Returns:
        [P] sum of the two squared errors per pair, nats^2.
    """
    require_positive(beta=beta)
    target = 1 / (2 * beta)
    return (logps.chosen_logratios - target).square() + (logps.rejected_logratios + target).square()


@register_loss("cal_dpo", title="Cal-DPO", paper="Xiao et al. 2024, arXiv 2412.14516")
def cal_dpo(logps: LogProbs, *, beta: float = 0.002) -> Tensor:
    """-log sigmoid(m) + (log-ratio(chosen) - 1 / (2 beta))^2 + (log-ratio(rejected) + 1 / (2 beta))^2.

    m = log-ratio(chosen) - log-ratio(rejected): the paper's logistic term carries no beta.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive; the default is that of the authors' recipe.

    Returns:
        [P] loss per pair.
    """
    require_positive(beta=beta)
    return sppo(logps, beta=beta) - F.logsigmoid(logratio_margin(logps))


@register_loss(
    "reward_aware_dpo",
    title="Reward-aware preference optimisation",
    paper="Nemotron-4 340B technical report 2024, arXiv 2406.11704",
    incumbents=("NeMo-Aligner rpo_bwd_kl, rpo_fwd_kl, rpo_sq",),
    margins=True,
)
def reward_aware_dpo(
    logps: LogProbs, *, beta: float = 0.1, scale: float = 1.0, distance: str = "backward_kl"
) -> Tensor:
    """D(beta m, scale (score(chosen) - score(rejected))): implicit margins on the scale of given scores.

    m = log-ratio(chosen) - log-ratio(rejected). With p = sigmoid(beta m) and q the sigmoid of the target, D
    is KL(q || p) for "backward_kl" (the report's), KL(p || q) for "forward_kl", both of Bernoulli variables,
    and the squared difference of the two margins for "squared" (names as in NeMo-Aligner).

    Args:
        logps: needs both replies under policy and reference, and the data's score `margins`. A pair whose
            margin is 0 (also: that has none, where others have) counts as a tie.
        beta: strength of the KL constraint, positive; the report tunes it.
        scale: the report's eta, positive.
        distance: "backward_kl", "forward_kl" or "squared".

    Returns:
        [P] loss per pair, nats (squared: nats^2).
    """
    require_positive(beta=beta, scale=scale)
    margin = beta * logratio_margin(logps)
    target = scale * logps.need("margins").to(margin.dtype)
    if distance == "backward_kl":
        return bernoulli_kl(target, margin)
    if distance == "forward_kl":
        return bernoulli_kl(margin, target)
    if distance == "squared":
        return (margin - target).square()
    raise ValueError(f"distance must be 'backward_kl', 'forward_kl' or 'squared', got {distance!r}")
