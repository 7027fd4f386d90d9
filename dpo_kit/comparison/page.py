"""frontier.html of a comparison's folder: what was found, in words, pictures, tables and samples.

One file, as the pages of `report`: pictures inside, no script, nothing fetched, every value escaped. Prompts,
replies, settings and logs are hostile text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from dpo_kit.comparison.findings import central_level, lead, signed, with_interval
from dpo_kit.comparison.pictures import draw, look
from dpo_kit.comparison.record import START, Point, Record
from dpo_kit.comparison.tables import cost_cells, cost_header, legend, mark, range_of
from dpo_kit.report.page import Drawn, render, require_extra, write_whole
from dpo_kit.report.summary import Card, as_text, duration

PROMPTS_SHOWN = 6
# Of the worst runs.
END_SAMPLES_SHOWN = 3
REPLY_SHOWN = 2000
# Beyond so many times the highest KL compared, a run has left the reference behind.
FAR = 2.0

TITLES = {
    "frontier": "Reward against KL to the SFT policy, by method",
    "convergence": "Reward and KL against seconds of training and tokens computed, by method",
}


def write_page(folder: Path) -> Path:
    """Draw the pictures, write FOLDER/frontier.html, and return its path.

    Raises:
        InputError: the folder holds no comparison, a file in it is broken, or the `report` extra is missing.
    """
    require_extra()
    record = Record(folder)
    drawn = {path.stem: Drawn.of(path.stem, TITLES[path.stem], path.read_bytes()) for path in draw(folder)}
    level = central_level(record)
    html = render(
        "frontier.html.j2",
        folders=[Path(__file__).parent],
        title=f"Reward against KL: {folder.resolve().name}",
        cards=_cards(record),
        findings=lead(record),
        unfinished=_unfinished(record),
        pictures=drawn,
        base=record.label(record.base),
        levels=[f"{each:g}" for each in record.levels],
        matched=_matched(record),
        costs=_costs(record),
        cost_columns=cost_header(record),
        legend=legend(record),
        level=None if level is None else f"{level:g}",
        samples=_samples(record, level),
        has_expected=any(map(record.is_best_of_n, record.methods)),
        worst=_worst(record),
        runs=[_run(record, row) for row in record.runs],
        recipe=record.recipe_text,
        environment=_environment(record),
    )
    page = folder / "frontier.html"
    write_whole(page, html.encode("utf-8", "backslashreplace"))
    return page


def _cards(record: Record) -> list[Card]:
    done = [row for row in record.runs if row["outcome"] == "done"]
    bad = [row for row in record.runs if row["outcome"] in ("failed", "diverged")]
    taken = [float(row["seconds"]) for row in record.costs if row["method"] == record.base and row["seconds"]]
    cards = [
        Card("Methods", f"{len(record.methods)}", "measured"),
        Card(
            "Runs finished",
            f"{len(done)} of {len(record.runs)}",
            f"{len(bad)} failed or diverged" if bad else "",
        ),
        Card("Evaluations", f"{len(record.points):,}", _prompts_clause(record)),
    ]
    label = record.label(record.base)
    return cards + [Card(f"A run of {label}", duration(each), "of training") for each in taken]


def _prompts_clause(record: Record) -> str:
    found = next((len(rewards) for p in record.points if len(rewards := record.rewards(p))), 0)
    return f"each on {found:,} prompts" if found else ""


def _unfinished(record: Record) -> str:
    """What is still to come, in words."""
    counts: dict[str, int] = {}
    for row in record.runs:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    missing = [method for method in record.section["methods"] if method not in record.methods]
    said = []
    if counts.get("unfinished") or counts.get("failed"):
        left = counts.get("unfinished", 0) + counts.get("failed", 0)
        said.append(
            f"{left} of {len(record.runs)} runs have not finished; what they measured so far is shown."
        )
    if missing:
        names = ", ".join(record.label(method) for method in missing)
        said.append(f"Nothing has been measured yet of {names}.")
    return " ".join(said)


def _matched(record: Record) -> list[dict[str, Any]]:
    """A row for each method, a cell for each level."""
    tables = [record.matched(level) for level in record.levels]
    rows = []
    for method in record.section["methods"]:
        cells: list[dict[str, Any] | None] = []
        for found in tables:
            each = found.get(method)
            if each is None:
                cells.append(None)
                continue
            cells.append(
                {
                    "value": signed(each.reward.value),
                    "interval": range_of(each.reward),
                    "best": each.reward.value == max(other.reward.value for other in found.values()),
                    "mark": mark(each),
                    "below": "" if each.below is None else with_interval(each.below),
                }
            )
        rows.append({"label": record.label(method), "colour": _colour(record, method), "cells": cells})
    return rows


def _colour(record: Record, method: str) -> str:
    if method == START:
        return "#000000"
    return str(look(record, method)["color"]) if method in record.methods else "transparent"


def _costs(record: Record) -> list[dict[str, Any]]:
    rows = []
    for row in record.costs:
        shared = row["method"] not in record.section["methods"]
        rows.append({"label": row["label"], "shared": shared, "cells": cost_cells(row)})
    return rows


def _samples(record: Record, level: float | None) -> list[dict[str, Any]]:
    """The first prompts, each with a reply of every method's evaluation that is nearest to a KL."""
    if level is None or record.start is None:
        return []
    points = [record.start, *(record.nearest(record.of(m), level) for m in record.methods)]
    columns = [(point, _first_replies(record, point)) for point in points if point is not None]
    columns = [(point, replies) for point, replies in columns if replies]
    prompts = list(columns[0][1])[:PROMPTS_SHOWN] if columns else []
    return [
        {
            "prompt": prompt,
            "rows": [
                _reply(record, point, replies[prompt]) for point, replies in columns if prompt in replies
            ],
        }
        for prompt in prompts
    ]


