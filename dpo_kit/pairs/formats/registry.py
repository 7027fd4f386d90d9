"""The registry of shapes that preference data has on disk, and how the shape of a row is found.

An adapter says what a row lacks to be of its shape, and turns such a row into a canonical one of its kind
(pair, unpaired, ranked list, scored reply). It does not check the result: `canonical.canonical_row` does
that for every adapter alike. What is made of ties, votes and ranks is `choosing`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_kit.errors import InputError
from dpo_kit.pairs.canonical import canonical_row
from dpo_kit.pairs.choosing import turned
from dpo_kit.pairs.formats.guessing import guessed_mapping, in_words
from dpo_kit.pairs.json_rows import RawRow
from dpo_kit.pairs.kinds import KINDS_OF_ROWS, PAIRS, SCORED, Kind
from dpo_kit.pairs.schema import SCORES, BadRow, Place, UnusablePair, checked_extras, finite, need

Row = Mapping[str, Any]
Convert = Callable[[Row], Row | Sequence[Row | UnusablePair]]


def _nothing(row: Row) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Format:
    """One shape: its name, what it looks like and where it comes from, and its adapter.

    `convert(row)` gives what `canonical_row` takes as one of the `kind`, or a list of such and of the
    `UnusablePair`s beside them, and raises `BadRow` or `UnusablePair`; it need not copy the
    `common_fields`. Where a row says which of two replies is better, the adapter gives them in their order
    as `chosen` and `rejected`, with `preference`, the share of the judgement that is for the first: 1, 0,
    0.5 for a tie, or any share of several votes.

    Attributes:
        fields: the columns that every row of this shape has.
        lacks_beside: names in words what else a row lacks to be of this shape, nothing where it fits.
        optional: columns that `convert` looks at too.
        prompt_field: what the prompt is called on disk; `names`, what other canonical fields are.
        judgements: where a row has several, `convert` for each by its name; the first is the default.
        takes_common: the `common_fields` are taken from the row under their own names.
        gather: the rows of a source -> those that `convert` takes, where one on disk is only a part of such.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    convert: Convert
    lacks_beside: Callable[[Row], list[str]] = _nothing
    optional: tuple[str, ...] = ()
    prompt_field: str = "prompt"
    names: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = PAIRS
    judgements: Mapping[str, Convert] = field(default_factory=dict)
    takes_common: bool = True
    gather: Callable[[Iterable[RawRow]], Iterator[RawRow]] | None = None

    @property
    def common_fields(self) -> frozenset[str]:
        """Columns that any format of this kind may have."""
        return _COMMON_FIELDS[self.kind.name] if self.takes_common else frozenset()

    def missing(self, row: Row) -> list[str]:
        """The fields that the row has not."""
        return [name for name in self.fields if name not in row]

    def lacks(self, row: Row) -> list[str]:
        """In words all that the row lacks to be of this shape; nothing where it fits."""
        return [f"the field '{name}'" for name in self.missing(row)] + self.lacks_beside(row)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Those of the columns that nothing is taken from."""
        return sorted({str(name) for name in columns} - self.common_fields - {*self.fields, *self.optional})

    def adapter(self, judgement: str | None) -> Convert:
        """`convert` by this judgement; raises `InputError` for one that the format does not have."""
        if judgement is None:
            return self.convert
        if judgement in self.judgements:
            return self.judgements[judgement]
        known = f"Its judgements: {', '.join(self.judgements)}" if self.judgements else "Leave it out"
        raise InputError(
            f"format '{self.name}' has no judgement '{judgement}'", field="judgement", mend=known
        )

    def canonical(self, row: Row, convert: Convert) -> Iterator[dict[str, Any] | UnusablePair]:
        """What is in the row, each canonical or not usable; raises `BadRow`. `convert` as `adapter` gives it.

        A pair may have a `preference` in [0.5, 1], the share of its chosen reply.
        """
        for name in self.fields:
            if name not in row:
                need(row, name)
        try:
            converted = convert(row)
        except UnusablePair as unusable:
            if self.takes_common:
                checked_extras(row, self.kind)  # a bad row is bad whatever else is the matter with it
            yield unusable
            return
        except KeyError as error:  # the natural `row["question"]["text"]` of an adapter of the user's
            raise BadRow(f"format '{self.name}' finds no {error} in the row") from error
        common = self.common_fields
        extras = {} if common.isdisjoint(row) else {name: row[name] for name in common if name in row}
        for part in converted if isinstance(converted, list) else [converted]:
            if isinstance(part, UnusablePair):
                yield part
                continue
            if not isinstance(part, dict | Mapping):  # to ask for a dict first is much faster
                raise TypeError(f"format '{self.name}': convert must return a row, not {type(part).__name__}")
            yield self._checked({**extras, **part} if extras else part)

    def _checked(self, part: Row) -> dict[str, Any] | UnusablePair:
        try:
            checked = canonical_row(part, self.kind, prompt_field=self.prompt_field)
            share = None if part.get("preference") is None else finite(part["preference"], "preference")
        except BadRow as bad:
            raise BadRow(bad.message, field=self._on_disk(bad.field), mend=bad.mend) from bad
        except UnusablePair as bad:
            return UnusablePair(bad.kind, field=self._on_disk(bad.field), message=bad.message)
        if share is None or self.kind != PAIRS:
            return checked
        if not 0 <= share <= 1:
            raise BadRow(f"expected a share from 0 to 1, found {share}", field=self._on_disk("preference"))
        return {**(turned(checked) if share < 0.5 else checked), "preference": max(share, 1 - share)}

    def _on_disk(self, place: str | None) -> str | None:
        """`chosen[0].content` -> the same place by the name that the field has on disk."""
        if place is None:
            return None
        name = place.partition("[")[0].partition(".")[0]
        return self.names.get(name, name) + place[len(name) :]


_COMMON_FIELDS = {
    kind.name: frozenset((*kind.extras, *(SCORES if kind == PAIRS else ())))
    for kind in (*KINDS_OF_ROWS, SCORED)
}


FORMATS: dict[str, Format] = {}
_OWN: set[str] = set()


def add_formats(formats: Iterable[Format]) -> None:
    """Add shapes that come with dpo_kit."""
    FORMATS.update({form.name: form for form in formats})


def register_format(
    name: str,
    convert: Convert,
    *,
    fields: Sequence[str],
    optional: Sequence[str] = (),
    detect: Callable[[Row], bool] | None = None,
    about: str = "",
    kind: Literal["pairs", "unpaired", "lists", "scored"] = "pairs",
) -> None:
    """Add a shape of your own, or replace one; it is tried before those that were there.

    Parameters
    ----------
    name: what `format=` calls it.
    convert: a row (a dict of column -> value) to a canonical row, or a list of them: `prompt`, `chosen`,
        `rejected` as text or lists of {role, content}, or the last two alone as whole conversations (with
        `preference`, the share from 0 to 1 that is for the first, where the row says which is better); of an
        unpaired row `prompt`, `completion`, `label`; of a list `prompt`, `completions`, `scores` (or
        `ranks`); of a scored reply `prompt`, `completion`, `score`. It may raise `schema.UnusablePair` and
        `schema.BadRow`.
    fields: the columns that every row of this shape has.
    optional: other columns that `convert` looks at; the rest is reported as not used.
    detect: a further condition for rows that have these columns.
    about: one line: what the shape is, and where it comes from.
    kind: what a row is; `scored` replies of one prompt are put together to a list.
    """

    def lacks_beside(row: Row) -> list[str]:
        fits = detect is None or any(name not in row for name in fields) or detect(row)
        return [] if fits else [f"what '{name}' is detected by"]

    if name == "auto":
        raise ValueError("'auto' is what finds the format, and no name for one")
    known = {each.name: each for each in (*KINDS_OF_ROWS, SCORED)}
    if kind not in known:
        raise ValueError(f"unknown kind '{kind}'; known: {', '.join(known)}")
    added = Format(name, about, tuple(fields), convert, lacks_beside, tuple(optional), kind=known[kind])
    others = {key: value for key, value in FORMATS.items() if key != name}
    FORMATS.clear()
    FORMATS.update({name: added, **others})
    _OWN.add(name)


def is_own(form: Format) -> bool:
    """Whether the user registered it: its code may change under the same name."""
    return form.name in _OWN or form.name not in FORMATS


def named_format(name: str) -> Format:
    """The format of this name; raises `InputError` with the nearest name where there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise InputError(
        f"unknown format '{name}'", field="format", mend=f"{hint}Known formats: auto, {', '.join(FORMATS)}"
    )


