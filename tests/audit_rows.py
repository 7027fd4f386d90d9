"""What the tests of the audit's checks work with: rows made by hand, and what a check says of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dpo_kit.audit.findings import Check, Example, Finding
from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.kinds import LISTS, PAIRS, UNPAIRED, Kind
from dpo_kit.pairs.schema import plain_text

FILE = "rows.jsonl"


def example(row: dict[str, Any], kind: Kind, place: str, *, held_out: bool = False) -> Example:
    replies = tuple(plain_text(reply) for reply in kind.parts(row).values())
    source = place.rpartition(":")[0]
    return Example(row, kind, plain_text(row["prompt"]), replies, place, source, held_out)


def pair(prompt: Any, chosen: Any, rejected: Any, line: int = 1, *, held_out: bool = False) -> Example:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return example(row, PAIRS, f"{'other.jsonl' if held_out else FILE}:{line}", held_out=held_out)


def pairs(*rows: tuple[Any, Any, Any]) -> list[Example]:
    """Pairs on the lines of a file, the first on line 1."""
    return [pair(*row, line) for line, row in enumerate(rows, 1)]


def labelled(prompt: Any, completion: Any, label: bool, line: int = 1) -> Example:
    row = {"prompt": prompt, "completion": completion, "label": label}
    return example(row, UNPAIRED, f"{FILE}:{line}")


def ranked(prompt: Any, completions: list[Any], scores: list[float], line: int = 1) -> Example:
    row = {"prompt": prompt, "completions": completions, "scores": scores}
    return example(row, LISTS, f"{FILE}:{line}")


def of_file(path: Path) -> list[Example]:
    """The usable rows of a file."""
    rows, report = read_pairs(path, invalid="drop")
    assert report.kind is not None
    return [example(row, report.kind, row["source"]) for row in rows]


def findings(check: Check, rows: Iterable[Example]) -> dict[str, Finding]:
    """What the check finds in the rows, by name."""
    for row in rows:
        check.add(row)
    return {finding.name: finding for finding in check.result().findings}


def lines(finding: Finding) -> list[int]:
    """The lines of its places."""
    return [int(place.partition(" ")[0].rpartition(":")[2]) for place in finding.places]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
# What checks look for, put together in ways that nobody thought of.
ODD = st.lists(
    st.sampled_from(
        [
            *(
                "\n\nHuman:",
                "\n\nAssistant:",
                "\\n",
                "&amp;",
                "<br>",
                "Ã©",
                "â€™",
                "É»",
                "\ufffd",
                "\r",
                "```",
            ),
            *(
                "$",
                "\\(",
                "as an AI",
                "Sorry",
                "é",
                "e\u0301",
                "你好",
                "こんにちは",
                " ",
                "\0",
                "the of and is",
            ),
        ]
    ),
    max_size=8,
).map("".join)
_ANY = st.one_of(TEXT, ODD)
_PART = st.one_of(
    _ANY, st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), _ANY), max_size=3)
)


def _part(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return [{"role": role, "content": content} for role, content in value]


def any_rows() -> st.SearchStrategy[list[Example]]:
    """Rows of one kind, of texts or messages of any characters."""
    made_pairs = st.builds(
        lambda p, c, r, held: pair(_part(p), _part(c), _part(r), held_out=held),
        _PART,
        _PART,
        _PART,
        st.booleans(),
    )
    made_labelled = st.builds(lambda p, c, y: labelled(_part(p), _part(c), y), _PART, _PART, st.booleans())
    scored = st.lists(st.tuples(_ANY, st.sampled_from([0.0, 1.0, 2.5])), max_size=5)
    made_ranked = st.builds(
        lambda p, both: ranked(_part(p), [text for text, _ in both], [score for _, score in both]),
        _PART,
        scored,
    )
    return st.one_of(*(st.lists(kind, max_size=6) for kind in (made_pairs, made_labelled, made_ranked)))
