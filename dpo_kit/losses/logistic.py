"""DPO: logistic regression on the difference of log-ratios.

Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss("dpo", paper="arXiv 2305.18290, equation 7")
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
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], got {label_smoothing}")
    margin = beta * (logps.chosen_logratios - logps.rejected_logratios)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-margin)
    return loss
