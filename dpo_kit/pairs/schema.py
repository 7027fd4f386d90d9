"""The canonical row, and the one gate that every row of every on-disk shape goes through.

A canonical row is a dict with `prompt`, `chosen` and `rejected`: all three text, or all three lists of
{role, content} messages (the replies one assistant message each); and, where the source has them, the
`EXTRAS`. Two kinds of trouble are told apart: a `BadRow` has the wrong structure and stops the loading, an
`UnusablePair` is well formed but teaches nothing or the wrong thing, and may be left out and counted.
How rows lie on disk is the business of `formats`, where they come from that of `sources`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_kit.errors import InputError

ROLES = ("system", "user", "assistant", "tool", "developer")
SCORES = ("score_chosen", "score_rejected")
NUMBERS = ("margin", "weight", *SCORES)
EXTRAS = ("margin", "weight", "prompt_id", "tools")

# Each kind of unusable pair: what is wrong, and how to mend it.
KINDS = {
    "empty_completion": ("the reply is empty", "Write the reply, or take the row out"),
    "empty_prompt": ("the prompt is empty", "Write the prompt, or take the row out"),
    "identical": ("chosen and rejected are the same", "Take the row out: it prefers nothing"),
    "prompts_differ": (
        "chosen and rejected do not answer the same prompt",
        "Make the two conversations equal up to the reply",
    ),
    "reply_not_one_assistant_message": (
        "the reply is not exactly one assistant message",
        "End each side with one assistant message",
    ),
    "unsupported_message_key": (
        "a message carries more than role and content",
        "Take the extra keys out, or write what they say into the content",
    ),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a person finds a row: the file, and the line it begins on or its number (both from 1)."""

    file: str
    line: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file}:row {self.row}"
        return f"{self.file}:{self.line}" + (f" (row {self.row})" if self.row is not None else "")

    def error(self, problem: str, *, field: str | None = None, mend: str | None = None) -> InputError:
        """The `InputError` that points here; a row without a line is named behind the file."""
        file = self.file if self.line is not None else str(self)
        return InputError(problem, file=file, line=self.line, field=field, mend=mend)


class BadRow(Exception):  # noqa: N818  (an Error of ours is what the user sees; this one never leaves `pairs`)
    """The row has not the structure that it should have; becomes an `InputError` with the row's place."""

    def __init__(self, message: str, *, field: str | None = None, mend: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field, self.mend = message, field, mend


class UnusablePair(Exception):  # noqa: N818
    """The row is well formed, but not a pair to learn from. `kind` is a key of `KINDS`."""

    def __init__(self, kind: str, *, field: str | None = None, message: str | None = None) -> None:
        self.kind, self.field, self.message = kind, field, message or KINDS[kind][0]
        super().__init__(self.message)


def canonical_pair(row: Mapping[str, Any], *, prompt_field: str = "prompt") -> dict[str, Any]:
    """Check a row in a canonical shape and bring it to the canonical form.

    With a `prompt`: text and text replies stay text. Otherwise all become messages: a text prompt is a
    user message, a text reply an assistant message, and a reply list that begins with a copy of the prompt
    is split before its last message. Without a `prompt`, `chosen` and `rejected` are whole conversations
    and are split before the last message; whole *texts* are refused, because where the reply begins in
    them can only be guessed. `prompt_field` is what the source calls the prompt.

    Structure is looked at before sense, so that a row is bad whatever else is the matter with it. Raises
    `BadRow` and `UnusablePair`; of several problems only the first that is found.
    """
    chosen = text_or_messages(row, "chosen")
    rejected = text_or_messages(row, "rejected")
    prompt = text_or_messages(row, "prompt", called=prompt_field) if "prompt" in row else None
    extras = checked_extras(row)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one reply is text and the other a list of messages", field="rejected")
    if isinstance(chosen, str) and prompt is None:
        raise BadRow(
            "there is no prompt, and where a reply begins in a whole text cannot be told from its characters",
            field="prompt",
            mend="Add a 'prompt' field, or give 'chosen' and 'rejected' as lists of messages or HH dialogues",
        )
    if not (isinstance(prompt, str) and isinstance(chosen, str)):
        prompt, chosen, rejected = _as_messages(prompt, chosen, rejected, prompt_field)
    _check_sense(prompt, chosen, rejected, prompt_field)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extras}


