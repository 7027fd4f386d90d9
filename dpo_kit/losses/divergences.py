"""f-DPO: DPO with another divergence from the reference than the reverse KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


@register_loss(
    "f_dpo",
    title="f-DPO",
    paper="Wang et al. 2023, arXiv 2309.16240, table 1",
    incumbents=("TRL f_divergence_type",),
)
def f_dpo(
    logps: LogProbs,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    largest_exponent: float = 30.0,
) -> Tensor:
    """-log sigmoid(beta f'(u(chosen)) - beta f'(u(rejected))), u = pi(y) / pi_ref(y).

    f'(u), up to a constant that cancels, is log u for "reverse_kl" (which is `dpo`), -1 / u for "forward_kl",
    log(u / (1 + u)) for "js" (Jensen-Shannon) and (1 - u^-alpha) / alpha for "alpha". The second and the
    fourth grow exponentially as u falls, and with them the loss and its gradient.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the divergence's constraint, positive.
        divergence: one of `DIVERGENCES`.
        alpha: of the alpha-divergence, in (0, 1), as in the paper: towards 0 it is the reverse KL, towards 1
            the forward KL. TRL's f_alpha_divergence_coef is 1 - alpha.
        largest_exponent: in (0, 60]. For "forward_kl" and "alpha", f' goes on along its tangent where
            -log u (times alpha) exceeds it, so that neither loss nor gradient overflows. (TRL cuts the
            alpha-divergence off at 80, where the gradient ends, and lets the forward KL overflow.)

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if not 0 < largest_exponent <= 60:
        raise ValueError(f"largest_exponent must lie in (0, 60], got {largest_exponent}")

    def slope(logratios: Tensor) -> Tensor:
        if divergence == "reverse_kl":
            return logratios
        if divergence == "js":
            return F.logsigmoid(logratios)
        return _power_slope(logratios, 1.0 if divergence == "forward_kl" else alpha, largest_exponent)

    return -F.logsigmoid(beta * (slope(logps.chosen_logratios) - slope(logps.rejected_logratios)))


def _power_slope(logratios: Tensor, alpha: float, largest: float) -> Tensor:
    """[P] (1 - exp(-alpha x)) / alpha of log-ratios x, along its tangent where -alpha x > largest."""
    exponent = -alpha * logratios
    bounded = exponent.clamp(max=largest)
    return -(torch.expm1(bounded) + torch.exp(bounded) * (exponent - bounded)) / alpha
