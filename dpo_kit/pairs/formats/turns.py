"""What stands before a reply: ShareGPT's turns as messages, and the system text of a column of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_kit.pairs.formats.registry import Convert, Row
from dpo_kit.pairs.messages import known_role, text_or_messages
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, filled_extras, kind_of

SYSTEM = ("system", "system_prompt")
_REPLIES = ("chosen", "rejected", "completion")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    # Of a call only its text is known here, and what a template would write for it is not.
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}


def taking_system(convert: Convert) -> Convert:
    """The adapter, with the text of a column of `SYSTEM` put before what it gives.

    Prompts are messages then in every row that has the column, filled or not, so that rows of a file are
    alike. Such a format names `SYSTEM` among its columns.
    """

    def with_columns(row: Row) -> Any:
        made: Any = convert(row)
        for field in SYSTEM:
            if field not in row:
                continue
            if not isinstance(made, list):
                made = with_system(made, row[field], field)
                continue
            made = [
                part if isinstance(part, UnusablePair) else with_system(part, row[field], field)
                for part in made
            ]
        return made

    return with_columns


def with_system(part: Row, system: Any, field: str) -> dict[str, Any]:
    """The canonical row with the system text as the first message of its prompt, which becomes messages.

    Replies that are whole conversations begin with it too. A conversation that begins with the same text has
    it once. Null and blank texts say nothing; an empty prompt stays one. Raises `BadRow` where another system
    text is there already.
    """
    said = "" if system is None else checked_text(system, field)
    first = {"role": "system", "content": said} if said.strip() else None
    changed = dict(part)
    for name in _REPLIES:
        if _is_whole(part.get(name)):
            changed[name] = _begun(part[name], first, field)
    listed = part.get("completions")
    if isinstance(listed, list):
        changed["completions"] = [_begun(each, first, field) if _is_whole(each) else each for each in listed]
    prompt = part.get("prompt")
    if isinstance(prompt, list) and prompt:
        changed["prompt"] = _begun(prompt, first, field)
    elif isinstance(prompt, str) and prompt.strip() and not _all_whole(part):
        changed["prompt"] = _begun([{"role": "user", "content": prompt}], first, field)
    return changed


def _all_whole(part: Row) -> bool:
    listed = part.get("completions")
    replies = [part[name] for name in _REPLIES if name in part]
    return all(_is_whole(reply) for reply in (*replies, *(listed if isinstance(listed, list) else ())))


def _is_whole(reply: Any) -> bool:
    """Whether a reply is given with the turns before it."""
    first = reply[0] if isinstance(reply, list) and reply else None
    return isinstance(first, dict) and first.get("role") not in ("assistant", "tool")


def _begun(messages: list[Any], first: dict[str, str] | None, field: str) -> list[Any]:
    if first is None:
        return messages
    begins = messages[0] if messages else None
    if not isinstance(begins, dict) or begins.get("role") != "system":
        return [first, *messages]
    own: Any = text_or_messages([begins], "prompt")
    if own[0]["content"] != first["content"]:
        raise BadRow("the conversation begins with another system text", field=field)
    return messages


def as_messages(value: Any, field: str) -> Any:
    """A list of {from, value} turns as messages, one turn alone as a list of it; all else as it is."""
    if isinstance(value, list):
        first = value[0] if value else None
        if isinstance(first, dict) and "from" in first and "role" not in first:
            return [message_of(turn, f"{field}[{i}]") for i, turn in enumerate(value)]
    elif isinstance(value, Mapping) and ("role" in value or "from" in value):
        return [message_of(value, field)]
    return value


def message_of(turn: Any, field: str) -> dict[str, Any]:
    """{from, value}, {role, content} or {role, text} -> a message, with what else the turn says."""
    if not isinstance(turn, dict):
        raise BadRow(f"expected a turn with from and value, found {kind_of(turn)}", field=field)
    sharegpt = "from" in turn or "value" in turn
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    if "text" in turn and not sharegpt and "content" not in turn:
        turn = {"content" if key == "text" else key: value for key, value in turn.items()}
    if role_key not in turn or (sharegpt and text_key not in turn):
        missing = role_key if role_key not in turn else text_key
        raise BadRow("the turn has no such key", field=f"{field}.{missing}")
    role = known_role(turn[role_key], SHAREGPT_ROLES, f"{field}.{role_key}")
    if not sharegpt:
        return {**turn, "role": role}
    extras = filled_extras(turn, (role_key, text_key))
    if extras.keys() & {"role", "content"}:
        raise BadRow("the turn has both from and value and role and content", field=field)
    text = turn[text_key]
    if text is not None or not extras:
        checked_text(text, f"{field}.{text_key}")
    return {**extras, "role": role, "content": text}