def split_conversation(conversation: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """Messages -> (prompt, [reply]), cut before the last message, which must be the assistant's."""
    if not conversation or conversation[-1]["role"] != "assistant":
        end = f"ends with a message of role '{conversation[-1]['role']}'" if conversation else "is empty"
        raise UnusablePair(
            "reply_not_one_assistant_message",
            field=field,
            message=f"the conversation {end}, where the assistant's reply should be",
        )
    return conversation[:-1], conversation[-1:]


def need(row: Mapping[str, Any], field: str) -> Any:
    """The field's value; a row without it is bad."""
    if field not in row:
        found = ", ".join(map(str, row)) or "none"
        raise BadRow(f"the row has no such field, only: {found}", field=field, mend=f"Add '{field}'")
    return row[field]


def checked_text(value: Any, field: str) -> str:
    """The value, which must be a `str` that UTF-8 can hold."""
    if not isinstance(value, str):
        raise BadRow(f"expected text, found {kind_of(value)}", field=field)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise BadRow(
                f"{half} at character {error.start + 1} is half of a surrogate pair and no character",
                field=field,
                mend="Write the whole character",
            ) from None
    return value


def text_or_messages(row: Mapping[str, Any], field: str, *, called: str | None = None) -> str | list[dict]:
    """The field as text or as messages; empty extra keys of a message are dropped, others still there."""
    value, called = need(row, field), called or field
    if isinstance(value, str):
        return checked_text(value, called)
    if not isinstance(value, list):
        raise BadRow(f"expected text or a list of messages, found {kind_of(value)}", field=called)
    return [_checked_message(message, f"{called}[{i}]") for i, message in enumerate(value)]


def filled_extras(message: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """What a message says beyond the known keys; null and empty values say nothing."""
    if len(message) == len(known):
        return {}
    return {
        key: value for key, value in message.items() if key not in known and value not in (None, "", [], {})
    }


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return f"text ({value[:20]!r})"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _checked_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"expected a message with role and content, found {kind_of(message)}", field=field)
    for key in ("role", "content"):
        if key not in message:
            raise BadRow("the message has no such key", field=f"{field}.{key}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        found = f"'{role}'" if isinstance(role, str) else kind_of(role)
        raise BadRow(f"unknown role {found}", field=f"{field}.role", mend=f"Known roles: {', '.join(ROLES)}")
    extras = filled_extras(message, ("role", "content"))
    # A tool call may come without content; it is refused for its extra key, which says more.
    if content is not None or not extras:
        checked_text(content, f"{field}.content")
    return {"role": role, "content": content, **extras}


def _as_messages(
    prompt: str | list[dict] | None, chosen: str | list[dict], rejected: str | list[dict], prompt_field: str
) -> tuple[list[dict], list[dict], list[dict]]:
    sides = {"chosen": _reply_messages(chosen), "rejected": _reply_messages(rejected)}
    for field, messages in ((prompt_field, prompt), *sides.items()):
        if isinstance(messages, list):
            _require_plain(messages, field)
    (chosen_prompt, chosen), (rejected_prompt, rejected) = (
        split_conversation(messages, field) if prompt is None else _split_reply(prompt, messages, field)
        for field, messages in sides.items()
    )
    if chosen_prompt != rejected_prompt:
        raise UnusablePair("prompts_differ", field="rejected")
    return chosen_prompt, chosen, rejected


def _reply_messages(reply: str | list[dict]) -> list[dict]:
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply


def _require_plain(messages: list[dict], field: str) -> None:
    for i, message in enumerate(messages):
        if len(message) > 2:
            names = ", ".join(f"'{key}'" for key in message if key not in ("role", "content"))
            raise UnusablePair(
                "unsupported_message_key",
                field=f"{field}[{i}]",
                message=f"the message carries {names}, which would be lost",
            )


def _split_reply(prompt: str | list[dict], reply: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """A reply list beside a given prompt -> (prompt, [reply]): the reply alone, or a whole conversation."""
    lead, last = split_conversation(reply, field)
    if not lead:
        return (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]), last
    if lead[0]["role"] in ("assistant", "tool"):
        raise UnusablePair("reply_not_one_assistant_message", field=field)
    if isinstance(prompt, list):
        holds_prompt = lead == prompt
    else:
        holds_prompt = any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in lead)
    if not holds_prompt:
        raise UnusablePair(
            "prompts_differ", field=field, message="the conversation is not one that the prompt begins"
        )
    return lead, last


def _check_sense(
    prompt: str | list[dict], chosen: str | list[dict], rejected: str | list[dict], prompt_field: str
) -> None:
    if not plain_text(prompt).strip():
        raise UnusablePair("empty_prompt", field=prompt_field)
    for field, reply in (("chosen", chosen), ("rejected", rejected)):
        if not plain_text(reply).strip():
            raise UnusablePair("empty_completion", field=field)
    if chosen == rejected:
        raise UnusablePair("identical", field="rejected")


def plain_text(part: str | list[dict]) -> str:
    """The characters of a prompt or reply; messages one after the other with nothing between."""
    return part if isinstance(part, str) else "".join(message["content"] for message in part)


def checked_extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """margin (or the difference of two scores), weight, prompt_id, tools; a null counts as absent.

    Raises `BadRow`.
    """
    numbers = {name: _number(row[name], name) for name in NUMBERS if row.get(name) is not None}
    if "margin" not in numbers and SCORES[0] in numbers and SCORES[1] in numbers:
        numbers["margin"] = _number(numbers[SCORES[0]] - numbers[SCORES[1]], "margin")
    if numbers.get("weight", 0.0) < 0:
        raise BadRow(f"a weight must not be below 0, found {numbers['weight']}", field="weight")
    extras: dict[str, Any] = {name: numbers[name] for name in ("margin", "weight") if name in numbers}
    identity = row.get("prompt_id")
    if identity is not None and identity != "":
        number = isinstance(identity, int) and not isinstance(identity, bool)
        extras["prompt_id"] = str(identity) if number else checked_text(identity, "prompt_id")
    tools = row.get("tools")
    if tools is not None and tools != "":
        extras["tools"] = _tools(tools)
    return extras


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"expected a number, found {kind_of(value)}", field=field)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"expected a finite number, found {number}", field=field)
    return number


def _tools(value: Any) -> str:
    """Tool descriptions as JSON text, which is how a column can hold any of them."""
    if isinstance(value, list):
        try:
            return checked_text(json.dumps(value, ensure_ascii=False), "tools")
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRow(f"cannot be written as JSON: {error}", field="tools") from None
    text = checked_text(value, "tools")
    try:
        valid = isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise BadRow("expected a list of tool descriptions, or one as JSON text", field="tools")
    return text
