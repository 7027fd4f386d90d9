"""Losses that look at each reply by itself, and not only at the difference: NCA, BCO and APO.

r is the implicit reward, beta (log pi(y) - log pi_ref(y)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import logratio_margin, require_momentum, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "nca",
    title="NCA",
    paper="Chen et al. 2024, arXiv 2402.05369, section 4.1 (pairs)",
    incumbents=("TRL nca_pair",),
)
def nca(logps: LogProbs, *, beta: float = 0.01) -> Tensor:
    """-log sigmoid(r(chosen)) - 1/2 log sigmoid(-r(chosen)) - 1/2 log sigmoid(-r(rejected)).

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive (TRL: 0.1).

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _mean_logratio(logps: LogProbs, **_: object) -> Tensor:
    """[] mean log-ratio of the step, chosen and rejected replies weighing the same."""
    return 0.5 * (logps.chosen_logratios + logps.rejected_logratios).mean()


@register_loss(
    "bco_pair",
    title="BCO (pairs)",
    paper="Jung et al. 2024, arXiv 2404.04656, section 4",
    incumbents=("TRL bco_pair (delta = 0)",),
    running=_mean_logratio,
)
def bco_pair(logps: LogProbs, *, beta: float = 0.01, momentum: float = 0.9) -> Tensor:
    """-log sigmoid(r(chosen) - d) - log sigmoid(-(r(rejected) - d)).

    The reward shift d is the running mean of (E r(chosen) + E r(rejected)) / 2; no gradient flows through it.

    Args:
        logps: needs both replies under policy and reference, and `running`.
        beta: strength of the KL constraint, positive (TRL: 0.1).
        momentum: weight of the past in d, in [0, 1); 0 takes each step's own mean. The default is ours.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_momentum(momentum)
    shift = logps.need("running")
    chosen, rejected = beta * (logps.chosen_logratios - shift), beta * (logps.rejected_logratios - shift)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@register_loss(
    "apo_zero",
    title="APO-zero",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7",
    incumbents=("TRL apo_zero",),
)
def apo_zero(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """-sigmoid(r(chosen)) + sigmoid(r(rejected)): chosen up, rejected down.

    For chosen replies that are better than the model's own. TRL adds the constant 1.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive.

    Returns:
        [P] loss per pair, in (-1, 1).
    """
    require_positive(beta=beta)
    return torch.sigmoid(beta * logps.rejected_logratios) - torch.sigmoid(beta * logps.chosen_logratios)


@register_loss(
    "apo_down",
    title="APO-down",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8",
    incumbents=("TRL apo_down",),
)
def apo_down(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """sigmoid(r(chosen)) - sigmoid(r(chosen) - r(rejected)): both down, the rejected reply more.

    For chosen replies that are worse than the model's own. TRL adds the constant 1.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive.

    Returns:
        [P] loss per pair, in (-1, 1).
    """
    require_positive(beta=beta)
    return torch.sigmoid(beta * logps.chosen_logratios) - torch.sigmoid(beta * logratio_margin(logps))