def detected_format(row: Row, place: Place) -> Format:
    """The format that the row fits: the user's own first, then that with the most fields.

    Raises `InputError` with the columns and what the nearest formats lack, where there is none.
    """
    fitting = [form for form in FORMATS.values() if not form.lacks(row)]
    if fitting:
        return max(fitting, key=lambda form: (form.name in _OWN, len(form.fields)))
    nearest = sorted(FORMATS.values(), key=lambda form: _distance(form, row))[:3]
    words = [f"'{form.name}' lacks {', '.join(form.lacks(row))}" for form in nearest]
    if all(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        words.append("where a reply begins in a whole text cannot be told from its characters")
    first = nearest[0]
    guess = guessed_mapping(row)
    example = f", as perhaps: {in_words(guess)}" if guess else ""
    raise place.error(
        f"no known format has these columns: {', '.join(map(str, row)) or 'none'}. "
        f"The nearest: {'; '.join(words)}",
        field=first.missing(row)[0] if len(first.lacks(row)) == 1 and first.missing(row) else None,
        mend=f"Rename or add fields, name the format, or give a mapping (data.mapping, --map){example}",
    )


def _distance(form: Format, row: Row) -> tuple[float, int]:
    """The share of a shape that a row lacks; half as much for a field that a column's name is like."""
    missing, lacks = form.missing(row), form.lacks(row)
    free = [str(name) for name in row if name not in form.fields]
    alike = sum(bool(difflib.get_close_matches(name, free, n=1, cutoff=0.6)) for name in missing)
    return (len(lacks) - 0.5 * alike) / max(len(form.fields) or 3, len(lacks)), len(lacks)
