"""Canonical rows as Arrow holds them: the columns of each kind, messages packed where any says more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpo_kit.pairs.kinds import RANKS, Kind, kind_of_columns
from dpo_kit.pairs.messages import PACKED, has_extras, packed

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

_BATCH_ROWS = 1000


def arrow_schema(kind: Kind, *, messages: bool, extras: bool = False) -> Schema:
    """Of rows of this kind, with all optional columns; `extras`: of packed messages (`messages.packed`)."""
    import pyarrow

    number, text = pyarrow.float64(), pyarrow.string()
    fields = ("role", "content", PACKED) if extras else ("role", "content")
    part = pyarrow.list_(pyarrow.struct([(name, text) for name in fields])) if messages else text
    types = dict.fromkeys(("prompt", "chosen", "rejected", "completion"), part) | {
        "completions": pyarrow.list_(part),
        "label": pyarrow.bool_(),
        "scores": pyarrow.list_(number),
        "margin": number,
        "weight": number,
        **dict.fromkeys(RANKS, pyarrow.int64()),
    }
    names = (*kind.columns, *kind.extras, "source")
    return pyarrow.schema([(name, types.get(name, text)) for name in names])


def packed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with each message in it packed (`messages.packed`)."""
    return {name: _packed(value) for name, value in row.items()}


def record_batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[RecordBatch]:
    """Rows of one kind -> Arrow; messages have the field for extras from the first batch on that has any."""
    import pyarrow

    rows, extras = iter(rows), False
    while some := list(islice(rows, _BATCH_ROWS)):
        kind, messages = kind_of_columns(some[0]), not isinstance(some[0]["prompt"], str)
        assert kind is not None
        if messages:
            extras = extras or any(_any_extras(value) for row in some for value in row.values())
        schema = arrow_schema(kind, messages=messages, extras=extras)
        yield pyarrow.RecordBatch.from_pylist(list(map(packed_row, some)) if extras else some, schema)


def _any_extras(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, dict) and has_extras([value])
    return any(_any_extras(inner) for inner in value)


def _packed(value: Any) -> Any:
    if isinstance(value, list):
        return [_packed(inner) for inner in value]
    return packed(value) if isinstance(value, dict) else value
