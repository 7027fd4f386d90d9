"""Losses by name, and an objective made from what a recipe says: one loss or a weighted sum."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_kit.errors import InputError
from dpo_kit.losses.inputs import LogProbs, Shape

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
        raise InputError(f"unknown loss '{name}'", field="loss.name", mend=_nearest(name, loss_names()))
    return _LOSSES[name]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses with their hyper-parameters fixed.

    Attributes:
        terms: (loss, weight, hyper-parameters) of each.
    """

    terms: tuple[tuple[LossSpec, float, dict[str, Any]], ...]

    def __call__(self, logps: LogProbs, running: Sequence[float | None] = ()) -> Tensor:
        """[P] loss per example, nats.

        Args:
            logps: of a step where a loss couples its examples, else of any part of it.
            running: what `averaged` gave for the step; without it a running mean is the step's own value.
        """
        means = running or self.averaged(logps, ())
        total: Tensor | None = None
        for (spec, weight, options), mean in zip(self.terms, means, strict=True):
            if mean is not None:
                device = logps.example.device
                logps = replace(logps, running=torch.tensor(mean, dtype=torch.float64, device=device))
            values = spec.function(logps, **options)
            if spec.shape == "unpaired":
                values = logps.mean_per_example(values)
            total = weight * values if total is None else total + weight * values
        assert total is not None
        return total

    def averaged(self, logps: LogProbs, before: Sequence[float | None]) -> list[float | None]:
        """The running mean of each term that has one, a step's log-probs taken in.

        Args:
            logps: of a whole step.
            before: what this gave for the step before; empty at the first.
        """
        found: list[float | None] = []
        for (spec, _, options), old in zip(self.terms, before or [None] * len(self.terms), strict=True):
            if spec.running is None:
                found.append(None)
                continue
            new = float(spec.running(logps, **options).detach())
            momentum = options.get("momentum", spec.hyperparameters["momentum"])
            found.append(new if old is None else momentum * old + (1 - momentum) * new)
        return found

    def _any(self, name: str) -> bool:
        return any(bool(getattr(spec, name)) for spec, _, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        return self._any("reference")

    @property
    def needs_reference_tokens(self) -> bool:
        return self._any("reference_tokens")

    @property
    def needs_rejected(self) -> bool:
        return self._any("rejected")

    @property
    def needs_rewards(self) -> bool:
        return self._any("rewards")

    @property
    def needs_mismatched(self) -> bool:
        return self._any("mismatched")

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of one example depends on the others of the step."""
        return self._any("batch")

    @property
    def extras(self) -> tuple[str, ...]:
        """What the losses ask of the policy's token distributions."""
        return tuple(sorted({name for spec, _, _ in self.terms for name in spec.extras}))

    @property
    def beta(self) -> float:
        """The factor between log-ratio and implicit reward: the first term's beta, 1 where it has none."""
        for spec, _, options in self.terms:
            if "beta" in spec.hyperparameters:
                return float(options.get("beta", spec.hyperparameters["beta"]))
        return 1.0

    def check_shape(self, shape: Shape) -> None:
        """Refuse data of a shape that a loss cannot learn from.

        Raises:
            InputError: naming the loss and the shape.
        """
        for spec, _, _ in self.terms:
            if shape not in ("pairs", spec.shape):
                kinds = {"pairs": "pairs", "unpaired": "replies with a label", "lists": "ranked lists"}
                fitting = [n for n, s in _LOSSES.items() if s.shape == shape]
                raise InputError(
                    f"'{spec.name}' learns from {kinds[spec.shape]}, and the data are {kinds[shape]}",
                    field="loss.name",
                    mend=f"Losses for them: {', '.join(sorted(fitting))}.",
                )


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
    if spec.running is not None and "momentum" not in spec.hyperparameters:
        raise InputError("a running mean needs the hyper-parameter momentum", field=f"loss ({spec.name})")
    probe = _made_up_pairs(spec)
    if spec.running is not None:
        probe = replace(probe, running=torch.zeros(()))
    try:
        value = spec.function(probe, **options)
    except (ValueError, TypeError) as error:
        raise InputError(str(error), field=f"loss ({spec.name})") from error
    expected = (len(probe.example) if spec.shape == "unpaired" else probe.num_examples,)
    if not isinstance(value, torch.Tensor) or value.shape != expected:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        kind = "reply" if spec.shape == "unpaired" else "pair"
        raise InputError(
            f"a loss gives one value per {kind}, [{expected[0]}] here; this one gave {got}",
            field=f"loss ({spec.name})",
        )


def _made_up_pairs(spec: LossSpec) -> LogProbs:
    """Two pairs of one-token replies, with what the loss is registered to look at and nothing else."""
    pairs = 2
    ones, lengths = torch.full((pairs,), -1.0), torch.ones(pairs, dtype=torch.long)
    rejected = ones if spec.rejected else None
    tokens = torch.full((2 * pairs if spec.rejected else pairs,), -1.0)
    logps = LogProbs.of_pairs(
        ones,
        rejected,
        ones if spec.reference else None,
        rejected if spec.reference else None,
        lengths,
        lengths if spec.rejected else None,
        margins=torch.zeros(pairs),
        token_logps=tokens,
        token_sequence=torch.arange(len(tokens)),
    )
    return replace(
        logps,
        policy=None if spec.rewards else logps.policy,
        rewards=torch.zeros_like(tokens) if spec.rewards else None,
        reference_token_logps=tokens if spec.reference_tokens else None,
        token_extras={name: torch.full_like(tokens, 0.5) for name in spec.extras},
        mismatched=torch.zeros(pairs) if spec.mismatched else None,
    )


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
