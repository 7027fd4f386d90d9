"""How numbers, ranks and labels are read: strictly, and whether JSON or CSV, where all is text, has them."""

from __future__ import annotations

import math
import re
from typing import Any

from dpo_kit.pairs.schema import BadRow, checked_label, finite, kind_of

_NO_JUDGEMENT = ("", "N/A")
_DECIMAL = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*", re.ASCII)
_LABELS = {"true": True, "false": False, "1": True, "0": False}


def number(value: Any, field: str) -> float | None:
    """A score that may be written as text (`"4"`); None where the source says that there is none.

    That is null, NaN, "N/A" or an empty text. Raises `BadRow` for anything else that is no finite number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        return finite(value, field)
    if value.strip() in _NO_JUDGEMENT:
        return None
    if not _DECIMAL.fullmatch(value):
        raise BadRow(f"expected a number, found {kind_of(value)}", field=field)
    return finite(float(value), field)


def score(value: Any, field: str) -> float:
    """A `number` that must be there."""
    found = number(value, field)
    if found is None:
        raise BadRow(f"expected a number, found {_in_words(value)}", field=field)
    return found


def bounded(value: Any, field: str, least: float, most: float) -> float:
    """A `score` from `least` to `most`."""
    found = number(value, field)
    if found is None or not least <= found <= most:
        words = _in_words(value) if found is None else f"{found:g}"
        raise BadRow(f"expected a number from {least:g} to {most:g}, found {words}", field=field)
    return found


def rank(value: Any, field: str, best: int) -> int:
    """A whole rank, counted from `best` (0 or 1) -> the same counted from 1; raises `BadRow`."""
    place = finite(value, field)
    if place != int(place) or place < best:
        raise BadRow(f"expected a rank, found {value}", field=field, mend=f"The best rank is {best}")
    return int(place) - best + 1


def label(value: Any, field: str) -> bool:
    """true or false, also as 1 or 0, and as text in capitals or not; raises `BadRow` for anything else."""
    plain = _LABELS.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(plain, float) and plain in (0.0, 1.0):  # a column with nulls, as pandas writes it
        plain = int(plain)
    try:
        return checked_label(plain)
    except BadRow as bad:
        raise BadRow(bad.message, field=field, mend=bad.mend) from bad


def _in_words(value: Any) -> str:
    return "NaN" if isinstance(value, float) else kind_of(value)
