"""An audit as a person reads it in a terminal, and what of it is grave. Writes no file: that is `page`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dpo_kit.audit.findings import SEVERITIES, Audit, Finding
from dpo_kit.audit.words import (
    LENGTH_COLUMNS,
    accounts,
    by_source_in_words,
    cost_rows,
    facts,
    left_out,
    length_rows,
    plural,
    token_rows,
    visible,
)
from dpo_kit.errors import InputError
from dpo_kit.pairs.tally import FIRST_PLACES, rows_of, short_places

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


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
    """Why `--strict` does not let the data pass: rows that cannot be used (held-out ones too),
    findings of the level or graver.

    Raises `InputError` as `require_level` does.
    """
    require_level(level)
    grave = [finding for finding in audit.findings if _rank(finding.severity) <= _rank(level)]
    named = [f"{finding.severity} {finding.name} ({finding.count:,})" for finding in grave]
    unusable = []
    for account in accounts(audit):
        rows = rows_of(account.unusable)
        which = "row" if account is audit else "held-out row"
        if rows:
            unusable.append(f"{plural(rows, which)} cannot be used")
    return [*unusable, *named]


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
    for account in accounts(audit):
        for source in account.sources:
            name = Text(visible(source.file)).append("" if account is audit else " (held out)", "dim")
            if source.unused_columns:
                name.append(f"\ncolumns not used: {visible(', '.join(source.unused_columns))}", "dim")
            table.add_row(name, source.format, *(f"{n:,}" for n in (source.read, source.kept, source.made)))
        if len(account.sources) > 1:
            whole = "all" if account is audit else "all held out"
            table.add_section()
            table.add_row(whole, "", *(f"{n:,}" for n in (account.read, account.kept, account.made)))
        table.add_section()
    if ignored := [file for account in accounts(audit) for file in account.ignored]:
        table.caption = Text(f"ignored files: {visible(', '.join(ignored))}", "dim")
    return table


def _left_out(audit: Audit) -> Group | None:
    lines = []
    for reason in left_out(audit):
        kind = f" [{reason.kind}{', held out' if reason.held_out else ''}]"
        line = Text.assemble((f"{reason.count:,} ", "bold"), reason.message, (kind, "dim"))
        if by_source := by_source_in_words(reason):
            line.append(f"\n{by_source}")
        places = _places(reason.places[:FIRST_PLACES], reason.count)
        lines.append(Padding(line.append("\n").append(places), (0, 0, 1, 1)))
    return Group(Text("Left out", "bold italic"), *lines) if lines else None


def _places(places: Sequence[str], count: int) -> Text:
    return Text(visible(short_places(places)) + (", ..." if count > len(places) else ""), "dim")


def _lengths(audit: Audit) -> Group | Text:
    seen = audit.statistics
    if seen is None:
        return Text("No row can be used.", "bold red")
    assert audit.kind is not None
    table = _table(f"Characters of {audit.made:,} {audit.kind.rows}", *LENGTH_COLUMNS)
    for row in length_rows(seen):
        table.add_row(*row)
    return Group(table, Padding(Text("   ".join(facts(audit))), (0, 0, 1, 1)))


def _tokens(audit: Audit) -> Table | None:
    if (found := token_rows(audit)) is None:
        return None
    columns, rows = found
    table = _table("Tokens", *columns)
    for row in rows:
        table.add_row(*row)
    return table


def _findings(audit: Audit) -> Group | Text:
    if not audit.findings:
        return Text("No findings." if audit.statistics else "")
    return Group(Text("Findings", "bold italic"), *map(_finding, audit.findings))


def _finding(finding: Finding) -> Padding:
    text = Text.assemble((f"{finding.severity:<8}", STYLES[finding.severity]), visible(finding.sentence))
    text.append(f"\n{visible(finding.advice)}", "italic").append(f" [{visible(finding.name)}]", "dim")
    if finding.places:
        text.append("\n").append(_places(finding.places[:FIRST_PLACES], len(finding.places)))
    return Padding(text, (0, 0, 1, 1))


def _cost(audit: Audit) -> Table | None:
    rows = cost_rows(audit.figures.get("cost") or {})
    if not rows:
        return None
    table = _table("What training on it costs", "figure", "value")
    for label, value in rows:
        table.add_row(label, visible(value))
    return table
