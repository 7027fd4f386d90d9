"""A comparison's tables for people: their columns, marks and words, wherever they are shown.

At the terminal and as Markdown here; `page` has the same in HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dpo_kit.comparison.findings import intervals, side, signed
from dpo_kit.comparison.record import Interval, Level, Record
from dpo_kit.report.summary import amount, duration, memory
from dpo_kit.shown_text import visible


class Table(NamedTuple):
    """A table in words; `note` stands below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


# How a method stands to the base at a KL: see `findings.side`.
MARKS = {1: "▼", 0: "≈", -1: "▲"}

COST_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("runs", "Runs", lambda value: f"{value:.0f}"),
    ("diverged", "Diverged", lambda value: f"{value:.0f}"),
    ("seconds", "Time of a run", duration),
    ("times_dpo", "Time, {base} = 1", lambda value: f"{value:.1f}"),
    ("tokens", "Tokens computed", amount),
    ("tokens_sampled", "Tokens sampled", amount),
    ("peak_memory_bytes", "Peak memory", memory),
    ("reward", "Best final reward", signed),
    ("kl", "at a KL of", lambda value: f"{value:.1f}"),
)


def mark(level: Level) -> str:
    """Whether a method is below or above the base; nothing for the base, and where the base is not there."""
    return "" if level.below is None else MARKS[side(level)]


def range_of(found: Interval) -> str:
    return f"[{signed(found.low)}, {signed(found.high)}]"


def legend(record: Record) -> str:
    """What the marks and the intervals of rewards at matched KL say."""
    base = record.label(record.base)
    return (
        f"▼ below {base} beyond chance, ▲ above it, ≈ not to be told apart (whether the 95% interval of the "
        f"difference holds 0); no mark where {base} does not reach that KL. {intervals(record)}"
    )


def cost_header(record: Record) -> list[str]:
    return [name.format(base=record.label(record.base)) for _, name, _ in COST_COLUMNS]


def cost_cells(row: dict[str, str]) -> list[str]:
    """A line of costs.csv in words, a cell for each of `COST_COLUMNS`; empty where there is no figure."""
    return [form(float(row[key])) if row.get(key) else "" for key, _, form in COST_COLUMNS]


def tables(folder: Path) -> list[Table]:
    """Reward at matched KL, costs, and the runs that did not end well, where there are such."""
    record = Record(folder)
    found = [_matched(record), _costs(record)]
    bad = [row for row in record.runs if row["outcome"] != "done"]
    if bad:
        rows = [[row["run"], row["outcome"], row["step"], row["problem"]] for row in bad]
        header = ["Run", "How", "Last measured at step", "Why"]
        found.append(Table("Runs that did not end as planned", header, rows, ""))
    return found


def print_tables(folder: Path) -> None:
    """Print them to stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160
    for title, header, rows, note in tables(folder):
        # Text is shown as it is: what stands in brackets would else be markup.
        table = RichTable(title=Text(title), title_justify="left", caption=Text(note), caption_justify="left")
        for place, name in enumerate(header):
            table.add_column(Text(name), justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        console.print(table)


def markdown_tables(folder: Path) -> str:
    """The same as Markdown, for a README."""
    parts = []
    for title, header, rows, note in tables(folder):
        lines = [_row(header), _row(["---"] + ["---:"] * (len(header) - 1)), *(_row(row) for row in rows)]
        parts += [f"**{_escaped(title)}**", "\n".join(lines), *([_escaped(note)] if note else [])]
    return "\n\n".join(parts)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """What Markdown would take for the end of a cell, for HTML or for emphasis."""
    return re.sub(r"([\\|<*`])", r"\\\1", text)


def _matched(record: Record) -> Table:
    """Methods down, levels across."""
    levels = {level: record.matched(level) for level in record.levels}
    rows = [
        [record.label(method), *(_reward(found.get(method)) for found in levels.values())]
        for method in record.section["methods"]
    ]
    header = ["Method", *(f"KL {level:g}" for level in levels)]
    title = "Mean true reward at matched KL, with its 95% interval"
    return Table(title, header, rows, f"{legend(record)}.")


def _reward(level: Level | None) -> str:
    if level is None:
        return ""
    return f"{signed(level.reward.value)} {range_of(level.reward)} {mark(level)}".strip()


def _costs(record: Record) -> Table:
    header = ["Method", *cost_header(record)]
    body = [[row["label"], *cost_cells(row)] for row in record.costs]
    title = "What it costs: means over a method's finished runs, and work that is shared"
    return Table(title, header, body, "What is shared is done once for all runs, and is not in theirs.")
