"""Other functions of DPO's margin than the logistic one: hinge, EXO and DiscoPOP.

Here m is the margin log-ratio(chosen) - log-ratio(rejected), and a log-ratio is log pi(y) - log pi_ref(y).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import bernoulli_kl, logratio_margin, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "hinge",
    title="Hinge (SLiC-HF, RSO)",
    paper="Liu et al. 2023 (RSO), arXiv 2309.06657, hinge-norm; Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425",
    incumbents=("TRL hinge", "LLaMA-Factory hinge"),
)
def hinge(logps: LogProbs, *, beta: float = 0.05) -> Tensor:
    """max(0, 1 - beta m): RSO's hinge-norm, that is SLiC-HF's loss on log-ratios instead of log-probs.

    SLiC-HF's regulariser towards the fine-tuned model is a term of its own: add `sft` to the objective.

    Args:
        logps: needs both replies under policy and reference.
        beta: RSO's gamma, positive; the margin that is asked for is 1 / beta nats (TRL: 0.1).

    Returns:
        [P] loss per pair.
    """
    require_positive(beta=beta)
    return torch.relu(1 - beta * logratio_margin(logps))


@register_loss(
    "exo",
    title="EXO-pref",
    paper="Ji et al. 2024, arXiv 2402.00856, equation 16",
    incumbents=("TRL exo_pair",),
)
def exo(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL(p || q) of p = (sigmoid(beta m), sigmoid(-beta m)) from the labels' q = (1 - e, e).

    The reverse of the KL that DPO with label smoothing minimises.

    Args:
        logps: needs both replies under policy and reference.
        beta: beta_pi, positive.
        label_smoothing: e, in (0, 0.5]; at 0 the divergence is infinite (TRL's default, which it refuses).

    Returns:
        [P] KL divergence per pair, nats.
    """
    require_positive(beta=beta)
    if not 0 < label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in (0, 0.5], got {label_smoothing}")
    margin = beta * logratio_margin(logps)
    label = math.log1p(-label_smoothing) - math.log(label_smoothing)
    return bernoulli_kl(margin, torch.full_like(margin, label))


@register_loss(
    "discopop",
    title="DiscoPOP (log-ratio modulated loss)",
    paper="Lu et al. 2024, arXiv 2406.08414, equation 5",
    incumbents=("TRL discopop",),
)
def discopop(logps: LogProbs, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """-(1 - s) log sigmoid(u) + s exp(-u), with u = beta m and s = sigmoid(u / tau).

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive (TRL: 0.1).
        tau: temperature of the blend, in (0, 1]; above 1 the loss grows exponentially in -u.

    Returns:
        [P] loss per pair.
    """
    require_positive(beta=beta)
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")
    margin = beta * logratio_margin(logps)
    logistic = -torch.sigmoid(-margin / tau) * F.logsigmoid(margin)
    # In one exponent, for exp(-u) alone overflows where s makes up for it.
    exponential = torch.exp(F.logsigmoid(margin / tau) - margin)
    return logistic + exponential
