"""An audit as a person reads it in a terminal, and what of it is grave. Writes no file: that is `page`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dpo_kit.audit.findings import SEVERITIES, Audit, Finding
from dpo_kit.audit.words import cost_rows, plural, short_places, visible
from dpo_kit.errors import InputError
from dpo_kit.pairs.schema import KINDS
from dpo_kit.pairs.statistics import Spread
from dpo_kit.pairs.tally import FIRST_PLACES

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_RANKS = {"5": "p5", "25": "p25", "50": "median", "75": "p75", "95": "p95", "99": "p99", "100": "max"}


def print_audit(audit: Audit, console: Console | None = None) -> None:
    """Print sources, what was left out, lengths, findings (the gravest first) and cost to stdout."""
    console = console or Console()
    for part in (_sources, _left_out, _lengths, _tokens, _findings, _cost):
        shown = part(audit)
        if shown is not None:
            console.print(shown)


def require_level(level: str) -> None:
    """Raises `InputError` for a level of strictness that is not `error` or `warning`."""
    if level not in SEVERITIES[:2]:
        raise InputError(f"unknown level '{level}'", field="--strict-level", mend="Known: error, warning")


def objections(audit: Audit, level: str = "warning") -> list[str]:
    """Why `--strict` does not let the data pass: rows that cannot be used, findings of the level or graver.

    Raises `InputError` as `require_level` does.
    """
    require_level(level)
    grave = [finding for finding in audit.findings if _rank(finding.severity) <= _rank(level)]
    named = [f"{finding.severity} {finding.name} ({finding.count:,})" for finding in grave]
    rows = len({str(problem.place) for problem in audit.unusable})
    return [f"{plural(rows, 'row')} cannot be used", *named] if rows else named


def _rank(severity: str) -> int:
    return [*map(str, SEVERITIES)].index(severity)


def print_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Print records one below the other, the first field of each as its head; nothing is cut."""
    console = Console()
    for record in records:
        (_, head), *rest = record.items()
        console.print(Text(visible(str(head)), "bold"))
        for name, value in rest:
            if value not in (None, "", [], {}):
                words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                console.print(
                    Padding(Text(f"{name}: ", "dim").append(visible(words), "default"), (0, 0, 0, 2))
                )


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose columns after the first `left` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def _sources(audit: Audit) -> Table:
    table = _table("Sources", "source", "format", "read", "kept", "made", left=2)
    for source in audit.sources:
        name = Text(visible(source.file))
        if source.unused_columns:
            name.append(f"\ncolumns not used: {visible(', '.join(source.unused_columns))}", "dim")
        table.add_row(name, source.format, *(f"{n:,}" for n in (source.read, source.kept, source.made)))
    if len(audit.sources) > 1:
        table.add_section()
        table.add_row("all", "", *(f"{n:,}" for n in (audit.read, audit.kept, audit.made)))
    if audit.ignored:
        table.caption = Text(f"ignored files: {visible(', '.join(audit.ignored))}", "dim")
    return table


def _left_out(audit: Audit) -> Group | None:
    if not audit.problems:
        return None
    lines = []
    for kind, count in audit.counts.items():
        found = (str(problem.place) for problem in audit.problems if problem.kind == kind)
        line = Text.assemble((f"{count:,} ", "bold"), KINDS[kind].message, (f" [{kind}]", "dim"))
        lines.append(
            Padding(line.append("\n").append(_places(list(islice(found, FIRST_PLACES)), count)), (0, 0, 1, 1))
        )
    return Group(Text("Left out", "bold italic"), *lines)


def _places(places: Sequence[str], count: int) -> Text:
    return Text(visible(short_places(places)) + (", ..." if count > len(places) else ""), "dim")


def _lengths(audit: Audit) -> Group | Text:
    seen = audit.statistics
    if seen is None:
        return Text("No row can be used.", "bold red")
    assert audit.kind is not None
    table = _table(f"Characters of {audit.made:,} {audit.kind.rows}", "part", "median", "p95", "max")
    facts = []
    for field in fields(seen):
        value, name = getattr(seen, field.name), field.name.replace("_", " ")
        if isinstance(value, Spread) and field.name.endswith("_characters"):
            row = f"{value.median:,.0f}", f"{value.p95:,}", f"{value.max:,}"
            table.add_row(name.removesuffix(" characters"), *row)
        elif isinstance(value, Spread):
            facts.append(f"{name} of a list: {value.median:,.0f} (median), {value.max:,} (max)")
        elif isinstance(value, float):
            facts.append(f"{name.removesuffix(' share')}: {value:.1%}")
        elif isinstance(value, int):
            facts.append(f"{name}: {value:,}")
    return Group(table, Padding(Text("   ".join(facts)), (0, 0, 1, 1)))


def _tokens(audit: Audit) -> Table | None:
    lengths = audit.figures.get("tokens", {}).get("lengths") or {}
    if not lengths:
        return None
    ranks = list(next(iter(lengths.values()))["percentiles"])
    table = _table("Tokens", "part", *(_RANKS.get(str(rank), str(rank)) for rank in ranks))
    for part, found in lengths.items():
        table.add_row(part, *(f"{found['percentiles'].get(rank, 0):,.0f}" for rank in ranks))
    return table


def _findings(audit: Audit) -> Group | Text:
    if not audit.findings:
        return Text("No findings." if audit.statistics else "")
    return Group(Text("Findings", "bold italic"), *map(_finding, audit.findings))


def _finding(finding: Finding) -> Padding:
    text = Text.assemble((f"{finding.severity:<8}", STYLES[finding.severity]), visible(finding.sentence))
    text.append(f"\n{visible(finding.advice)}", "italic").append(f" [{finding.name}]", "dim")
    if finding.places:
        text.append("\n").append(_places(finding.places[:FIRST_PLACES], len(finding.places)))
    return Padding(text, (0, 0, 1, 1))


def _cost(audit: Audit) -> Table | None:
    rows = cost_rows(audit.figures.get("cost") or {})
    if not rows:
        return None
    table = _table("What training on it costs", "figure", "value")
    for label, value in rows:
        table.add_row(label, value)
    return table
