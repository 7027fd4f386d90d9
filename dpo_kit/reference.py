"""The frozen reference: log-probs of a micro-batch's sequences under a model that is not trained."""

from __future__ import annotations

import copy
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dpo_kit.errors import InputError
from dpo_kit.models import disable_dropout
from dpo_kit.packing import MicroBatch
from dpo_kit.scoring import sequence_logprobs

ReferenceMode = Literal["auto", "live", "none"]


class Reference(Protocol):
    """Where the log-probs of the reference come from.

    Attributes:
        is_policy: whether the reference is the policy as it was before the first step, so that every
            margin must be zero there.
        model: the model that is held in memory, if any.
    """

    is_policy: bool
    model: nn.Module | None

    def logprobs(self, batch: MicroBatch) -> Tensor | None:
        """[S] summed log-probs of the batch's sequences, without gradient; None without a reference."""


class NoReference:
    """For objectives that look at the policy alone."""

    is_policy = False
    model: nn.Module | None = None

    def logprobs(self, batch: MicroBatch) -> None:
        """There are none."""


class LiveReference:
    """A second model in memory, frozen, scored beside the policy on the same micro-batches.

    Args:
        model: the model; it is frozen and put into eval mode in place.
        is_policy: whether it has the weights that the policy starts from.
    """

    def __init__(self, model: nn.Module, *, is_policy: bool) -> None:
        disable_dropout(model)
        self.model: nn.Module | None = model.eval().requires_grad_(False)
        self.is_policy = is_policy

    @classmethod
    def copy_of(cls, policy: nn.Module) -> LiveReference:
        """A frozen copy of the policy as it stands now."""
        return cls(copy.deepcopy(policy), is_policy=True)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """One forward pass of the reference."""
        assert self.model is not None
        return sequence_logprobs(self.model, batch).sequences


def make_reference(
    mode: str, policy: nn.Module, *, needed: bool, given: nn.Module | Reference | None = None
) -> Reference:
    """The reference that a run asks for.

    Args:
        mode: "live", "none", or "auto": live where the objective needs one, none otherwise.
        policy: what a live reference is a copy of, where no model is given.
        needed: whether the objective looks at a reference.
        given: a model, or a reference, of one's own.

    Raises:
        InputError: unknown mode, or "none" for an objective that needs a reference.
    """
    if mode not in ("auto", "live", "none"):
        raise InputError(
            f"unknown reference mode '{mode}'", field="reference.mode", mend="Known: auto, live, none."
        )
    if mode == "none" and needed:
        raise InputError(
            "the loss compares with a reference, and there is none",
            field="reference.mode",
            mend="Set it to auto or live, or choose a loss that needs no reference.",
        )
    if mode == "none" or (mode == "auto" and not needed):
        return NoReference()
    if isinstance(given, nn.Module):
        return LiveReference(given, is_policy=False)
    if given is not None:
        return given
    return LiveReference.copy_of(policy)
