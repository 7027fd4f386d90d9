"""What training is watched by, from log-probs alone: no extra forward pass.

Values are per pair; averages are weighted sums over pairs, so that they do not depend on how a step
was cut into micro-batches or dealt to ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_kit.losses import LogProbs


def pair_metrics(logps: LogProbs, losses: Tensor, beta: float) -> dict[str, Tensor]:
    """Metrics of each pair.

    The implicit reward is beta * log(pi / pi_ref) (arXiv 2305.18290, equation 5 without the partition
    function), and beta * log pi where there is no reference. The accuracy counts a tie as one half:
    a coin would be right as often.

    Args:
        logps: of P pairs.
        losses: [P] loss of each.
        beta: factor of the implicit reward.

    Returns:
        name -> [P] detached fp32 values. Without rejected replies: loss and logps/chosen alone.
    """
    metrics = {"loss": losses, "logps/chosen": logps.chosen}
    if logps.shape == "pairs":
        chosen, rejected = logps.chosen, logps.rejected
        if logps.reference is not None:
            chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
        margins = beta * (chosen - rejected)
        metrics |= {
            "logps/rejected": logps.rejected,
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/margins": margins,
            "rewards/accuracies": torch.heaviside(margins.detach(), margins.new_tensor(0.5)),
        }
    return {name: value.detach().float() for name, value in metrics.items()}


class WeightedMeans:
    """Running weighted means by name, in fp64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weights: Tensor) -> None:
        """Take in [P] values by name with their [P] weights; stays on their device without waiting."""
        weights = weights.double()
        for name, value in values.items():
            total = (value.double() * weights).sum()
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._weights[name] = self._weights.get(name, 0.0) + weights.sum()

    def state(self) -> tuple[list[str], Tensor]:
        """Names and a [2, names] tensor of sums and weights, to be added up over ranks."""
        names = sorted(self._sums)
        if not names:
            return [], torch.zeros(2, 0, dtype=torch.float64)
        stacks = [torch.stack([kept[name] for name in names]) for kept in (self._sums, self._weights)]
        return names, torch.stack(stacks)

    @staticmethod
    def means(names: list[str], state: Tensor) -> dict[str, float]:
        """The means of a (summed) state; 0 where all weights are 0."""
        sums, weights = state.tolist()
        return {n: s / w if w else 0.0 for n, s, w in zip(names, sums, weights, strict=True)}
