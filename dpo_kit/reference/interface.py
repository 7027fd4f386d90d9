"""What every reference offers to the trainer, and the one that offers nothing."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from dpo_kit.errors import InputError
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


class GivenReference:
    """A reference of the user's, checked to be what `Reference` says.

    Raises:
        InputError: a part of the protocol is missing.
    """

    def __init__(self, given: Any) -> None:
        parts = ("is_policy", "model", "needs_keys", "logprobs", "head_inputs")
        if missing := [name for name in parts if not hasattr(given, name)]:
            raise _no_reference(f"{type(given).__name__} has no {', '.join(missing)}")
        self.given = given
        self.is_policy: bool = given.is_policy
        self.model: nn.Module | None = given.model
        self.needs_keys: bool = given.needs_keys

    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """What it gives.

        Raises:
            InputError: that is no `SequenceLogProbs`.
        """
        found = self.given.logprobs(batch)
        if not isinstance(found, SequenceLogProbs):
            raise _no_reference(f"logprobs of {type(self.given).__name__} gave a {type(found).__name__}")
        return found

    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """What it gives."""
        return self.given.head_inputs(batch)


def _no_reference(problem: str) -> InputError:
    return InputError(
        problem,
        field="ref_model",
        mend="Give a model, or an object as dpo_kit.reference.Reference describes: is_policy, model, "
        "needs_keys, logprobs(batch) -> dpo_kit.scoring.SequenceLogProbs, and head_inputs(batch).",
    )


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
