"""DPO and its nearest relatives: logistic regression on the difference of log-ratios.

Here m is the margin log-ratio(chosen) - log-ratio(rejected), and a log-ratio is log pi(y) - log pi_ref(y).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import logratio_margin, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "dpo",
    title="DPO",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7",
    incumbents=("TRL sigmoid", "OpenRLHF dpo", "LLaMA-Factory sigmoid", "axolotl dpo"),
)
def dpo(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), m = log-ratio(chosen) - log-ratio(rejected).

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive.
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5]; above 0 this is
            conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023, equation 3).

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], got {label_smoothing}")
    margin = beta * logratio_margin(logps)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-margin)
    return loss


@register_loss(
    "cdpo",
    title="Conservative DPO (cDPO)",
    paper="Mitchell 2023, A note on DPO with noisy preferences, equation 3",
    incumbents=("LLaMA-Factory dpo_label_smoothing", "OpenRLHF label_smoothing"),
)
def cdpo(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """`dpo` with label smoothing: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m).

    TRL (1.12 to 1.16) has no such loss: its `sigmoid` passes label_smoothing over.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive.
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5].

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    return dpo(logps, beta=beta, label_smoothing=label_smoothing)


@register_loss(
    "robust_dpo",
    title="Robust DPO (rDPO)",
    paper="Chowdhury et al. 2024, arXiv 2403.00409, section 3.1",
    incumbents=("TRL robust",),
)
def robust_dpo(logps: LogProbs, *, beta: float = 0.01, label_smoothing: float = 0.1) -> Tensor:
    """(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e).

    Its expectation over labels that are flipped with probability e is DPO's loss on the true ones. For a
    large positive margin it falls as -e beta m / (1 - 2 e): it has no lower bound.

    Args:
        logps: needs both replies under policy and reference.
        beta: strength of the KL constraint, positive (TRL: 0.1).
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5) (TRL: 0).

    Returns:
        [P] loss per pair, nats.
    """
    require_positive(beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    margin = beta * logratio_margin(logps)
    kept = (1 - label_smoothing) * F.logsigmoid(margin)
    return (label_smoothing * F.logsigmoid(-margin) - kept) / (1 - 2 * label_smoothing)


@register_loss(
    "dpo_norm",
    title="Length-normalised DPO",
    paper="Lambert et al. 2024 (Tulu 3), arXiv 2411.15124",
    incumbents=("TRL sigmoid_norm", "open-instruct dpo_norm"),
    per_token=True,
)
def dpo_norm(logps: LogProbs, *, beta: float = 5.0) -> Tensor:
    """-log sigmoid(beta (log-ratio(chosen) / |chosen| - log-ratio(rejected) / |rejected|)).

    Args:
        logps: needs both replies under policy and reference, and their lengths.
        beta: strength of the KL constraint per token, positive; far larger than DPO's, as the log-ratios are
            averaged (TRL: 0.1).

    Returns:
        [P] binary cross-entropy per pair, nats.
    """
    require_positive(beta=beta)
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return -F.logsigmoid(beta * (chosen - rejected))
