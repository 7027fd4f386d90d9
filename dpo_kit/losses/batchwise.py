"""Losses that couple the pairs of a step: AOT, which compares distributions, and beta-DPO.

Here m is the margin log-ratio(chosen) - log-ratio(rejected), and a log-ratio is log pi(y) - log pi_ref(y).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import logratio_margin, require_at_least_zero, require_momentum, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "aot",
    title="AOT (paired)",
    paper="Melnyk et al. 2024, arXiv 2406.05882, section 3",
    incumbents=("TRL aot",),
    batch=True,
)
def aot(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (a_(i) - b_(i))), a and b sorted over the step's pairs.

    a = log pi(chosen) - log pi(rejected) under the policy, b the same under the reference; the quantiles of
    the one are to lie above those of the other. With one pair it is `dpo`.

    Args:
        logps: needs both replies under policy and reference, of the whole step.
        beta: strength of the KL constraint, positive; TRL's default, as the paper leaves it open.

    Returns:
        [P] loss, nats, each at the pair that a_(i) is of.
    """
    require_positive(beta=beta)
    policy = logps.chosen - logps.rejected
    reference = logps.reference_chosen - logps.reference_rejected
    return -F.logsigmoid(beta * (policy - _same_rank(reference, policy)))


@register_loss(
    "aot_unpaired",
    title="AOT (unpaired)",
    paper="Melnyk et al. 2024, arXiv 2406.05882, section 3",
    incumbents=("TRL aot_unpaired",),
    batch=True,
)
def aot_unpaired(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (a_(i) - b_(i))), a and b sorted over the step's pairs.

    a are the log-ratios of the chosen and b those of the rejected replies, so which reply belongs to which
    does not matter; there are as many of each. With one pair it is `dpo`.

    Args:
        logps: needs both replies under policy and reference, of the whole step.
        beta: strength of the KL constraint, positive; TRL's default, as the paper leaves it open.

    Returns:
        [P] loss, nats, each at the pair that a_(i) is of.
    """
    require_positive(beta=beta)
    chosen = logps.chosen_logratios
    return -F.logsigmoid(beta * (chosen - _same_rank(logps.rejected_logratios, chosen)))


def _same_rank(values: Tensor, like: Tensor) -> Tensor:
    """[P] the element of `values` that has the rank, from the smallest, that each of `like` has in `like`."""
    # Stable, so that equal values are matched in the order of the data on every device.
    rank = like.detach().argsort(stable=True).argsort()
    return values.sort(stable=True).values[rank]


def _mean_margin(logps: LogProbs, **_: object) -> Tensor:
    """[] the step's mean margin of the log-ratios."""
    return logratio_margin(logps).mean()


@register_loss(
    "beta_dpo",
    title="beta-DPO (dynamic beta)",
    paper="Wu et al. 2024, arXiv 2407.08639, its batch-level beta",
    running=_mean_margin,
)
def beta_dpo(
    logps: LogProbs,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    smallest_beta: float = 1e-3,
) -> Tensor:
    """-log sigmoid(b m), b = beta (1 + alpha (M - M0)), one b for the whole step.

    M is the step's mean of beta m and M0 its running mean; no gradient flows through b. Left out is the
    paper's data filtering, which draws 80 % of a batch by how near beta m is to M0: every pair counts here,
    in M too. The authors' code takes M without its factor beta, and starts M0 at 0; here it starts at the
    first step's M.

    Args:
        logps: needs both replies under policy and reference, of the whole step, and `running`.
        beta: beta_0, positive.
        alpha: how much b follows M, at least 0. M has its factor beta here, as in the paper's formula; in
            the authors' code it has not, so that alpha 6 at beta 0.1 reproduces their 0.6.
        momentum: weight of the past in M0, in [0, 1).
        smallest_beta: b is at least this, as in the authors' code; in (0, beta].

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(alpha=alpha)
    require_momentum(momentum)
    if not 0 < smallest_beta <= beta:
        raise ValueError(f"smallest_beta must lie in (0, beta], got {smallest_beta} with beta {beta}")
    margin = logratio_margin(logps)
    excess = beta * (margin.detach().mean() - logps.need("running"))
    dynamic = (beta * (1 + alpha * excess)).clamp(min=smallest_beta)
    return -F.logsigmoid(dynamic * margin)
