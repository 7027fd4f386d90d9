"""Sources -> canonical pairs: every row through its format's adapter, every row accounted for.

`read_pairs` gives plain dicts and the report, `load_pairs` the same rows as a `datasets.Dataset`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_kit.errors import InputError
from dpo_kit.pairs.formats import Format, detected_format, named_format
from dpo_kit.pairs.schema import EXTRAS, KINDS, BadRow, Place, UnusablePair
from dpo_kit.pairs.sources import Source, find_sources
from dpo_kit.pairs.tally import PairsReport, Problem, SourceReport

if TYPE_CHECKING:
    from datasets import Dataset

Sources = str | Path | Sequence[str | Path]
Invalid = Literal["error", "drop"]

_log = logging.getLogger("dpo_kit.pairs")
_BATCH_ROWS = 1000


def load_pairs(sources: Sources, *, format: str = "auto", invalid: Invalid = "error") -> Dataset:
    """Preference pairs as a `datasets.Dataset` of canonical rows.

    Parameters
    ----------
    sources: one or several of: a file (json, jsonl, ndjson, csv, parquet, arrow; the text kinds also .gz
        or .zst), a folder, a glob, `hf://owner/name[/config]@split`.
    format: the shape of the rows; `auto` finds it from each source's first row.
    invalid: what becomes of pairs that are well formed but unusable (`schema.KINDS`): `error` raises one
        `InputError` that counts them all; `drop` leaves them out and logs one warning that does.

    Returns
    -------
    Columns `prompt`, `chosen`, `rejected`: all text, or all lists of {role, content}; `source`, where a
    person finds the row (`file:line`, `file:line (row N)` or `file:row N`); and those of `margin`
    (float64, score of chosen minus score of rejected), `weight` (float64, not below 0), `prompt_id`,
    `tools` (JSON text) that any row has, null in the others.

    Raises `InputError` for anything else that is wrong with the sources, whatever `invalid` says.
    """
    return load_with_report(sources, format=format, invalid=invalid)[0]


def load_with_report(
    sources: Sources, *, format: str = "auto", invalid: Invalid = "error"
) -> tuple[Dataset, PairsReport]:
    """What `load_pairs` loads, and the account of the loading. Raises as `load_pairs` does."""
    import pyarrow
    from datasets import Dataset

    report = PairsReport()
    pairs = _usable(sources, format, invalid, report)
    first = next(pairs)
    schema = _arrow_schema(messages=not isinstance(first["prompt"], str))
    batches = [pyarrow.RecordBatch.from_pylist([first, *islice(pairs, _BATCH_ROWS)], schema)]
    while rows := list(islice(pairs, _BATCH_ROWS)):
        batches.append(pyarrow.RecordBatch.from_pylist(rows, schema))
    table = pyarrow.Table.from_batches(batches, schema)
    absent = [name for name in EXTRAS if table[name].null_count == len(table)]
    return Dataset(table.drop_columns(absent)), report


def read_pairs(
    sources: Sources, *, format: str = "auto", invalid: Invalid = "error"
) -> tuple[list[dict[str, Any]], PairsReport]:
    """What `load_pairs` loads, as plain dicts, and the account of the loading.

    The dicts have only those optional keys that their own row has. Raises as `load_pairs` does.
    """
    report = PairsReport()
    return list(_usable(sources, format, invalid, report)), report


def stream_pairs(sources: Sources, format: str, report: PairsReport) -> Iterator[dict[str, Any]]:
    """The usable pairs one by one, all else going into the report.

    Raises `InputError` for trouble with structure only, at its place in the stream.
    """
    forced = None if format == "auto" else named_format(format)
    found, report.ignored = find_sources(sources)
    first: dict[str, Any] | None = None
    for source in found:
        for pair in _pairs_of_source(source, forced, report):
            first = first or pair
            if isinstance(pair["prompt"], str) != isinstance(first["prompt"], str):
                text, messages = (pair, first) if isinstance(pair["prompt"], str) else (first, pair)
                raise InputError(
                    "text and messages cannot be mixed in one data set: "
                    f"{text['source']} is text, {messages['source']} is messages",
                    file=source.name,
                    mend="Convert one of them, or load them apart",
                )
            yield pair


def _usable(sources: Sources, format: str, invalid: Invalid, report: PairsReport) -> Iterator[dict[str, Any]]:
    """At least one pair, once the policy on unusable ones is met; the end of the stream is the moment."""
    if invalid not in ("error", "drop"):
        raise InputError(f"unknown policy '{invalid}'", field="invalid", mend="Known policies: error, drop")
    yield from stream_pairs(sources, format, report)
    if report.problems and (invalid == "error" or not report.kept):
        raise report.as_error(dropped=invalid == "drop")
    if report.problems:
        _log.warning("left out: %s", report.left_out())


def _pairs_of_source(source: Source, form: Format | None, report: PairsReport) -> Iterator[dict[str, Any]]:
    account = SourceReport(source.name, form.name if form else "auto")
    report.sources.append(account)
    columns: dict[str, None] = {}
    for row, place in source.rows():
        if form is None:
            form = detected_format(row, place)
            account.format = form.name
        columns.update(dict.fromkeys(row))
        account.read += 1
        pair = _pair(form, row, place, report)
        if pair is not None:
            account.kept += 1
            yield pair
    if form is None or not account.read:
        raise InputError("there is no row in it", file=source.name)
    account.unused_columns = form.unused(columns)


def _pair(form: Format, row: dict[str, Any], place: Place, report: PairsReport) -> dict[str, Any] | None:
    try:
        return {**form.pair(row), "source": str(place)}
    except BadRow as bad:
        raise place.error(f"{bad.message} [format {form.name}]", field=bad.field, mend=bad.mend) from bad
    except UnusablePair as bad:
        report.problems.append(Problem(bad.kind, place, bad.field, bad.message, KINDS[bad.kind][1]))
        return None


def _arrow_schema(*, messages: bool) -> Any:
    import pyarrow

    part = (
        pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
        if messages
        else pyarrow.string()
    )
    parts = [(name, part) for name in ("prompt", "chosen", "rejected")]
    numbers = [(name, pyarrow.float64()) for name in ("margin", "weight")]
    texts = [(name, pyarrow.string()) for name in ("prompt_id", "tools", "source")]
    return pyarrow.schema(parts + numbers + texts)
