"""Paths into a row: `a.b[0].c`, `answers[*].text`, `["a key with dots"].x`.

A key with dots, brackets, quotes, spaces or a question mark stands in quotes, plain or in brackets. `[0]`,
`[-1]` are elements of a list, `[*]` is all of them: what follows is taken of each. `[:-1]`, `[1:]` are parts
of a list, as Python cuts them. A path that ends in `?` may be missing in a row.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.schema import BadRow, kind_of

_PIECE = re.compile(
    r"""\[\s*(?P<index>-?\d+|\*)\s*\]                                # [0], [-1], [*]
    |\[\s*(?P<begin>-?\d+)?\s*:\s*(?P<end>-?\d+)?\s*\]                # [:-1], [1:]
    |\[\s*(?P<bracket>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\]      # ["my key"]
    |(?P<dot>\.)?(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')     # "my key"
    |(?P<plaindot>\.)?(?P<plain>[^.\[\]"'?\s]+)                      # key""",
    re.VERBOSE,
)
ALL = "*"


class _Absent:
    """What a path that may be missing finds where it is."""


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Path:
    """A path as it was written, and its steps: a key (str in a one-tuple), an index, a slice, or `ALL`."""

    text: str
    steps: tuple[tuple[str] | int | slice | str, ...]
    optional: bool = False

    @property
    def column(self) -> str:
        """The row's own key that the path begins at."""
        first = self.steps[0]
        assert isinstance(first, tuple)
        return first[0]

    def of(self, row: Any) -> Any:
        """What lies there; `ABSENT` where an optional path is missing. Raises `BadRow` naming the piece."""
        return self._follow(row, 0, "")

    def _follow(self, value: Any, at: int, place: str) -> Any:
        if at == len(self.steps):
            return value
        step = self.steps[at]
        if step == ALL:
            if not isinstance(value, list):
                raise self._missing(f"'[*]' needs a list, found {kind_of(value)}", place)
            found = [self._follow(each, at + 1, f"{place}[{i}]") for i, each in enumerate(value)]
            return [None if each is ABSENT else each for each in found]
        if isinstance(step, slice):
            if not isinstance(value, list):
                raise self._missing(f"'[:]' needs a list, found {kind_of(value)}", place)
            return self._follow(value[step], at + 1, place)
        if isinstance(step, int):
            if not isinstance(value, list):
                raise self._missing(f"'[{step}]' needs a list, found {kind_of(value)}", place)
            if not -len(value) <= step < len(value):
                if self.optional:
                    return ABSENT
                raise self._missing(f"there is no [{step}] in a list of {len(value)}", place)
            return self._follow(value[step], at + 1, f"{place}[{step}]")
        assert isinstance(step, tuple)
        (key,) = step
        if self.optional and (value is None or (isinstance(value, dict) and key not in value)):
            return ABSENT
        if not isinstance(value, dict):
            raise self._missing(f"'{key}' needs an object, found {kind_of(value)}", place)
        if key not in value:
            raise self._missing(f"there is no '{key}'", place, list(map(str, value)), key)
        return self._follow(value[key], at + 1, f"{place}.{key}" if place else key)

    def _missing(self, what: str, place: str, keys: Sequence[str] | None = None, key: str = "") -> BadRow:
        where = f" in '{place}'" if place else ""
        if keys is None:
            return BadRow(f"{what}{where}", field=self.text, mend="Mend the path in the mapping")
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        there = f"{hint}There: {', '.join(keys) or 'nothing'}"
        return BadRow(
            f"{what}{where}", field=self.text, mend=f"{there}. A path may end in ? where rows lack it"
        )


def parsed_path(text: Any, field: str) -> Path:
    """The path that a text says; raises `InputError` for what is none."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"expected a path into the row, found {kind_of(text)}", field=field, mend=_EXAMPLE)
    written = text.strip()
    optional = written.endswith("?")
    rest = written.removesuffix("?")
    steps: list[tuple[str] | int | slice | str] = []
    at = 0
    while at < len(rest):
        piece = _PIECE.match(rest, at)
        if piece is None or (not steps and (piece["dot"] or piece["plaindot"])) or _runs_on(piece, steps):
            raise InputError(f"'{written}' is no path at '{rest[at:]}'", field=field, mend=_EXAMPLE)
        if piece["index"]:
            steps.append(ALL if piece["index"] == ALL else int(piece["index"]))
        elif piece[0].startswith("[") and not piece["bracket"]:
            begin, end = (int(piece[name]) if piece[name] else None for name in ("begin", "end"))
            steps.append(slice(begin, end))
        elif quoted := piece["bracket"] or piece["quoted"]:
            steps.append((re.sub(r"\\(.)", r"\1", quoted[1:-1]),))
        else:
            steps.append((piece["plain"],))
        at = piece.end()
    if not steps or not isinstance(steps[0], tuple):
        raise InputError(f"'{written}' does not begin with a column", field=field, mend=_EXAMPLE)
    return Path(written, tuple(steps), optional)


def _runs_on(piece: re.Match[str], steps: list[Any]) -> bool:
    """A key right behind another one, with neither dot nor brackets between."""
    bare = (piece["quoted"] and not piece["dot"]) or (piece["plain"] and not piece["plaindot"])
    return bool(steps and bare)


_EXAMPLE = (
    """Write it as in: question.text, turns[0].value, answers[*].text, messages[:-1], ["my key"].text"""
)
