"""What one may say about the loading of preference data: which shape, which judgement, what is made of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
            and bad ones), `lists` (of labelled replies and rankings, as they are), `unpaired`, or `auto`:
            pairs, but labelled replies stay unpaired.
        pairs: of a ranked list: `all` pairs, the `best_worst` alone, `adjacent` ranks, or `random:k` of all.
        ties: `drop` leaves them out, counted; `half` makes a pair each way, each of half the weight.
        votes: where several people or a probability judged: the `majority`'s pair, or a pair each way
            weighted by its `share` of the votes.
        min_margin: least difference of scores (of ranks, where there are only ranks; of shares of votes,
            where there are only votes); pairs below it are left out, counted.
        weights: a pair's weight: as `given` (1 where it is not), its `margin` (as min_margin measures it),
            or its `agreement`, the difference of the shares of votes. What is given multiplies the others.
        seed: for `random:k`, together with the prompt: the same pairs whatever stands around the row.

    Raises `InputError` for values that it does not know.
    """

    format: str = "auto"
    mapping: Mapping[str, Any] | None = None
    judgement: str | None = None
    invalid: Literal["error", "drop"] = "error"
    shape: Literal["auto", "pairs", "unpaired", "lists"] = "auto"
    pairs: str = "all"
    ties: Literal["drop", "half"] = "drop"
    votes: Literal["majority", "share"] = "majority"
    min_margin: float | None = None
    weights: Literal["given", "margin", "agreement"] = "given"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise _unknown(name, getattr(self, name), known)
        if not _PAIRS.fullmatch(str(self.pairs)):
            raise _unknown("pairs", self.pairs, ("all", "best_worst", "adjacent", "random:k"))
        if self.mapping is not None and self.format != "auto":
            raise InputError("a mapping is a format of its own", field="mapping", mend="Leave out the format")

    @classmethod
    def of(cls, **options: Any) -> LoadOptions:
        """Options from their fields by name; an unknown one is refused with the nearest."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise _unknown("option", name, known)
        return cls(**options)


def _unknown(name: str, value: Any, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return InputError(f"unknown {name} '{value}'", field=name, mend=f"{hint}Known: {', '.join(known)}")
