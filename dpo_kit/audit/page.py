"""An audit -> a folder: audit.html (one page, pictures inside), audit.json, plots/*.png, rows/NAME.jsonl.

The page is made of the templates of `report`: no script, nothing fetched, every value escaped. Needs the
`report` extra.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_kit.audit.findings import SEVERITIES, Audit, Finding
from dpo_kit.audit.words import cost_rows, plural, short_places, visible
from dpo_kit.errors import InputError
from dpo_kit.pairs.schema import KINDS
from dpo_kit.pairs.statistics import Spread
from dpo_kit.pairs.tally import SourceReport
from dpo_kit.report.page import render, require_extra, write_page, write_whole
from dpo_kit.report.summary import Card, percent

PLACES_SHOWN = 8
# A page is for reading; the finding's file in rows/ names all.
EXAMPLES_SHOWN = 5
TEXT_SHOWN = 1500


def write_audit(audit: Audit, folder: Path | str, *, title: str) -> Path:
    """Write the folder and return the path of its page.

    An earlier audit there is replaced, with its pictures and rows; rows/NAME.jsonl, of a finding or a kind
    of problem, has a line {"source": place} for each row. Raises `InputError` where the folder cannot be
    written, or the `report` extra is not installed.
    """
    require_extra()
    from dpo_kit.audit.pictures import draw_pictures

    folder = Path(folder).expanduser()
    drawn = draw_pictures(audit)
    html = render(
        "page.html.j2",
        folders=[Path(__file__).parent],
        title=f"Audit of {visible(title)}",
        cards=_cards(audit),
        findings=[_finding(finding) for finding in audit.findings],
        checked=bool(audit.figures),
        pictures=list(drawn),
        sources=[_source(source) for source in audit.sources],
        problems=_problems(audit),
        ignored=visible(", ".join(audit.ignored)),
        lengths=_lengths(audit),
        cost=cost_rows(audit.figures.get("cost") or {}),
    )
    rows = _rows(audit)
    try:
        _clear(folder, plots={each.name for each in drawn}, rows=set(rows))
        page = write_page(folder / "audit.html", html, drawn)
        text = json.dumps(audit.to_dict(), ensure_ascii=False, indent=1)
        write_whole(folder / "audit.json", text.encode("utf-8", "backslashreplace"))
        (folder / "rows").mkdir(exist_ok=True)
        for name, places in rows.items():
            write_whole(folder / "rows" / f"{name}.jsonl", _lines(places))
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", file=error.filename or folder) from error
    return page


def _clear(folder: Path, *, plots: set[str], rows: set[str]) -> None:
    """Take out what an earlier audit left in the folder and this one has not: nothing but its own files."""
    if not (folder / "audit.json").exists():
        return
    for path in (*(folder / "plots").glob("*.png"), *(folder / "rows").glob("*.jsonl")):
        if path.stem not in (plots if path.parent.name == "plots" else rows):
            path.unlink()


def _rows(audit: Audit) -> dict[str, list[str]]:
    """The places of each finding and of each kind of problem, by a name that a file can have."""
    rows: dict[str, list[str]] = {}
    for problem in audit.problems:
        rows.setdefault(_file_name(problem.kind), []).append(str(problem.place))
    for finding in audit.findings:
        if finding.places:
            rows.setdefault(_file_name(finding.name), []).extend(finding.places)
    return rows


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _lines(places: Iterable[str]) -> bytes:
    lines = (json.dumps({"source": place}, ensure_ascii=False) for place in places)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def _cards(audit: Audit) -> list[Card]:
    """The headline figures, those there are."""
    left_out = len({str(problem.place) for problem in audit.problems})
    made = audit.kind.rows if audit.kind else "examples"
    source = plural(len(audit.sources), "source")
    seen = audit.statistics
    cards = [
        Card("Rows read", f"{audit.read:,}", source),
        Card("Rows kept", f"{audit.kept:,}", percent(audit.kept / audit.read) if audit.read else ""),
        Card(
            f"{made.capitalize()} made",
            f"{audit.made:,}",
            f"of {plural(seen.distinct_prompts, 'different prompt')}" if seen else "",
        ),
        Card("Left out", f"{left_out:,}", "rows, in whole or in part" if left_out else ""),
    ]
    counts = {name: sum(each.severity == name for each in audit.findings) for name in SEVERITIES}
    if audit.figures:
        words = [plural(count, name) for name, count in counts.items() if count]
        cards.append(Card("Findings", f"{len(audit.findings)}", ", ".join(words)))
    longer = getattr(seen, "longer_chosen_share", None)
    if longer is not None:
        cards.append(Card("Longer reply preferred", percent(longer), "of pairs of unequal length"))
    model = (audit.figures.get("shallow") or {}).get("model")
    if model:
        cards.append(Card("Won without reading", percent(model["accuracy"]), "of held-out labels"))
    saved = (audit.figures.get("cost") or {}).get("saved_share")
    if saved is not None:
        cards.append(Card("Saved by the tree", percent(saved), "of tokens of sequences apart"))
    return cards


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "name": visible(finding.name.replace("_", " ")),
        "file": f"rows/{_file_name(finding.name)}.jsonl",
        "severity": finding.severity,
        "count": f"{finding.count:,} of {finding.of:,}",
        "sentence": visible(finding.sentence),
        "advice": visible(finding.advice),
        "places": visible(short_places(finding.places[:PLACES_SHOWN])),
        "more": len(finding.places) > PLACES_SHOWN,
        "examples": [
            {visible(label): _clipped(text) for label, text in example.items()}
            for example in finding.examples[:EXAMPLES_SHOWN]
        ],
    }


def _clipped(text: Any) -> str:
    words = visible(str(text))
    return words if len(words) <= TEXT_SHOWN else f"{words[:TEXT_SHOWN]}…"


def _source(source: SourceReport) -> dict[str, str]:
    counts = {name: f"{getattr(source, name):,}" for name in ("read", "kept", "made")}
    unused = visible(", ".join(source.unused_columns))
    return {"file": visible(source.file), "format": source.format, "unused": unused, **counts}


def _problems(audit: Audit) -> list[dict[str, Any]]:
    problems = []
    for kind, count in audit.counts.items():
        places = (str(problem.place) for problem in audit.problems if problem.kind == kind)
        words = visible(short_places(list(islice(places, PLACES_SHOWN))))
        more = ", …" if count > PLACES_SHOWN else ""
        known = KINDS[kind]
        problems.append(
            {
                "kind": kind,
                "message": known.message,
                "mend": known.mend,
                "count": count,
                "places": words + more,
            }
        )
    return problems


def _lengths(audit: Audit) -> list[tuple[str, list[str]]]:
    """Rows (part, [median, 95th percentile, greatest]) of the lengths in characters."""
    seen = audit.statistics
    if seen is None:
        return []
    spreads = [(each.name.replace("_", " "), getattr(seen, each.name)) for each in fields(seen)]
    return [
        (name, [f"{spread.median:,.0f}", f"{spread.p95:,}", f"{spread.max:,}"])
        for name, spread in spreads
        if isinstance(spread, Spread)
    ]
