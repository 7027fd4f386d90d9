"""The audit of preference data: every check over the streamed rows, which are not held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_kit.audit.findings import Audit, Check, Example
from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.loading import Sources, stream_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.statistics import Gatherer


def inspect_pairs(
    sources: Sources, *, held_out: Sources | None = None, format: str = "auto", **options: Any
) -> Audit:
    """The account of a loading that leaves unusable rows out, with all that the checks find in the rows kept.

    Parameters
    ----------
    sources, format, options: as for `load_pairs`; the rows may be of any one kind.
    held_out: sources of evaluation data, for what is in both.

    Raises `InputError` for trouble with structure (broken files, missing fields), never for unusable rows;
    where no row is usable, there are no statistics.
    """
    loading = LoadOptions.of(format=format, **options)
    audit, gatherer = Audit(), Gatherer()
    checks = make_checks()
    for example in _examples(sources, held_out, loading, audit):
        if not example.held_out:
            gatherer.add(dict(example.row), example.kind)
        for check in checks:
            check.add(example)
    audit.statistics = gatherer.statistics(audit.kind)
    if audit.statistics is not None:
        for check in checks:
            audit.take_in(check.name, check.result())
    return audit


def make_checks() -> list[Check]:
    """A fresh one of every check."""
    return []


def _examples(
    sources: Sources, held_out: Sources | None, options: LoadOptions, audit: Audit
) -> Iterator[Example]:
    for row in stream_rows(sources, options, audit):
        assert audit.kind is not None
        yield _example(row, audit.kind, audit.sources[-1].file, held_out=False)
    if held_out is None:
        return
    other = Audit()
    for row in stream_rows(held_out, options, other):
        assert other.kind is not None
        yield _example(row, other.kind, other.sources[-1].file, held_out=True)


def _example(row: dict[str, Any], kind: Kind, source: str, *, held_out: bool) -> Example:
    return Example(
        row=row,
        kind=kind,
        prompt=plain_text(row["prompt"]),
        replies=tuple(plain_text(reply) for reply in kind.parts(row).values()),
        place=row["source"],
        source=source,
        held_out=held_out,
    )
