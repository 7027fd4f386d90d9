"""Messages: what one may say, how it is checked, and how Arrow holds what is said beside role and content.

In plain rows a message is {role, content, **extras}. A column of structs has one set of keys for all rows, so
that a `datasets.Dataset` has {role, content, extras}, the extras as JSON text; its third field is there only
where some message of the data set has any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_kit.pairs.schema import (
    BadRow,
    UnusablePair,
    checked_text,
    filled_extras,
    json_object,
    json_text,
    kind_of,
    parsed_json,
)

ROLES = ("system", "user", "assistant", "tool", "developer")
# What a message's role may be called, and which of `ROLES` it is: also Llama 3's and OpenAI's old names.
_NAMES_OF_ROLES = {**{role: role for role in ROLES}, "ipython": "tool", "function": "tool"}
# Read by the templates of Qwen3, GLM, DeepSeek and Nemotron (reasoning_content), gpt-oss (thinking), Gemma 4
# (reasoning, tool_responses), Cohere (tool_plan), Mistral (tool_call_id), Kimi (name), and most (tool_calls).
TEXT_EXTRAS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan")
LIST_EXTRAS = ("tool_calls", "tool_responses")
KNOWN_EXTRAS = (*TEXT_EXTRAS, *LIST_EXTRAS)
# A message that has one of these says something, even without content.
SAYING = frozenset(KNOWN_EXTRAS) - {"name", "tool_call_id"}

PACKED = "extras"
_PLAIN = ("role", "content")

TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts, OpenAI's two names among them


def packed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message -> {role, content, extras}, the extras as JSON text, None where there are none."""
    extras = {key: value for key, value in unpacked(message).items() if key not in _PLAIN}
    text = json.dumps(extras, ensure_ascii=False) if extras else None
    return {"role": message["role"], "content": message["content"], PACKED: text}


def unpacked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of either form -> {role, content, **extras}, as a chat template reads it.

    A key without a value is left out, since templates ask whether a key is there.
    """
    if len(message) == len(_PLAIN):
        return dict(message)
    extras = message.get(PACKED)
    plain = {
        key: value for key, value in message.items() if key in _PLAIN or (key != PACKED and value is not None)
    }
    return {**plain, **json.loads(extras)} if extras else plain


def readable(messages: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Messages for a chat template: arguments of tool calls as objects, as transformers documents them, and
    an absent content as "" (transformers takes nulls out, and templates add texts to what is not there)."""
    plain = [unpacked(message) for message in messages]
    for message in plain:
        if message["content"] is None:
            message["content"] = ""
        if message.get("tool_calls"):
            message["tool_calls"] = [
                _with_arguments(call, _parsed_arguments) for call in message["tool_calls"]
            ]
    return plain


