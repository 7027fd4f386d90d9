"""An audit -> a folder: audit.html (one page, pictures inside), audit.json, plots/*.png, rows/NAME.jsonl.

The page is made of the templates of `report`: no script, nothing fetched, every value escaped. Needs the
`report` extra.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dpo_kit.audit.findings import SEVERITIES, Account, Audit, Finding
from dpo_kit.audit.words import (
    LENGTH_COLUMNS,
    LeftOut,
    accounts,
    by_source_in_words,
    cost_rows,
    facts,
    left_out,
    length_rows,
    plural,
    setting_rows,
    token_rows,
    visible,
)
from dpo_kit.errors import InputError
from dpo_kit.pairs.tally import SourceReport, rows_of, short_places
from dpo_kit.report.page import render, require_extra, write_page, write_whole
from dpo_kit.report.summary import Card, percent

PLACES_SHOWN = 8
# A page is for reading; the finding's file in rows/ names all.
EXAMPLES_SHOWN = 5
TEXT_SHOWN = 1500
# Of all tokens: what keeping prompts together saves beyond a random order.
_WORTH_SAYING = 0.01


def write_audit(audit: Audit, folder: Path | str, *, title: str) -> Path:
    """Write the folder and return the path of its page.

    An earlier audit there is replaced, with its pictures and rows; rows/NAME.jsonl, of a finding or a kind
    of problem, has a line {"source": place} for each row. Raises `InputError` where the folder cannot be
    written, or the `report` extra is not installed.
    """
    require_folder(folder)
    require_extra()
    from dpo_kit.audit.pictures import draw_pictures

    folder = Path(folder).expanduser()
    drawn = draw_pictures(audit)
    rows, files = _rows(audit)
    tokens = token_rows(audit)
    html = render(
        "page.html.j2",
        folders=[Path(__file__).parent],
        title=f"Audit of {visible(title)}",
        settings=setting_rows(audit),
        cards=_cards(audit),
        findings=[_finding(finding, files.get(i)) for i, finding in enumerate(audit.findings)],
        checked=bool(audit.figures),
        pictures=list(drawn),
        sources=[_source(each, account, audit) for account in accounts(audit) for each in account.sources],
        problems=[_problem(reason) for reason in left_out(audit)],
        ignored=visible(", ".join(file for account in accounts(audit) for file in account.ignored)),
        tables=[
            *([("Tokens", *tokens)] if tokens else []),
            *([("Characters", LENGTH_COLUMNS, length_rows(audit.statistics))] if audit.statistics else []),
        ],
        facts=facts(audit),
        cost=cost_rows(audit.figures.get("cost") or {}),
    )
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


def require_folder(folder: Path | str) -> None:
    """Raises `InputError` where a file is in the place of the folder."""
    path = Path(folder).expanduser()
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                problem = "this is a file, and cannot be written into"
                raise InputError(problem, file=place, field="--out", mend="Name a folder")
            return


def _clear(folder: Path, *, plots: set[str], rows: set[str]) -> None:
    """Take out what an earlier audit left in the folder and this one has not: nothing but its own files."""
    if not (folder / "audit.json").exists():
        return
    for path in (*(folder / "plots").glob("*.png"), *(folder / "rows").glob("*.jsonl")):
        if path.stem not in (plots if path.parent.name == "plots" else rows):
            path.unlink()


def _rows(audit: Audit) -> tuple[dict[str, Sequence[str]], dict[int, str]]:
    """Places by the name of their file, of each reason and each finding its own; and the findings' names."""
    rows: dict[str, Sequence[str]] = {_name_of_reason(reason): reason.places for reason in left_out(audit)}
    files = {}
    for i, finding in enumerate(audit.findings):
        if finding.places:
            base = name = _file_name(finding.name)
            number = 1
            while name in rows:
                number += 1
                name = f"{base}-{number}"
            rows[name] = finding.places
            files[i] = name
    return rows, files


def _name_of_reason(reason: LeftOut) -> str:
    return f"held_out-{reason.kind}" if reason.held_out else reason.kind


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _lines(places: Iterable[str]) -> bytes:
    lines = (json.dumps({"source": place}, ensure_ascii=False) for place in places)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def _cards(audit: Audit) -> list[Card]:
    """The headline figures, those there are."""
    lost = rows_of(audit.problems)
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
        Card("Left out", f"{lost:,}", "rows, in whole or in part" if lost else ""),
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
        cards.append(Card("Guessed without reading", percent(model["accuracy"]), "chance 50 %"))
    cost = audit.figures.get("cost") or {}
    if "saved_share" in cost:
        together = (cost.get("orders") or {}).get("by_prompt", 0.0)
        more = together - cost["saved_share"] >= _WORTH_SAYING
        note = f"of tokens; with group_by_prompt {percent(together)}" if more else "of tokens"
        cards.append(Card("Saved by the tree", percent(cost["saved_share"]), note))
    if audit.held_out is not None:
        cards.append(Card("Held out", f"{audit.held_out.made:,}", f"of {audit.held_out.read:,} rows read"))
    return cards


def _finding(finding: Finding, file: str | None) -> dict[str, Any]:
    return {
        "name": visible(finding.name.replace("_", " ")),
        "file": f"rows/{file}.jsonl" if file else None,
        "severity": finding.severity,
        "count": f"{finding.count:,} of {finding.of:,}" if finding.places else "",
        "sentence": _spans(finding.sentence),
        "advice": _spans(finding.advice),
        "places": visible(short_places(finding.places[:PLACES_SHOWN])),
        "more": len(finding.places) > PLACES_SHOWN,
        "examples": [
            {visible(label): _clipped(text) for label, text in example.items()}
            for example in finding.examples[:EXAMPLES_SHOWN]
        ],
    }


def _spans(text: str) -> list[tuple[bool, str]]:
    """(whether it is code, words) of a text that has code between backticks."""
    parts = re.split(r"`([^`\n]+)`", visible(text))
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part]


def _clipped(text: Any) -> str:
    words = visible(str(text)).strip("\n")
    return words if len(words) <= TEXT_SHOWN else f"{words[:TEXT_SHOWN]}…"


def _source(source: SourceReport, account: Account, audit: Audit) -> dict[str, str]:
    counts = {name: f"{getattr(source, name):,}" for name in ("read", "kept", "made")}
    reasons = ", ".join(f"{kind} {count:,}" for kind, count in account.counts_of(source).items())
    return {
        "file": visible(source.file) + ("" if account is audit else " (held out)"),
        "format": source.format,
        "unused": visible(", ".join(source.unused_columns)),
        "left_out": reasons,
        **counts,
    }


def _problem(reason: LeftOut) -> dict[str, Any]:
    places = visible(short_places(reason.places[:PLACES_SHOWN]))
    return {
        "kind": reason.kind + (", held out" if reason.held_out else ""),
        "message": reason.message,
        "mend": _spans(reason.mend),
        "count": f"{reason.count:,}",
        "by_source": by_source_in_words(reason),
        "places": places + (", …" if reason.count > PLACES_SHOWN else ""),
        "file": f"rows/{_name_of_reason(reason)}.jsonl",
    }
