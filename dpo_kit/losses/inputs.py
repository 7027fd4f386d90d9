"""What a loss may look at: the log-probs of a micro-batch of pairs under policy and reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """Log-probs (nats) of P pairs; those of the policy carry gradients.

    Attributes:
        chosen: [P] summed log-prob of each chosen completion under the policy.
        rejected: [P] likewise, rejected; None for losses that have no use for it.
        reference_chosen: [P] under the reference; None without a reference.
        reference_rejected: [P] likewise.
        chosen_lengths: [P] completion tokens, int64.
        rejected_lengths: [P] likewise, or None.
        margins: [P] score difference of the data (chosen minus rejected), 0 where it has none.
        token_logps: [M] log-prob of every completion token under the policy, chosen and rejected.
        token_sequence: [M] the sequence of each: p for the chosen reply of pair p, P + p for the rejected.
    """

    chosen: Tensor
    rejected: Tensor | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    margins: Tensor | None = None
    token_logps: Tensor | None = None
    token_sequence: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """A field that the loss cannot do without.

        Raises:
            ValueError: it is None; the message names it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs `{name}`, which is None")
        return value

    @property
    def chosen_logratios(self) -> Tensor:
        """[P] log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen - self.need("reference_chosen")

    @property
    def rejected_logratios(self) -> Tensor:
        """[P] log pi(rejected) - log pi_ref(rejected)."""
        return self.need("rejected") - self.need("reference_rejected")

    def sum_per_sequence(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[M] values per token -> their [P] sums over each chosen and each rejected reply."""
        pairs = len(self.chosen)
        sums = values.new_zeros(2 * pairs).index_add(0, self.need("token_sequence"), values)
        return sums[:pairs], sums[pairs:]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012, equation 7); -inf at 0."""
    near_zero = x > -0.6931471805599453
    # Each branch gets a harmless argument where the other is taken, or its gradient would be NaN.
    small = torch.where(near_zero, x, -1.0)
    large = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
