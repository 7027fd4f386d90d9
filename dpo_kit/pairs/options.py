"""What one may say about the loading of preference data: which shape, which judgement, what is made of it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dpo_kit.errors import InputError

CHOICES = {
    "invalid": ("error", "drop"),
    "shape": ("auto", "pairs", "unpaired", "lists"),
    "ties": ("drop", "half"),
    "votes": ("majority", "share"),
    "weights": ("given", "margin", "agreement"),
}
_PAIRS = re.compile(r"all|best_worst|adjacent|random:[1-9]\d*")


def _option(default: Any, words: str) -> Any:
    """A field, with what --help says of it on the command line."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class LoadOptions:
    """How rows are read, and what is made of them.

    Attributes:
        format: the shape of the rows on disk; `auto` finds it from each source's first row.
        mapping: a shape of one's own, in place of `format`: see `formats.mapping`.
        judgement: which judgement counts, where a row has several (PKU-SafeRLHF: `better` or `safer`); each
            format names its own. None: the format's first.
        invalid: rows that are well formed but unusable (`schema.KINDS`): `error` stops with one error that
            counts them all, `drop` leaves them out, counted.
        shape: what is made: `pairs` (of ranked lists by `pairs`; of labelled replies where a prompt has good
            and bad ones), `lists` (of rankings, and of labelled replies; pairs stay pairs), `unpaired`, or
            `auto`: pairs, but labelled replies stay unpaired.
        pairs: of a ranked list: `all` pairs, the `best_worst` alone, `adjacent` ranks, or `random:k` of all.
        ties: `drop` leaves them out, counted; `half` makes a pair each way, each of half the weight,
            whatever `min_margin` is.
        votes: where several people or a probability judged: the `majority`'s pair, or a pair each way
            weighted by its `share` of the votes.
        min_margin: least difference of scores (of ranks, where there are only ranks; of shares of votes,
            where there are only votes); pairs below it are left out, counted.
        weights: a pair's weight: as `given` (1 where it is not), its `margin` (as min_margin measures it),
            or its `agreement`, the difference of the shares of votes. What is given multiplies the others.
        seed: for `random:k`, together with the prompt: the same pairs whatever stands around the row.

    Raises `InputError` for values that it does not know.
    """

    format: str = _option("auto", "Shape of the rows; auto looks at them (`data formats` lists them).")
    mapping: Mapping[str, Any] | None = _option(
        None,
        "A shape of one's own: field=path, once for each field; values.first=A,B for what is a verdict.",
    )
    judgement: str | None = _option(
        None, "Which judgement counts, where a row has several, as better or safer."
    )
    invalid: Literal["error", "drop"] = _option(
        "error", "Unusable rows: error stops at them, drop leaves them out, counted."
    )
    shape: Literal["auto", "pairs", "unpaired", "lists"] = _option(
        "auto", "What is made: auto, pairs, unpaired or lists."
    )
    pairs: str = _option("all", "Of a ranked list: all, best_worst, adjacent or random:k.")
    ties: Literal["drop", "half"] = _option("drop", "drop leaves them out, half makes a pair each way.")
    votes: Literal["majority", "share"] = _option(
        "majority", "The majority's pair, or a pair each way weighted by its share."
    )
    min_margin: float | None = _option(None, "Leave out pairs whose scores (or ranks, or votes) lie closer.")
    weights: Literal["given", "margin", "agreement"] = _option(
        "given", "A pair's weight: given, margin or agreement."
    )
    seed: int = _option(0, "Of what is drawn, as random:k.")

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise _unknown(name, getattr(self, name), known)
        if not _PAIRS.fullmatch(str(self.pairs)):
            raise _unknown("pairs", self.pairs, ("all", "best_worst", "adjacent", "random:k"))
        if self.min_margin is not None and not _is_number(self.min_margin):
            raise InputError(f"expected a number, found {self.min_margin!r}", field="min_margin")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"expected a whole number, found {self.seed!r}", field="seed")
        if self.mapping is not None and self.format != "auto":
            raise InputError("a mapping is a format of its own", field="mapping", mend="Leave out the format")

    @classmethod
    def of(cls, **options: Any) -> LoadOptions:
        """Options from their fields by name; an unknown one is refused with the nearest."""
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise _unknown("option", name, known)
        return cls(**options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(name: str, value: Any, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return InputError(f"unknown {name} '{value}'", field=name, mend=f"{hint}Known: {', '.join(known)}")
