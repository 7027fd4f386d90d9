"""What several losses share: the margin, a divergence, and checks of hyper-parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.inputs import LogProbs


def logratio_margin(logps: LogProbs) -> Tensor:
    """[P] log-ratio(chosen) - log-ratio(rejected), nats; beta times it is DPO's implicit reward margin."""
    return logps.chosen_logratios - logps.rejected_logratios


def bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """[P] KL(p || q), nats, of p = (sigmoid(x), sigmoid(-x)) from q = (sigmoid(y), sigmoid(-y)); x, y [P]."""
    yes = torch.sigmoid(x) * (F.logsigmoid(x) - F.logsigmoid(y))
    no = torch.sigmoid(-x) * (F.logsigmoid(-x) - F.logsigmoid(-y))
    return yes + no


def require_positive(**values: float) -> None:
    """Raise ValueError for the first that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def require_at_least_zero(**values: float) -> None:
    """Raise ValueError for the first that is negative."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def require_momentum(momentum: float) -> None:
    """Raise ValueError for a weight of the past outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
