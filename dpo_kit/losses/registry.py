"""Losses by name, and an objective made from what a recipe says: one loss or a weighted sum."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kit.errors import InputError
from dpo_kit.losses.inputs import LogProbs

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    Attributes:
        name: as recipes write it.
        function: (LogProbs, **hyper-parameters) -> [P].
        reference: whether it looks at the reference's log-probs.
        rejected: whether it looks at the rejected replies.
        paper: where it is defined.
    """

    name: str
    function: LossFunction
    reference: bool
    rejected: bool
    paper: str

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Keyword arguments of the function and their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


_LOSSES: dict[str, LossSpec] = {}


def register_loss(
    name: str, *, reference: bool = True, rejected: bool = True, paper: str = ""
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: make a loss known by name.

    The function takes `LogProbs` and keyword-only hyper-parameters with defaults, and returns one
    value per pair, [P]; it should raise ValueError for a hyper-parameter out of range.

    Args:
        name: must be free.
        reference: False where the loss looks at no reference log-probs: then none are computed.
        rejected: False where it looks at no rejected reply: then none is computed.
        paper: where the loss is defined.

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
        _LOSSES[name] = LossSpec(name, function, reference, rejected, paper)
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
        raise InputError(f"unknown loss '{name}'", field="loss.name", mend=_nearest(name, loss_names()))
    return _LOSSES[name]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses with their hyper-parameters fixed.

    Attributes:
        terms: (loss, weight, hyper-parameters) of each.
    """

    terms: tuple[tuple[LossSpec, float, dict[str, Any]], ...]

    def __call__(self, logps: LogProbs) -> Tensor:
        """[P] loss per pair, nats."""
        values = [weight * spec.function(logps, **options) for spec, weight, options in self.terms]
        return sum(values[1:], start=values[0])

    @property
    def needs_reference(self) -> bool:
        return any(spec.reference for spec, _, _ in self.terms)

    @property
    def needs_rejected(self) -> bool:
        return any(spec.rejected for spec, _, _ in self.terms)

    @property
    def beta(self) -> float:
        """The factor between log-ratio and implicit reward: the first term's beta, 1 where it has none."""
        for spec, _, options in self.terms:
            if "beta" in spec.hyperparameters:
                return float(options.get("beta", spec.hyperparameters["beta"]))
        return 1.0


def make_objective(loss: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Objective) -> Objective:
    """An objective from a recipe's `loss`: a name, `{name, ...}`, or a list of `{name, weight, ...}`.

    Raises:
        InputError: an unknown name or hyper-parameter, or a value that the loss refuses.
    """
    if isinstance(loss, Objective):
        return loss
    if isinstance(loss, str):
        loss = {"name": loss}
    entries: list[Any] = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError(
            f"expected a name, {{name: ...}} or a list of these, got {loss!r}",
            field="loss",
            mend="For example loss: {name: dpo, beta: 0.1}.",
        )
    if not entries:
        raise InputError("no loss is given", field="loss", mend="For example loss: {name: dpo, beta: 0.1}.")
    return Objective(tuple(_term(entry) for entry in entries))


def _term(entry: Mapping[str, Any]) -> tuple[LossSpec, float, dict[str, Any]]:
    options = dict(entry)
    if not isinstance(options.get("name"), str):
        raise InputError("a loss needs a name", field="loss.name", mend=f"One of {', '.join(loss_names())}.")
    spec = get_loss(options.pop("name"))
    weight = options.pop("weight", 1.0)
    known = spec.hyperparameters
    for key, value in options.items():
        if key not in known:
            raise InputError(
                f"'{spec.name}' has no such hyper-parameter", field=f"loss.{key}", mend=_nearest(key, known)
            )
        if isinstance(known[key], (int, float)) and not isinstance(known[key], bool):
            _check_number(value, f"loss.{key}")
    _check_number(weight, "loss.weight")
    _check_values(spec, options)
    return spec, float(weight), options


def _check_number(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(
            f"expected a number, got {value!r}", field=field, mend="YAML reads 1e-5 as text; write 1.0e-5."
        )


def _check_values(spec: LossSpec, options: dict[str, Any]) -> None:
    """Let the loss refuse what is out of range, on two made-up pairs with no more than it says it needs."""
    pairs = 2
    ones, lengths = torch.full((pairs,), -1.0), torch.ones(pairs, dtype=torch.long)
    reference = ones if spec.reference else None
    sequences = 2 * pairs if spec.rejected else pairs
    probe = LogProbs(
        chosen=ones,
        rejected=ones if spec.rejected else None,
        reference_chosen=reference,
        reference_rejected=reference if spec.rejected else None,
        chosen_lengths=lengths,
        rejected_lengths=lengths if spec.rejected else None,
        margins=torch.zeros(pairs),
        token_logps=torch.full((sequences,), -1.0),
        token_sequence=torch.arange(sequences),
    )
    try:
        value = spec.function(probe, **options)
    except (ValueError, TypeError) as error:
        raise InputError(str(error), field=f"loss ({spec.name})") from error
    if not isinstance(value, torch.Tensor) or value.shape != (pairs,):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(
            f"a loss gives one value per pair, [{pairs}] for {pairs} pairs; this one gave {got}",
            field=f"loss ({spec.name})",
        )


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
