"""An objective made from what a recipe says: one loss or a weighted sum, and what it needs of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_kit.errors import InputError, nearest
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import LossSpec, get_loss, loss_names
from dpo_kit.shapes import Shape

_ROWS_AT_ONCE = 10_000


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
            given = logps
            if mean is not None:
                device = logps.example.device
                given = replace(logps, running=torch.tensor(mean, dtype=torch.float64, device=device))
            values = spec.function(given, **options)
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
    def needs_margins(self) -> bool:
        """Whether it looks at the data's margins."""
        return any(_uses_margins(spec, options) for spec, _, options in self.terms)

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of one example depends on the others of the step."""
        return self._any("batch")

    @property
    def extras(self) -> tuple[str, ...]:
        """What the losses ask of the policy's token distributions."""
        return tuple(sorted({name for spec, _, _ in self.terms for name in spec.extras}))

    @property
    def needs_distributions(self) -> bool:
        """Whether it compares whole distributions with the reference's, which are not kept on disk."""
        return "reference_kl" in self.extras

    @property
    def beta(self) -> float:
        """The factor between log-ratio and implicit reward: the first term's beta, 1 where it has none."""
        for spec, _, options in self.terms:
            if "beta" in spec.hyperparameters:
                return float(options.get("beta", spec.hyperparameters["beta"]))
        return 1.0

    @property
    def per_token(self) -> bool:
        """Whether the implicit reward is per token: of the term that `beta` is of, or of any without one."""
        for spec, _, _ in self.terms:
            if "beta" in spec.hyperparameters:
                return spec.per_token
        return self._any("per_token")

    def check_shape(self, shape: Shape) -> None:
        """Refuse data of a shape that a loss cannot learn from.

        Raises:
            InputError: naming the loss and the shape.
        """
        for spec, _, _ in self.terms:
            if shape not in ("pairs", spec.shape):
                kinds = {"pairs": "pairs", "unpaired": "replies with a label", "lists": "ranked lists"}
                fitting = [name for name in loss_names() if get_loss(name).shape == shape]
                raise InputError(
                    f"'{spec.name}' learns from {kinds[spec.shape]}, and the data are {kinds[shape]}",
                    field="loss.name",
                    mend=f"Losses for them: {', '.join(fitting)}.",
                )

    def check_data(self, dataset: Any) -> None:
        """Refuse data without the margins that a loss looks at, or with scores that it cannot learn from.

        Args:
            dataset: a `datasets.Dataset` of canonical or of tokenised rows.

        Raises:
            InputError: naming the loss, and the row's source where it is a row's.
        """
        for spec, _, options in self.terms:
            if _uses_margins(spec, options):
                _check_margins(spec, dataset)
            if spec.check_scores is not None and "scores" in dataset.column_names:
                for source, scores in _values(dataset, "scores"):
                    try:
                        spec.check_scores(scores)
                    except (ValueError, TypeError) as error:
                        raise InputError(str(error), file=source, field="scores") from error


def _uses_margins(spec: LossSpec, options: Mapping[str, Any]) -> bool:
    if isinstance(spec.margins, str):
        return bool(options.get(spec.margins, spec.hyperparameters[spec.margins]))
    return spec.margins


def _check_margins(spec: LossSpec, dataset: Any) -> None:
    known = False
    for source, margin in _values(dataset, "margin") if "margin" in dataset.column_names else ():
        if margin is not None and not (isinstance(margin, (int, float)) and math.isfinite(margin)):
            message = f"a margin must be a finite number, got {margin!r}"
            raise InputError(message, file=source, field="margin")
        known = known or margin is not None
    if not known:
        mend = "Give the rows a margin, or score_chosen and score_rejected"
        if isinstance(spec.margins, str):
            mend += f"; or set loss.{spec.margins} to false"
        raise InputError(f"'{spec.name}' needs margins, and no row has one", field="data.train", mend=mend)


def _values(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each row's source, or its number where there is none, and its value of a column."""
    columns = [column for column in (name, "source") if column in dataset.column_names]
    rows = dataset.select_columns(columns).with_format(None)
    first = 0
    for part in rows.iter(batch_size=_ROWS_AT_ONCE):
        sources = part.get("source") or [None] * len(part[name])
        for i, (source, value) in enumerate(zip(sources, part[name], strict=True)):
            yield source or f"row {first + i + 1}", value
        first += len(sources)


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
    terms = tuple(_term(entry) for entry in entries)
    names = {
        needed: [spec.name for spec, _, _ in terms if spec.rewards == needed] for needed in (True, False)
    }
    if all(names.values()):
        raise InputError(
            f"'{names[True][0]}' trains a reward model, and '{names[False][0]}' the log-probs of a causal LM",
            field="loss",
            mend="Train them in two runs.",
        )
    return Objective(terms)


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
                f"'{spec.name}' has no such hyper-parameter", field=f"loss.{key}", mend=nearest(key, known)
            )
        _check_type(value, known[key], f"loss.{key}")
    _check_number(weight, "loss.weight")
    if weight < 0:
        raise InputError(f"a weight must be 0 or more, got {weight}", field="loss.weight")
    _check_values(spec, options)
    return spec, float(weight), options


def _check_type(value: Any, default: Any, field: str) -> None:
    """A value must be of its default's type; which numbers and which words are right, the loss knows."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"expected true or false, got {value!r}", field=field)
    elif isinstance(default, (int, float)):
        _check_number(value, field)
    elif isinstance(default, str) and not isinstance(value, str):
        raise InputError(f"expected a word such as {default!r}, got {value!r}", field=field)


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
