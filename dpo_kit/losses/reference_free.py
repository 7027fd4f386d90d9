"""Objectives on pairs that need no reference: the policy's own likelihoods, compared.

Those without a comparison (supervised fine-tuning and its kin) stand in `likelihood`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_at_least_zero, require_positive
from dpo_kit.losses.inputs import LogProbs, log1mexp
from dpo_kit.losses.registry import register_loss


def _mean_logps(logps: LogProbs) -> tuple[Tensor, Tensor]:
    """[P] log-prob per token of the chosen and of the rejected replies, nats."""
    return logps.chosen / logps.chosen_lengths, logps.rejected / logps.rejected_lengths


@register_loss(
    "simpo",
    reference=False,
    paper="Meng et al. 2024, arXiv 2405.14734, equation 6",
    title="SimPO",
    per_token=True,
    incumbents=("TRL CPOTrainer simpo", "LLaMA-Factory simpo", "axolotl simpo"),
)
def simpo(logps: LogProbs, *, beta: float = 2.5, gamma: float = 1.4) -> Tensor:
    """-log sigmoid(beta m - gamma), m the difference of log-probs per token.

    Args:
        logps: needs both replies and their lengths under the policy.
        beta: scale of the reward, positive; 2 to 2.5 in the paper (2.5 for Llama-3-Instruct). TRL's
            default is 0.1.
        gamma: the margin asked for, at least 0; 0.3 to 1.6 in the paper (1.4 for Llama-3-Instruct). TRL's
            default is 0.5, to which it adds CPO's likelihood term unless `cpo_alpha` is 0.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(gamma=gamma)
    chosen, rejected = _mean_logps(logps)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register_loss(
    "alphapo",
    reference=False,
    paper="Gupta et al. 2025, arXiv 2501.03884",
    title="AlphaPO",
    per_token=True,
    incumbents=("TRL CPOTrainer simpo with alpha",),
)
def alphapo(
    logps: LogProbs, *, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25, largest: float = 30.0
) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected) - gamma), r = beta (1 - p^-alpha) / alpha.

    p is the geometric mean of a reply's token probabilities; at alpha = 0, r = beta log p and this is
    SimPO. A positive alpha makes unlikely replies count more, a negative one likely replies.

    Args:
        logps: needs both replies and their lengths under the policy.
        beta: scale of the reward, positive. This and the next two default to the paper's setting for
            Mistral-Instruct; TRL's defaults are 0.1, 0.5 and 0.
        gamma: the margin asked for, at least 0.
        alpha: shape of the reward, any number.
        largest: log p^-alpha is taken of at most this, as it is exponentiated: a reply with log p below
            -largest / alpha has no gradient.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(gamma=gamma)
    if not 0 < largest <= 60:
        raise ValueError(f"largest must lie in (0, 60], got {largest}")
    chosen, rejected = _mean_logps(logps)
    if alpha:
        chosen = -torch.expm1((-alpha * chosen).clamp(max=largest)) / alpha
        rejected = -torch.expm1((-alpha * rejected).clamp(max=largest)) / alpha
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register_loss(
    "cpo",
    reference=False,
    paper="Xu et al. 2024, arXiv 2401.08417, section 3",
    title="CPO",
    incumbents=("TRL CPOTrainer sigmoid",),
)
def cpo(
    logps: LogProbs, *, beta: float = 0.1, likelihood_weight: float = 1.0, per_token: bool = False
) -> Tensor:
    """-log sigmoid(beta (log pi(chosen) - log pi(rejected))) - w log pi(chosen).

    Args:
        logps: needs both replies under the policy.
        beta: scale of the log-probs, positive.
        likelihood_weight: w, at least 0; 1 in the paper.
        per_token: divide log pi(chosen) of the second term by the number of the reply's tokens. The paper
            has the sum; TRL the mean over the tokens of a batch's chosen replies.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(likelihood_weight=likelihood_weight)
    likelihood = logps.chosen / logps.chosen_lengths if per_token else logps.chosen
    return -F.logsigmoid(beta * (logps.chosen - logps.rejected)) - likelihood_weight * likelihood


@register_loss(
    "orpo",
    reference=False,
    paper="Hong et al. 2024, arXiv 2403.07691, equations 6 and 7",
    title="ORPO",
    per_token=True,
    incumbents=("TRL ORPOTrainer", "LLaMA-Factory orpo", "axolotl orpo"),
)
def orpo(logps: LogProbs, *, odds_weight: float = 0.1, smallest: float = 1e-5) -> Tensor:
    """-log p(chosen) - w log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p).

    p is the geometric mean of a reply's token probabilities.

    Args:
        logps: needs both replies and their lengths under the policy.
        odds_weight: w, at least 0; the paper's lambda (0.1 for Mistral), TRL's beta. TRL's first
            term is the mean over all tokens of a batch's chosen sequences, prompts among them.
        smallest: 1 - p is taken of at least this, for the odds of a certain reply and their gradient are
            unbounded. They have no gradient beyond.

    Returns:
        [P] loss per pair, nats.
    """
    require_at_least_zero(odds_weight=odds_weight)
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie in (0, 1), got {smallest}")
    means = _mean_logps(logps)
    # Clamped before the logarithm, for log1mexp has no finite gradient at log p = 0.
    chosen, rejected = (mean.clamp(max=math.log1p(-smallest)) for mean in means)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -means[0] - odds_weight * F.logsigmoid(log_odds_ratio)