def arguments_as_text(message: dict) -> dict:
    """The message with the arguments of its tool calls as JSON text, which some templates (DeepSeek) want."""
    if not message.get("tool_calls"):
        return message
    calls = [_with_arguments(call, _written_arguments) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_arguments(call: dict, change: Callable[[Any], Any]) -> dict:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _parsed_arguments(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            found = parsed_json(arguments, "arguments")
        except BadRow:
            return arguments
        return found if isinstance(found, dict) else arguments
    return arguments


def _written_arguments(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def has_extras(part: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message of a prompt or reply, in either form, has more than role and content."""
    if isinstance(part, str):
        return False
    for message in part:
        if len(message) > len(_PLAIN) and any(
            value is not None for key, value in message.items() if key not in _PLAIN
        ):
            return True
    return False


def says_something(part: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is more than white space in it; a tool call or a reasoning is something said."""
    if isinstance(part, str):
        return bool(part) and not part.isspace()
    for message in part:
        content = message["content"]
        if content and not content.isspace():
            return True
    return has_extras(part) and any(not SAYING.isdisjoint(unpacked(message)) for message in part)


def text_or_messages(value: Any, field: str) -> str | list[dict]:
    """The value as text or as messages, {role, content} and what else they say.

    Content given in parts is one text, the parts joined with nothing between; with a part that is no text it
    stays a list, for `require_usable` to refuse. Empty extra keys are dropped. Raises `BadRow`.
    """
    if isinstance(value, str):
        return checked_text(value, field)
    if not isinstance(value, list):
        raise BadRow(f"expected text or a list of messages, found {kind_of(value)}", field=field)
    messages = []
    for i, message in enumerate(value):
        if isinstance(message, dict) and len(message) == 2:  # nearly all: worth a path of their own
            role, content = message.get("role"), message.get("content")
            if isinstance(content, str) and content.isascii() and isinstance(role, str) and role in ROLES:
                messages.append({"role": role, "content": content})
                continue
        messages.append(_checked_message(message, f"{field}[{i}]"))
    return messages


def require_usable(messages: list[dict], field: str) -> None:
    """Raises `UnusablePair` for messages, checked ones, that say what cannot be carried to a template."""
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list):
            at, said = next((at, said) for at, part in enumerate(content) if (said := _not_text(part)))
            raise UnusablePair(
                "content_not_text", field=f"{field}[{i}].content[{at}]", message=f"the content has {said}"
            )
        if len(message) == 2:
            continue
        unknown = [key for key in message if key not in ("role", "content", *KNOWN_EXTRAS)]
        if unknown:
            names = ", ".join(f"'{key}'" for key in unknown)
            raise UnusablePair(
                "unsupported_message_key",
                field=f"{field}[{i}]",
                message=f"the message carries {names}, which would be lost",
            )


def _checked_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"expected a message with role and content, found {kind_of(message)}", field=field)
    extras = filled_extras(message, ("role", "content"))
    if isinstance(extras.get(PACKED), str):  # as a Dataset holds them
        held = json_object(extras.pop(PACKED), f"{field}.{PACKED}")
        extras |= filled_extras(held, ()) if held else {}
        if not extras.keys().isdisjoint(_PLAIN):
            raise BadRow("role and content are said twice", field=f"{field}.{PACKED}")
    for key in ("role", "content"):
        if key not in message and (key == "role" or SAYING.isdisjoint(extras)):
            raise BadRow("the message has no such key", field=f"{field}.{key}")
    role, content = known_role(message["role"], _NAMES_OF_ROLES, f"{field}.role"), message.get("content")
    extras = {key: _checked_extra(key, value, f"{field}.{key}") for key, value in extras.items()}
    return {"role": role, "content": _checked_content(content, extras, f"{field}.content"), **extras}


def known_role(role: Any, known: Mapping[str, str], field: str) -> str:
    """What the role is called here; raises `BadRow` for one that is not among the known."""
    if not isinstance(role, str) or role not in known:
        found = f"'{role}'" if isinstance(role, str) else kind_of(role)
        raise BadRow(f"unknown role {found}", field=field, mend=f"Known roles: {', '.join(known)}")
    return known[role]


def _checked_content(content: Any, extras: Mapping[str, Any], field: str) -> str | list | None:
    if isinstance(content, list):
        parts = [_checked_part(part, f"{field}[{i}]") for i, part in enumerate(content)]
        return content if any(part is None for part in parts) else "".join(map(str, parts))
    # Beside a key that is refused for itself a null is not worth a word.
    if content is None and extras and not extras.keys() <= {"name", "tool_call_id"}:
        return None
    return checked_text(content, field)


def _checked_part(part: Any, field: str) -> str | None:
    """The text of a part of a content; None where it is none."""
    if isinstance(part, str):
        return checked_text(part, field)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRow(f"expected text or a part with a type, found {kind_of(part)}", field=field)
    if _not_text(part):
        return None
    name = _text_key(part)
    return checked_text(part.get(name), f"{field}.{name}")


def _text_key(part: Mapping[str, Any]) -> str:
    return "value" if part.get("text") is None and part.get("value") is not None else "text"


def _not_text(part: Any) -> str | None:
    """What a part is where it is not text alone, in words."""
    if isinstance(part, str):
        return None
    if part["type"] not in TEXT_PARTS:
        return f"a part of type '{part['type']}'"
    more = filled_extras(part, ("type", _text_key(part)))
    return f"a part with {', '.join(map(repr, more))} beside its text" if more else None


def _checked_extra(key: str, value: Any, field: str) -> Any:
    """What a known extra key holds, of its type and such that JSON can hold it; others as they are."""
    if key not in KNOWN_EXTRAS:
        return value
    if key in TEXT_EXTRAS:
        return checked_text(value, field)
    if isinstance(value, str):
        value = parsed_json(value, field)
    if not isinstance(value, list):
        raise BadRow(f"expected a list, found {kind_of(value)}", field=field)
    for i, call in enumerate(value if key == "tool_calls" else ()):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                "expected a tool call: an object with a function of some name",
                field=f"{field}[{i}]",
                mend='Write {"type": "function", "function": {"name": ..., "arguments": {...}}}',
            )
    json_text(value, field)
    return value
