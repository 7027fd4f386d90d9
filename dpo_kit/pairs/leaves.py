"""The texts in a message or any JSON value: changed one by one, marked, and looked for in a rendered text;
and the thought within a content.

Knows nothing of templates: that is `chat`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

THINK, THOUGHT = "<think>", "</think>"
_TAGS = re.compile(f"({THINK}|{THOUGHT})")

# What ties messages and calls together and is nothing that is said; most templates do not write it.
WIRING = frozenset(("role", "id", "type", "index", "tool_call_id"))

# A mark, the place that it was put at, and the text that was there.
Mark = tuple[str, str, str]


def changed(
    value: Any, place: str, change: Callable[[str, str], str], wiring: frozenset[str] = WIRING
) -> Any:
    """A copy of a JSON value with each text in it changed, by its place; of other values the key is."""
    if isinstance(value, str):
        return change(place, value)
    if isinstance(value, list):
        return [changed(inner, f"{place}[{i}]", change, wiring) for i, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    copy = {}
    for key, inner in value.items():
        if key in wiring or inner is None:
            copy[key] = inner
        elif isinstance(inner, str | list | dict):
            below = frozenset() if key == "arguments" else wiring
            copy[key] = changed(inner, f"{place}.{key}", change, below)
        else:
            copy[change(f"{place}.{key}", key)] = inner
    return copy


def marked(place: str, text: str, marks: list[Mark]) -> str:
    """The text with a mark at its end, noted as (mark, place, text); its reasoning has one of its own.

    The mark comes before closing tags, because templates look at these.
    """

    def noted(place: str, part: str) -> str:
        if not part.strip():
            return part
        end = len(part.rstrip())
        while part.endswith(">", 0, end) and (tag := part.rfind("<", 0, end)) > 0:
            end = len(part[:tag].rstrip())
        sign = f"DpoKit{len(marks)}x"
        marks.append((sign, place, part))
        return part[:end] + sign + part[end:]

    if not place.endswith(".content") or THOUGHT not in text:
        return noted(place, text)
    thought, _, said = text.partition(THOUGHT)
    lead, opened, thought = thought.rpartition(THINK)
    return lead + opened + noted(f"{place}{THINK}", thought) + THOUGHT + noted(place, said)


def holds(text: str, leaf: str) -> bool:
    """Whether the text has the leaf, as it is or as JSON or Python write it inside quotes."""
    bare = leaf.strip()
    if bare in text:
        return True
    as_json = json.dumps(bare, ensure_ascii=False)
    forms = (as_json, json.dumps(bare), json.dumps(as_json[1:-1], ensure_ascii=False), repr(bare))
    return any(form[1:-1] in text for form in forms)


def says(text: str, content: str) -> bool:
    """Whether the text has the content, whatever white space is at its edges and around its reasoning's tags.

    The tag that opens a reasoning at the beginning may be missing.
    """
    if content.strip() in text:
        return True
    if THOUGHT not in content:
        return False
    # Words and tags in turns.
    has, wants = _TAGS.split(text), [part.strip() for part in _TAGS.split(content)]
    if THINK not in text and wants[:2] == ["", THINK]:
        del wants[:2]
    starts = range(0, len(has) - len(wants) + 1, 2)
    return any(all(want in part for want, part in zip(wants, has[at:], strict=False)) for at in starts)


def joined(prompt: str, before: str, content: str) -> str:
    """Content after what stands between it and the prompt, with its reasoning opened once only."""
    if THOUGHT in content and THOUGHT in before:
        before = ""
    opened = prompt + before
    if opened.rstrip().endswith(THINK) and content.lstrip().startswith(THINK):
        space = opened[len(opened.rstrip()) :]
        content = content.lstrip().removeprefix(THINK).removeprefix(space)
    return before + content