def _first_replies(record: Record, point: Point) -> dict[str, dict[str, Any]]:
    """The first reply to each prompt, by the prompt's text."""
    found: dict[str, dict[str, Any]] = {}
    for reply in record.replies(point):
        found.setdefault(as_text(reply["prompt"]), reply)
    return found


def _reply(record: Record, point: Point, reply: dict[str, Any]) -> dict[str, Any]:
    text = as_text(reply["reply"])
    return {
        "label": record.label(point.method),
        "colour": _colour(record, point.method),
        "setting": "" if point.method == START else point.setting,
        "kl": f"{point.kl:.1f}",
        "reward": signed(reply["reward"]),
        "expected": record.is_best_of_n(point.method),
        "reply": text if len(text) <= REPLY_SHOWN else f"{text[:REPLY_SHOWN]}…",
    }


def _worst(record: Record) -> list[dict[str, Any]]:
    """Of each method that went wrong the run that ended worst, and what it writes.

    Wrong is a mean reward at the end that is below the SFT policy's by more than two standard errors of the
    difference over prompts, or a KL at the end far beyond those that are compared.
    """
    found = []
    for method in record.methods:
        if record.is_best_of_n(method) or record.start is None:
            continue
        ends = [[p for p in run if p.finite][-1:] for run in record.runs_of(method).values()]
        wrong = [(point, why) for end in ends for point in end if (why := _wrong(record, point))]
        if wrong:
            point, why = min(wrong, key=lambda pair: pair[0].reward)
            replies = list(_first_replies(record, point).items())[:END_SAMPLES_SHOWN]
            setting = f", {point.setting}" if point.setting else ""
            found.append(
                {
                    "title": f"{record.label(method)}{setting}",
                    "why": why,
                    "count": f"{len(wrong)} of {len(ends)}",
                    "replies": [(prompt, _reply(record, point, reply)) for prompt, reply in replies],
                }
            )
    return found


def _wrong(record: Record, point: Point) -> str:
    start = record.start
    assert start is not None
    gain, error = record.gain(point)
    place = f"at step {point.step}, at a KL of {point.kl:.1f} nats"
    if gain < -2 * error:
        return f"mean reward {signed(point.reward)} {place}, below the SFT policy's {signed(start.reward)}"
    if point.kl > FAR * max(record.levels):
        return f"mean reward {signed(point.reward)} {place}, far from the SFT policy"
    return ""


def _run(record: Record, row: dict[str, str]) -> dict[str, Any]:
    links = {}
    for name, path in (
        ("folder", f"{row['run']}/"),
        ("log", f"{row['run']}.log"),
        ("recipe", f"{row['run']}.yaml"),
    ):
        if (record.folder / "runs" / path).exists():
            links[name] = f"runs/{quote(path)}"
    return {
        "label": row["label"],
        "colour": _colour(record, row["method"]),
        "setting": row["setting"],
        "seed": row["seed"],
        "outcome": row["outcome"],
        "problem": row["problem"],
        "figures": [f"{float(row[key]):{form}}" if row[key] else "" for key, form in RUN_FIGURES],
        "links": links,
    }


RUN_FIGURES = (("step", ".0f"), ("reward", "+.2f"), ("kl", ".1f"))


def _environment(record: Record) -> str | None:
    """Of the first run that wrote it down; all runs of a comparison share a machine."""
    for row in record.runs:
        path = record.folder / "runs" / row["run"] / "environment.json"
        if path.exists():
            return path.read_text(encoding="utf-8")
    return None
