"""DPO with a term more: R-DPO, ODPO, DPO-positive and RPO.

Here m is the margin log-ratio(chosen) - log-ratio(rejected), and a log-ratio is log pi(y) - log pi_ref(y).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import logratio_margin, require_at_least_zero, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "r_dpo",
    title="R-DPO (length-regularised DPO)",
    paper="Park et al. 2024, arXiv 2403.19159",
)
def r_dpo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """-log sigmoid(beta m + alpha (|chosen| - |rejected|)).

    The reward that the policy maximises is the implicit one less alpha per token: what the chosen reply's
    length explains of the preference, the log-ratios need not.

    Args:
        logps: needs both replies under policy and reference, and their lengths.
        beta: strength of the KL constraint, positive.
        alpha: penalty per token, at least 0. The paper varies it by data set.

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(alpha=alpha)
    longer = logps.chosen_lengths - logps.rejected_lengths
    return -F.logsigmoid(beta * logratio_margin(logps) + alpha * longer)


@register_loss(
    "odpo",
    title="ODPO (DPO with an offset)",
    paper="Amini et al. 2024, arXiv 2402.10571",
    margins=True,
)
def odpo(logps: LogProbs, *, beta: float = 0.5, alpha: float = 1.0, scaling: str = "log") -> Tensor:
    """-log sigmoid(beta m - alpha f(score(chosen) - score(rejected))).

    Args:
        logps: needs both replies under policy and reference, and the data's score `margins`.
        beta: strength of the KL constraint, positive.
        alpha: weight of the offset, at least 0.
        scaling: f, "log" or "identity". A pair whose margin is not positive has no logarithm (0 also
            says that a row has none): with "log" its offset is 0, which is DPO.

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(alpha=alpha)
    margin = beta * logratio_margin(logps)
    scores = logps.need("margins").to(margin.dtype)
    if scaling == "log":
        scores = torch.where(scores > 0, scores, 1.0).log()
    elif scaling != "identity":
        raise ValueError(f"scaling must be 'log' or 'identity', got {scaling!r}")
    return -F.logsigmoid(margin - alpha * scores)


@register_loss(
    "dpop",
    title="DPO-Positive (Smaug)",
    paper="Pal et al. 2024, arXiv 2402.13228",
)
def dpop(logps: LogProbs, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """-log sigmoid(beta (m - penalty max(0, -log-ratio(chosen)))).

    The penalty keeps the chosen reply from becoming less likely than it is under the reference.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive.
        penalty: the paper's lambda, at least 0.

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(penalty=penalty)
    fallen = torch.relu(-logps.chosen_logratios)
    return -F.logsigmoid(beta * (logratio_margin(logps) - penalty * fallen))


@register_loss(
    "rpo",
    title="RPO (DPO + NLL)",
    paper="Pang et al. 2024 (Iterative RPO), arXiv 2404.19733",
    incumbents=("TRL sigmoid + sft", "LLaMA-Factory pref_ftx", "OpenRLHF nll_loss_coef", "axolotl rpo_alpha"),
)
def rpo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """-log sigmoid(beta m) - alpha log pi(chosen) / |chosen|.

    |chosen| counts the reply's tokens alone, not the prompt's. Each pair's mean is its own, where TRL's
    `sft` takes one mean over all chosen tokens of the batch.

    Args:
        logps: needs both replies under policy and reference, and the chosen one's length.
        beta: strength of the KL constraint, positive.
        alpha: weight of the negative log-likelihood, at least 0.

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    require_at_least_zero(alpha=alpha)
    nll = -logps.chosen / logps.chosen_lengths
    return alpha * nll - F.logsigmoid(beta * logratio_margin(logps))
