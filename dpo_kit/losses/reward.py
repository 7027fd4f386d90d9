"""The objective of a reward model: what its value head says of each reply, no log-probs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_at_least_zero
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "bradley_terry",
    reference=False,
    rewards=True,
    paper="Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: arXiv 2307.09288, equation 2",
    title="Bradley-Terry reward model",
    margins="margin",
    incumbents=("TRL RewardTrainer", "OpenRLHF train_rm", "LLaMA-Factory stage rm"),
)
def bradley_terry(logps: LogProbs, *, margin: bool = False, centring: float = 0.0) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected) - margin) + c (r(chosen) + r(rejected))^2.

    Args:
        logps: needs the rewards of both replies; with `margin` the data's margins as well.
        margin: ask for the data's score difference (Llama 2, arXiv 2307.09288, equation 2; its values are 0
            to 3, or 0 to 1). TRL does so wherever the data have a margin.
        centring: c, at least 0, which fixes the rewards' free constant (Eisenstein et al. 2023,
            arXiv 2312.09244, with c = 0.01).

    Returns:
        [P] loss per pair, nats.
    """
    require_at_least_zero(centring=centring)
    chosen, rejected = logps.halves(logps.need("rewards"))
    difference = chosen - rejected
    if margin:
        difference = difference - logps.need("margins")
    loss = -F.logsigmoid(difference)
    return loss + centring * (chosen + rejected) ** 2 if centring else loss
