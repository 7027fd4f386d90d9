"""Losses by name, with what each of them looks at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_kit.errors import InputError, nearest
from dpo_kit.losses.inputs import Shape

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    Attributes:
        name: as recipes write it.
        function: (LogProbs, **hyper-parameters) -> one value per example, or per reply where `shape` is
            "unpaired".
        shape: what it compares: "pairs", "unpaired" replies, each with a label, or ranked "lists". Losses on
            the last two take pairs as well.
        reference: whether it looks at the reference's log-probs.
        rejected: whether it looks at the rejected replies.
        paper: where it is defined.
        title: what its authors call it.
        incumbents: what it is called elsewhere, such as "TRL sigmoid".
        extras: statistics of the policy's token distributions that it looks at, see
            `dpo_kit.logprob.token_logprobs`; "reference_kl" needs the reference in memory.
        reference_tokens: whether it looks at the reference's log-prob of each token.
        rewards: whether it trains a reward model's value head, and looks at its rewards alone.
        batch: whether an example's loss depends on the step's others. Such a step is scored whole, over all
            micro-batches and ranks, before its gradient is computed; so the cut changes nothing here either.
        mismatched: whether it looks at the log-ratios of replies to other prompts (KTO's estimate of the KL).
        running: (LogProbs, **hyper-parameters) -> [], a statistic of the step of which the loss gets the
            running mean, with its hyper-parameter `momentum` as the weight of the past.
        per_token: whether it compares log-probs (or log-ratios) per token, so that its implicit reward is
            beta times their mean over a reply's tokens and not their sum.
        margins: whether it looks at the data's margins, or the name of the hyper-parameter that says so.
        check_scores: raises ValueError for the scores of an example that it cannot learn from; called for
            each ranked list before training.
    """

    name: str
    function: LossFunction
    shape: Shape
    reference: bool
    rejected: bool
    paper: str
    title: str
    incumbents: tuple[str, ...]
    extras: tuple[str, ...]
    reference_tokens: bool
    rewards: bool
    batch: bool
    mismatched: bool
    running: LossFunction | None
    per_token: bool
    margins: bool | str
    check_scores: Callable[[Sequence[float]], None] | None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Keyword arguments of the function and their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def family(self) -> str:
        """The module that it is defined in."""
        return self.function.__module__.rpartition(".")[2]


_LOSSES: dict[str, LossSpec] = {}


def register_loss(
    name: str,
    *,
    shape: Shape = "pairs",
    reference: bool = True,
    rejected: bool = True,
    paper: str = "",
    title: str = "",
    incumbents: Sequence[str] = (),
    extras: Sequence[str] = (),
    reference_tokens: bool = False,
    rewards: bool = False,
    batch: bool = False,
    mismatched: bool = False,
    running: LossFunction | None = None,
    per_token: bool = False,
    margins: bool | str = False,
    check_scores: Callable[[Sequence[float]], None] | None = None,
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: make a loss known by name.

    The function takes `LogProbs` and keyword-only hyper-parameters with defaults, and returns one
    value per pair, [P]; it should raise ValueError for a hyper-parameter out of range. What the arguments
    mean stands at `LossSpec`; what is not asked for is not computed.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: LossFunction) -> LossFunction:
        known = _LOSSES.get(name)
        if known is not None and _place(known.function) != _place(function):
            raise ValueError(f"a loss named '{name}' is registered already")
        parameters = list(inspect.signature(function).parameters.values())
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
            raise ValueError(f"name the hyper-parameters of '{name}' one by one, so that they can be checked")
        _LOSSES[name] = LossSpec(
            name=name,
            function=function,
            shape=shape,
            reference=reference,
            rejected=rejected,
            paper=paper,
            title=title or name,
            incumbents=tuple(incumbents),
            extras=tuple(extras),
            reference_tokens=reference_tokens,
            rewards=rewards,
            batch=batch or mismatched or running is not None,
            mismatched=mismatched,
            running=running,
            per_token=per_token,
            margins=margins,
            check_scores=check_scores,
        )
        return function

    return register


def _place(function: LossFunction) -> tuple[str, str]:
    """Where a function is defined; a notebook cell that is run again defines it at the same place."""
    return function.__module__, function.__qualname__


def loss_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_LOSSES)


def get_loss(name: str) -> LossSpec:
    """A registered loss.

    Raises:
        InputError: no such name; the nearest is named.
    """
    if name not in _LOSSES:
        raise InputError(f"unknown loss '{name}'", field="loss.name", mend=nearest(name, loss_names()))
    return _LOSSES[name]
