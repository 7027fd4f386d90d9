"""What every reference offers to the trainer, and the one that offers nothing."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from dpo_kit.logprob import HeadInputs
from dpo_kit.packing import MicroBatch
from dpo_kit.scoring import SequenceLogProbs


class Reference(Protocol):
    """Where the log-probs of the reference come from.

    Attributes:
        is_policy: whether the reference is the policy as it was before the first step, so that every
            margin must be zero there.
        model: the model that is held in memory apart from the policy, if any.
        needs_keys: whether micro-batches must carry their `keys`.
    """

    is_policy: bool
    model: nn.Module | None
    needs_keys: bool

    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs | None:
        """Log-probs of the batch's sequences, without gradient; None without a reference."""

    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """What the output head multiplies, see `dpo_kit.scoring.head_inputs`, of a forward pass.

        Raises:
            TypeError: there is no forward pass.
        """


class NoReference:
    """For objectives that look at the policy alone."""

    is_policy = False
    needs_keys = False
    model: nn.Module | None = None

    def logprobs(self, batch: MicroBatch) -> None:
        """There are none."""

    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """There are none."""
        raise TypeError("without a reference there is nothing that its head multiplies")
