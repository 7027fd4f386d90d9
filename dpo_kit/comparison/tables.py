"""A comparison's tables for people: at the terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from dpo_kit.comparison.results import read_table

Row = dict[str, str]
Table = tuple[str, list[str], list[list[str]]]


def tables(folder: Path) -> list[Table]:
    """Title, header and rows of each table: reward at matched KL, costs, and runs that did not end well."""
    found = [_matched(read_table(folder / "matched.csv")), _costs(read_table(folder / "costs.csv"))]
    bad = [row for row in read_table(folder / "runs.csv") if row["outcome"] != "done"]
    if bad:
        rows = [[row["run"], row["outcome"], row["step"], row["problem"]] for row in bad]
        found.append(
            ("Runs that did not end as planned", ["run", "how", "last measured at step", "why"], rows)
        )
    return found


def print_tables(folder: Path) -> None:
    """Print them to stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160
    for title, header, rows in tables(folder):
        table = RichTable(title=title, title_justify="left")
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown_tables(folder: Path) -> str:
    """The same as Markdown, for a README."""
    parts = []
    for title, header, rows in tables(folder):
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _matched(rows: Sequence[Row]) -> Table:
    """Methods down, levels across; marked where the interval of the difference from DPO leaves out 0."""
    levels = list(dict.fromkeys(row["kl"] for row in rows))
    by_method: dict[str, list[str]] = {}
    for row in rows:
        by_method.setdefault(row["label"], []).append(_reward(row))
    header = ["method", *(f"KL {float(level):g}" for level in levels)]
    title = "True reward at matched KL, 95% interval (▼ below DPO beyond chance, ▲ above)"
    return title, header, [[label, *cells] for label, cells in by_method.items()]


def _reward(row: Row) -> str:
    if not row["reward"]:
        return ""
    mark = ""
    if row["difference_low"]:
        mark = " ▼" if float(row["difference_low"]) > 0 else " ▲" if float(row["difference_high"]) < 0 else ""
    return f"{float(row['reward']):+.2f} [{float(row['low']):+.2f}, {float(row['high']):+.2f}]{mark}"


_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("runs", "runs", lambda value: f"{value:.0f}"),
    ("seconds", "s a run", lambda value: f"{value:.0f}"),
    ("times_dpo", "x DPO", lambda value: f"{value:.1f}"),
    ("tokens", "tokens, M", lambda value: f"{value / 1e6:.2f}"),
    ("tokens_sampled", "sampled, M", lambda value: f"{value / 1e6:.2f}"),
    ("peak_memory_bytes", "peak, GB", lambda value: f"{value / 1e9:.2f}"),
    ("reward", "best reward", lambda value: f"{value:+.2f}"),
    ("kl", "at KL", lambda value: f"{value:.1f}"),
)


def _costs(rows: Sequence[Row]) -> Table:
    header = ["method", *(name for _, name, _ in _COSTS)]
    body = [
        [row["label"], *(form(float(row[key])) if row[key] else "" for key, _, form in _COSTS)]
        for row in rows
    ]
    return "What it costs: means over a method's finished runs, and work that is shared", header, body
