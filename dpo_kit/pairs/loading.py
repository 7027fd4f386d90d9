"""Sources -> canonical rows: every row through its format's adapter, every row accounted for.

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
from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.schema import KINDS, BadRow, Place, UnusablePair
from dpo_kit.pairs.sources import Source, find_sources
from dpo_kit.pairs.tally import PairsReport, Problem, SourceReport

if TYPE_CHECKING:
    from datasets import Dataset

Sources = str | Path | Sequence[str | Path]
Invalid = Literal["error", "drop"]

_log = logging.getLogger("dpo_kit.pairs")
_BATCH_ROWS = 1000


def load_pairs(sources: Sources, *, format: str = "auto", invalid: Invalid = "error") -> Dataset:
    """Preference pairs, unpaired rows or ranked lists as a `datasets.Dataset` of canonical rows.

    Parameters
    ----------
    sources: one or several of: a file (json, jsonl, ndjson, csv, parquet, arrow; the text kinds also .gz
        or .zst), a folder, a glob, `hf://owner/name[/config]@split`.
    format: the shape of the rows; `auto` finds it from each source's first row.
    invalid: what becomes of rows that are well formed but unusable (`schema.KINDS`): `error` raises one
        `InputError` that counts them all; `drop` leaves them out and logs one warning that does.

    Returns
    -------
    The columns of the one kind that the rows are of, texts or lists of {role, content} alike in all:

    - pairs: `prompt`, `chosen`, `rejected`;
    - unpaired rows: `prompt`, `completion`, `label` (bool, true where the completion is desirable);
    - ranked lists: `prompt`, `completions` (list), `scores` (list of float64, higher is better, not all
      equal; ranks are turned into scores by their sign).

    And `source`, where a person finds the row (`file:line`, `file:line (row N)` or `file:row N`); and those
    of `margin` (float64, score of chosen minus score of rejected; of pairs only), `weight` (float64, not
    below 0), `prompt_id`, `tools` (JSON text) that any row has, null in the others.

    Raises `InputError` for anything else that is wrong with the sources, whatever `invalid` says: among it
    rows of more than one kind, and texts beside messages.
    """
    return load_with_report(sources, format=format, invalid=invalid)[0]


def load_with_report(
    sources: Sources, *, format: str = "auto", invalid: Invalid = "error"
) -> tuple[Dataset, PairsReport]:
    """What `load_pairs` loads, and the account of the loading. Raises as `load_pairs` does."""
    import pyarrow
    from datasets import Dataset

    report = PairsReport()
    usable = _usable(sources, format, invalid, report)
    first = next(usable)
    assert report.kind is not None
    schema = _arrow_schema(report.kind, messages=not isinstance(first["prompt"], str))
    batches = [pyarrow.RecordBatch.from_pylist([first, *islice(usable, _BATCH_ROWS)], schema)]
    while rows := list(islice(usable, _BATCH_ROWS)):
        batches.append(pyarrow.RecordBatch.from_pylist(rows, schema))
    table = pyarrow.Table.from_batches(batches, schema)
    absent = [name for name in report.kind.extras if table[name].null_count == len(table)]
    return Dataset(table.drop_columns(absent)), report


def read_pairs(
    sources: Sources, *, format: str = "auto", invalid: Invalid = "error"
) -> tuple[list[dict[str, Any]], PairsReport]:
    """What `load_pairs` loads, as plain dicts, and the account of the loading.

    The dicts have only those optional keys that their own row has. Raises as `load_pairs` does.
    """
    report = PairsReport()
    return list(_usable(sources, format, invalid, report)), report


def stream_rows(sources: Sources, format: str, report: PairsReport) -> Iterator[dict[str, Any]]:
    """The usable rows one by one, all else going into the report.

    Raises `InputError` for trouble with structure only, at its place in the stream.
    """
    forced = None if format == "auto" else named_format(format)
    found, report.ignored = find_sources(sources)
    first: dict[str, Any] | None = None
    for source in found:
        for row, kind in _rows_of_source(source, forced, report):
            if first is None:
                first, report.kind = row, kind
            _require_alike(first, report.kind, row, kind, source)
            yield row


def _require_alike(
    first: dict[str, Any], first_kind: Kind | None, row: dict[str, Any], kind: Kind, source: Source
) -> None:
    if first_kind is not None and kind != first_kind:
        raise InputError(
            f"{first_kind.rows} and {kind.rows} cannot be mixed in one data set: "
            f"{first['source']} is of the {first_kind.rows}, {row['source']} of the {kind.rows}",
            file=source.name,
            mend="Convert one of them, or load them apart",
        )
    if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
        text, messages = (row, first) if isinstance(row["prompt"], str) else (first, row)
        raise InputError(
            "text and messages cannot be mixed in one data set: "
            f"{text['source']} is text, {messages['source']} is messages",
            file=source.name,
            mend="Convert one of them, or load them apart",
        )


def _usable(sources: Sources, format: str, invalid: Invalid, report: PairsReport) -> Iterator[dict[str, Any]]:
    """At least one row, once the policy on unusable ones is met; the end of the stream is the moment."""
    if invalid not in ("error", "drop"):
        raise InputError(f"unknown policy '{invalid}'", field="invalid", mend="Known policies: error, drop")
    yield from stream_rows(sources, format, report)
    if report.problems and (invalid == "error" or not report.kept):
        raise report.as_error(dropped=invalid == "drop")
    if report.problems:
        _log.warning("left out: %s", report.left_out())


def _rows_of_source(
    source: Source, form: Format | None, report: PairsReport
) -> Iterator[tuple[dict[str, Any], Kind]]:
    account = SourceReport(source.name, form.name if form else "auto")
    report.sources.append(account)
    columns: dict[str, None] = {}
    for row, place in source.rows():
        if form is None:
            form = detected_format(row, place)
            account.format = form.name
        columns.update(dict.fromkeys(row))
        account.read += 1
        usable = _canonical(form, row, place, report)
        if usable is not None:
            account.kept += 1
            yield usable, form.kind
    if form is None or not account.read:
        raise InputError("there is no row in it", file=source.name)
    account.unused_columns = form.unused(columns)


def _canonical(form: Format, row: dict[str, Any], place: Place, report: PairsReport) -> dict[str, Any] | None:
    try:
        return {**form.canonical(row), "source": str(place)}
    except BadRow as bad:
        raise place.error(f"{bad.message} [format {form.name}]", field=bad.field, mend=bad.mend) from bad
    except UnusablePair as bad:
        report.problems.append(Problem(bad.kind, place, bad.field, bad.message, KINDS[bad.kind][1]))
        return None


def _arrow_schema(kind: Kind, *, messages: bool) -> Any:
    import pyarrow

    number, text = pyarrow.float64(), pyarrow.string()
    part = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])) if messages else text
    types = dict.fromkeys(("prompt", "chosen", "rejected", "completion"), part) | {
        "completions": pyarrow.list_(part),
        "label": pyarrow.bool_(),
        "scores": pyarrow.list_(number),
        "margin": number,
        "weight": number,
    }
    names = (*kind.columns, *kind.extras, "source")
    return pyarrow.schema([(name, types.get(name, text)) for name in names])
