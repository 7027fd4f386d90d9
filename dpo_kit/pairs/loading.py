"""Sources -> canonical rows: each by its format, as the options say, and accounted for.

`read_pairs` gives plain dicts and the report, `load_pairs` the same rows as a `datasets.Dataset`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.arrow_rows import record_batches
from dpo_kit.pairs.choosing import kind_made, made_of, require_effect
from dpo_kit.pairs.formats import FORMATS, Format, detected_format, is_own, named_format
from dpo_kit.pairs.formats.mapping import mapping_format
from dpo_kit.pairs.grouping import Placed, group_by_prompt, is_grouped
from dpo_kit.pairs.kinds import LISTS, Kind
from dpo_kit.pairs.lost import LostColumns
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.reading import RawRow
from dpo_kit.pairs.row_cache import file_of_rows, kept_rows, store_rows
from dpo_kit.pairs.schema import BadRow, UnusablePair, printable
from dpo_kit.pairs.sources import HUB, Source, find_sources
from dpo_kit.pairs.tally import PairsReport, SourceReport

if TYPE_CHECKING:
    from datasets import Dataset

Sources = str | Path | Sequence[str | Path]

_log = logging.getLogger("dpo_kit.pairs")


def load_pairs(sources: Sources, *, format: str = "auto", invalid: str = "error", **options: Any) -> Dataset:
    """Preference pairs, unpaired rows or ranked lists as a `datasets.Dataset` of canonical rows.

    Parameters
    ----------
    sources: one or several of: a file (json, jsonl, ndjson, csv, parquet, arrow; the text kinds also .gz
        or .zst), a folder, a glob, `hf://owner/name[/config][#folder]@split`, `hf://owner/name#path/file`, a
        name of the catalogue (`dpo-kit data list`).
    format: the shape of the rows; `auto` finds it from each source's first row.
    invalid: what becomes of rows that are well formed but unusable (`schema.KINDS`): `error` raises one
        `InputError` that counts them all; `drop` leaves them out and logs one warning that does.
    options: the other fields of `LoadOptions`: which judgement counts, what is made of lists, votes, ties.

    Returns
    -------
    The columns of the one kind that the rows are of, texts or lists of {role, content} alike in all:

    - pairs: `prompt`, `chosen`, `rejected`;
    - unpaired rows: `prompt`, `completion`, `label` (bool, true where the completion is desirable);
    - ranked lists (with shape="lists"): `prompt`, `completions` (list), `scores` (list of float64, higher is
      better, not all equal; ranks are turned into scores by their sign).

    And `source`, where a person finds the row (`file:line`, `file:line (row N)` or `file:row N`); and those
    of `margin` (float64, score of chosen minus score of rejected; of pairs only), `chosen_rank` and
    `rejected_rank` (int64, 1 is best; of pairs only), `weight` (float64, not below 0), `prompt_id` (the same
    for all pairs of one list), `tools`, `chat_template_kwargs` (JSON text) that any row has, null in the
    others.

    Raises `InputError` for anything else that is wrong with the sources, whatever `invalid` says: among it
    rows of more than one kind, and texts beside messages.
    """
    return load_with_report(sources, LoadOptions.of(format=format, invalid=invalid, **options))[0]


def load_with_report(sources: Sources, options: LoadOptions = LoadOptions()) -> tuple[Dataset, PairsReport]:  # noqa: B008
    """What `load_pairs` loads, and the account of the loading. Raises as `load_pairs` does.

    Many rows lie in a file, <cache>/rows, which is found again where the sources' bytes and names and the
    options are the same. What a split of the hub holds, and what code of the user's makes of a row, is not
    known before it is loaded: those are loaded anew.
    """
    found, ignored, remarks = find_sources(sources)
    known = not any(source.name.startswith(HUB) for source in found) and not _may_be_own(options)
    file = file_of_rows([source.name for source in found], options) if known else None
    if file and (kept := kept_rows(file)):
        kept[1].ignored, kept[1].remarks = ignored, remarks
        _settle(kept[1], options)
        return kept
    report = PairsReport()
    batches = record_batches(usable_rows(sources, options, report))
    first = next(batches)
    assert report.kind is not None
    return store_rows(chain((first,), batches), report.kind.extras, report, file), report


def _may_be_own(options: LoadOptions) -> bool:
    """Whether a format that the user registered may be what the rows are of."""
    if options.mapping is not None:
        return False
    forms = FORMATS.values() if options.format == "auto" else (named_format(options.format),)
    return any(is_own(form) for form in forms)


def read_pairs(
    sources: Sources, *, format: str = "auto", invalid: str = "error", **options: Any
) -> tuple[list[dict[str, Any]], PairsReport]:
    """What `load_pairs` loads, as plain dicts, and the account of the loading.

    The dicts have only those optional keys that their own row has. Raises as `load_pairs` does.
    """
    report = PairsReport()
    loading = LoadOptions.of(format=format, invalid=invalid, **options)
    return list(usable_rows(sources, loading, report)), report


def stream_rows(sources: Sources, options: LoadOptions, report: PairsReport) -> Iterator[dict[str, Any]]:
    """The usable rows one by one, all else going into the report.

    Raises `InputError` for trouble with structure only, at its place in the stream.
    """
    forced = _forced_format(options)
    found, report.ignored, report.remarks = find_sources(sources)
    first: dict[str, Any] | None = None
    is_text = False
    for source in found:
        for row, kind in _rows_of_source(source, forced, options, report):
            if first is None:
                first, report.kind = row, kind
                is_text = isinstance(row["prompt"], str)
            elif kind is not report.kind or isinstance(row["prompt"], str) != is_text:
                raise _cannot_be_mixed(first, report.kind, row, kind, source)
            yield row


def _forced_format(options: LoadOptions) -> Format | None:
    if options.mapping is not None:
        return mapping_format(options.mapping)
    return None if options.format == "auto" else named_format(options.format)


def _cannot_be_mixed(
    first: dict[str, Any], first_kind: Kind | None, row: dict[str, Any], kind: Kind, source: Source
) -> InputError:
    """What is wrong with two rows that are not of one kind, or not both text or both messages."""
    if first_kind is not None and kind is not first_kind:
        whole = f"{first_kind.rows} and {kind.rows}"
        each = f"{first['source']} is of the {first_kind.rows}, {row['source']} of the {kind.rows}"
    else:
        text, messages = (row, first) if isinstance(row["prompt"], str) else (first, row)
        whole = "text and messages"
        each = f"{text['source']} is text, {messages['source']} is messages"
    return InputError(
        f"{whole} cannot be mixed in one data set: {each}",
        file=source.name,
        mend="Convert one of them, or load them apart",
    )


def usable_rows(sources: Sources, options: LoadOptions, report: PairsReport) -> Iterator[dict[str, Any]]:
    """At least one row; whether unusable ones stop the loading is known at the end of the stream."""
    yield from stream_rows(sources, options, report)
    _settle(report, options)


def _settle(report: PairsReport, options: LoadOptions) -> None:
    if report.problems:
        if not report.made or (options.invalid == "error" and report.unusable):
            raise report.as_error(dropped=options.invalid == "drop")
        _log.warning("left out: %s", report.left_out())
    if said := report.worth_knowing():
        _log.warning("%s", "; ".join(said))


def _rows_of_source(
    source: Source, form: Format | None, options: LoadOptions, report: PairsReport
) -> Iterator[tuple[dict[str, Any], Kind]]:
    account = SourceReport(source.name, form.name if form else "auto")
    report.sources.append(account)
    raw = source.rows()
    first = next(raw, None)
    if first is None:
        raise InputError("there is no row in it", file=source.name)
    while isinstance(first[0], InputError):
        account.read += 1
        report.meet(first[0], first[1])  # which raises, where the report does not go on
        if (first := next(raw, None)) is None:
            return
    form = form or detected_format(first[0], first[1])
    account.format = form.name
    rows = chain((first,), raw)
    gathered = form.gather(rows) if form.gather else rows
    checked, kind = _checked(gathered, form, options, report), form.kind
    if is_grouped(kind, options):
        checked, kind = group_by_prompt(checked, kind, report), LISTS
    require_effect(kind, options, source.name)
    kept, as_kind = None, kind_made(kind, options)
    for row, places in checked:
        try:
            made, left_out = made_of(row, kind, options)
        except BadRow as bad:
            report.meet(places[0].error(bad.message, field=bad.field, mend=bad.mend), places[0])
            continue
        for problem in left_out:
            report.leave_out(problem, places[0])
        if made and places != kept:
            account.kept, kept = account.kept + len(places), places
        account.made += len(made)
        for each in made:
            each["source"] = printable(str(places[0]))
            yield each, as_kind


def _checked(
    rows: Iterator[RawRow], form: Format, options: LoadOptions, report: PairsReport
) -> Iterator[Placed]:
    """Rows as they lie on disk -> what is canonical in them, and where it stands."""
    account = report.sources[-1]
    convert = form.adapter(options.judgement)
    columns: set[str] = set()
    lost, watched = LostColumns(form), []
    for row, place in rows:
        account.read += 1
        if isinstance(row, InputError):
            report.meet(row, place)
            continue
        if not columns.issuperset(row):
            columns.update(row)
            watched = lost.watched(columns)
        looked = not watched
        try:
            for part in form.canonical(row, convert):
                if isinstance(part, UnusablePair):
                    report.leave_out(part.kind, place, part.field, part.message)
                    continue
                if not looked:
                    lost.look_at(row, watched, part)
                    looked = True
                yield part, [place]
        except BadRow as bad:
            error = place.error(f"{bad.message} [format {form.name}]", field=bad.field, mend=bad.mend)
            report.meet(error, place)
    account.unused_columns = form.unused(columns)
    account.lost_columns = lost.rows
