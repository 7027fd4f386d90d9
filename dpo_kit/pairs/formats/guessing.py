"""What a mapping for a row of no known shape may look like, guessed from its columns' names.

Only for the words of an error: nothing is ever loaded by a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Parts of a column's name (between _, -, spaces, dots and capitals), the likelier first.
_PROMPT = (
    "prompt instruction question query user request task context history input messages post title text q"
)
_CHOSEN = "chosen preferred accepted better best winning positive pos good correct win"
_REJECTED = "rejected dispreferred nonpreferred worse worst losing negative neg bad incorrect lose"
_REPLIES = "completions responses answers outputs replies generations candidates options texts"
_REPLY = "completion response answer output reply generation text content"
_VERDICT = "winner preference preferred choice verdict vote label better judgement judgment result"
_SCORE = "score rating reward points votes upvotes quality value"
_LABEL = "label liked thumbs good desirable accepted feedback"
_SIDES = (("a", "b"), ("1", "2"), ("0", "1"), ("first", "second"), ("left", "right"), ("x", "y"))


def guessed_mapping(row: Mapping[str, Any]) -> dict[str, str] | None:
    """A mapping as the command line takes it (`field` -> path), or None where the names say nothing.

    "..." stands for what only the user knows.
    """
    prompt = _named(row, _PROMPT, str, list)
    rest = {name: value for name, value in row.items() if name != prompt}
    for guess in (_pair, _two_sides, _list, _scored, _unpaired):
        found = guess(rest)
        if found is None:
            continue
        if prompt is None:
            prompt = _only_text_left(rest, found)
        if prompt is not None:
            return {"prompt": _quoted(prompt), **found}
        left = [name for name in rest if not any(path.startswith(_quoted(name)) for path in found.values())]
        return {"prompt": "...", **found} if left else None
    return None


def _only_text_left(row: Mapping[str, Any], found: Mapping[str, str]) -> str | None:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    left = [name for name in texts if _quoted(name) not in found.values()]
    return left[0] if len(left) == 1 else None


def _pair(row: Mapping[str, Any]) -> dict[str, str] | None:
    chosen, rejected = _named(row, _CHOSEN, str, list), _named(row, _REJECTED, str, list)
    return {"chosen": _quoted(chosen), "rejected": _quoted(rejected)} if chosen and rejected else None


def _two_sides(row: Mapping[str, Any]) -> dict[str, str] | None:
    sides = list(_sides(row))
    if not sides:
        return None
    first, second = max(sides, key=lambda names: _nearness_to_replies(row, names))
    verdict = _named(row, _VERDICT, str, int, float, bool, but=(first, second))
    if verdict is None:
        return None
    found = {"first": _quoted(first), "second": _quoted(second), "preference": _quoted(verdict)}
    if isinstance(row[verdict], float) and 0 < row[verdict] < 1:
        return found
    return {**found, "values.first": "...", "values.second": "..."}


def _sides(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Columns whose names differ in the side alone: `text_a` and `text_b`, `model_1` and `model_2`."""
    texts = {tuple(_parts(name)): name for name, value in row.items() if isinstance(value, str | list)}
    for one, other in _SIDES:
        for parts, first in texts.items():
            second = texts.get(tuple(other if part == one else part for part in parts))
            if one in parts and second is not None:
                yield first, second


def _nearness_to_replies(row: Mapping[str, Any], names: tuple[str, str]) -> tuple[bool, int]:
    """Larger, the more two columns look like replies: first by their names, then by how long they are."""
    named = not set(_parts(names[0])).isdisjoint(f"{_REPLY} summary".split())
    return named, min(len(row[name]) for name in names)


def _list(row: Mapping[str, Any]) -> dict[str, str] | None:
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict):
            reply, score = _named(first, _REPLY, str, list), _named(first, _SCORE, int, float)
            rank = _named(first, "rank", int)
            if reply and (score or rank):
                by = {"scores": score} if score else {"ranks": rank}
                inside = {"completions": reply, **by}
                return {field: f"{_quoted(name)}[*].{_quoted(key)}" for field, key in inside.items()}
    replies = _named(row, f"{_REPLIES} {_REPLY}", list)
    scores, ranks = _named(row, f"scores ratings rewards {_SCORE}", list), _named(row, "ranks rank", list)
    if replies and (scores or ranks) and replies not in (scores, ranks):
        return {
            "completions": _quoted(replies),
            **({"scores": _quoted(scores)} if scores else {"ranks": _quoted(ranks)}),
        }
    return None


def _scored(row: Mapping[str, Any]) -> dict[str, str] | None:
    reply, score = _named(row, _REPLY, str, list), _named(row, _SCORE, int, float)
    return {"completion": _quoted(reply), "score": _quoted(score)} if reply and score else None


def _unpaired(row: Mapping[str, Any]) -> dict[str, str] | None:
    reply, label = _named(row, _REPLY, str, list), _named(row, _LABEL, bool, int, str)
    if not reply or not label or label == reply:
        return None
    found = {"completion": _quoted(reply), "label": _quoted(label)}
    plain = isinstance(row[label], bool) or row[label] in (0, 1)
    return found if plain else {**found, "values.good": "...", "values.bad": "..."}


def _named(row: Mapping[str, Any], words: str, *types: type, but: Sequence[str] = ()) -> str | None:
    """The column that has the likeliest of these words in its name, and a value of one of the types."""
    fitting = {name: _parts(name) for name, value in row.items() if type(value) in types and name not in but}
    return next((name for word in words.split() for name, parts in fitting.items() if word in parts), None)


def _parts(name: str) -> list[str]:
    """`responseA`, `response_a`, `response1` -> `["response", "a" or "1"]`."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_]+", str(name))]


def _quoted(name: str | None) -> str:
    text = str(name)
    return (
        text
        if re.fullmatch(r"""[^.\[\]"'?\s=]+""", text)
        else '["' + re.sub(r'(["\\])', r"\\\1", text) + '"]'
    )


def in_words(mapping: Mapping[str, str]) -> str:
    """As on the command line."""
    return " ".join(_argument(f"{field}={path}") for field, path in mapping.items())


def _argument(text: str) -> str:
    plain: Iterable[str] = re.findall(r"[^\w.=\-]", text.replace("...", ""))
    return f"--map '{text}'" if plain else f"--map {text}"
