"""Rows whose fields hold more than they say: the prompt the reply, a reply the prompt, a text messages.

Each loads without trouble and would teach the wrong thing.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_kit.pairs.schema import UnusablePair

Part = str | list[dict]

# A shorter prompt, or one of a single word, may begin a reply by chance.
_SHORTEST = 20
_TURN_KEYS = (frozenset(("role", "content")), frozenset(("from", "value")))
_OPENING = re.compile(r"\s*\[\s*\{")


def require_in_place(
    prompt: Part, replies: Sequence[Part], fields: Sequence[str], prompt_field: str | None
) -> None:
    """Raises `UnusablePair` for a row of canonical parts, its replies in these fields.

    `prompt_field` None: the prompt was not given, but is the beginning of a whole conversation.
    """
    for field, reply in zip(fields, replies, strict=True):
        text = reply if isinstance(reply, str) else reply[-1]["content"]
        if text and _OPENING.match(text) and _is_messages(text):
            raise UnusablePair("messages_as_text", field=field)
    if isinstance(prompt, str):
        if _OPENING.match(prompt) and _is_messages(prompt):
            raise UnusablePair("messages_as_text", field=prompt_field)
        if _all_begin_with(prompt.strip(), replies):
            raise UnusablePair("reply_repeats_prompt", field=fields[0])
    elif prompt_field is not None and prompt[-1]["role"] == "assistant":
        last = _bare(prompt[-1])
        for field, reply in zip(fields, replies, strict=True):
            if isinstance(reply, list) and _bare(reply[-1]) == last:
                raise UnusablePair(
                    "prompt_holds_reply",
                    field=prompt_field,
                    message=f"the prompt ends with the reply in '{field}'",
                )


def _all_begin_with(start: str, replies: Sequence[Part]) -> bool:
    for reply in replies:
        if not isinstance(reply, str) or not reply.lstrip().startswith(start):
            return False
    return len(start) >= _SHORTEST and len(start.split(None, 1)) > 1


def _bare(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": (message["content"] or "").strip()}


def _is_messages(text: str) -> bool:
    """Whether it is all a list of messages, as JSON, Python or NumPy (without commas) write one."""
    for parse in (json.loads, _literal, _array):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return _are_messages(found)
    return False


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown escapes
        return ast.literal_eval(text.strip())


def _array(text: str) -> Any:
    return _literal(re.sub(r"\}\s*\n\s*\{", "}, {", text))


def _are_messages(found: Sequence[Any]) -> bool:
    return all(isinstance(each, dict) and any(keys <= each.keys() for keys in _TURN_KEYS) for each in found)
