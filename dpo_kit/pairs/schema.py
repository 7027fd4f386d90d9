"""What a field of a row must be, and what is said where it is not.

Two kinds of trouble are told apart: a `BadRow` has the wrong structure and stops the loading, an
`UnusablePair` is well formed but teaches nothing or the wrong thing, and may be left out and counted.
Whole rows are the business of `canonical`, how they lie on disk that of `formats`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import PAIRS, RANKS, Kind

SCORES = ("score_chosen", "score_rejected")
NUMBERS = ("margin", "weight", *SCORES)
DEEPEST = 100  # levels of a JSON value in a message or in tools
_LARGEST_RANK = 2**63 - 1
_OPTIONAL = frozenset((*PAIRS.extras, *SCORES))

# What apply_chat_template takes beside a template's own variables, and a row must not set.
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt"),
        *("continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
        *("padding", "truncation", "max_length", "tokenizer_kwargs", "processor_kwargs"),
        "sanitize_control_tokens",
    }
)


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """A reason to leave a row, or a pair that could be made of it, out: what is wrong, and how to mend it.

    `by_option`: the `LoadOptions` leave it out, which stops no loading.
    """

    message: str
    mend: str
    by_option: bool = False


KINDS = {
    "bad_row": ProblemKind("the row cannot be read, or has the wrong structure", "Correct the row"),
    "empty_completion": ProblemKind("the reply is empty", "Write the reply, or take the row out"),
    "reply_not_text": ProblemKind("the reply is no text", "Write the reply as text, or take the row out"),
    "empty_prompt": ProblemKind("the prompt is empty", "Write the prompt, or take the row out"),
    "identical": ProblemKind("chosen and rejected are the same", "Take the row out: it prefers nothing"),
    "prompts_differ": ProblemKind(
        "the replies do not answer the same prompt", "Make the conversations equal up to the reply"
    ),
    "prompt_holds_reply": ProblemKind(
        "the prompt ends with one of the replies", "End the prompt before the reply"
    ),
    "reply_repeats_prompt": ProblemKind(
        "each reply begins with the whole prompt", "Take the prompt out of the replies"
    ),
    "messages_as_text": ProblemKind(
        "a list of messages is written as one text",
        "Write messages as lists, in jsonl or parquet: CSV holds text only",
    ),
    "reply_not_one_assistant_message": ProblemKind(
        "the reply is not exactly one assistant message",
        "End each conversation with one assistant message",
    ),
    "unsupported_message_key": ProblemKind(
        "a message carries keys that no chat template reads",
        "Take these keys out, or write what they say into the content",
    ),
    "content_not_text": ProblemKind(
        "a message's content is not all text", "Take the row out, or write what the part says as text"
    ),
    "tie": ProblemKind(
        "the replies are equally good", "Set ties to half to learn that from it", by_option=True
    ),
    "all_tied": ProblemKind("all replies are equally good", "It prefers nothing", by_option=True),
    "below_min_margin": ProblemKind(
        "the replies lie closer together than min_margin", "Lower min_margin to keep it", by_option=True
    ),
    "same_reply_in_list": ProblemKind(
        "two replies of a list are the same", "Score equal replies once", by_option=True
    ),
    "unjudged": ProblemKind(
        "nothing is said of a reply in a list", "The list is made of the others", by_option=True
    ),
    "nothing_to_compare": ProblemKind(
        "there are not two judged replies to the prompt", "Nothing can be learned from it", by_option=True
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
    """The row is well formed, but not an example to learn from. `kind` is a key of `KINDS`."""

    def __init__(self, kind: str, *, field: str | None = None, message: str | None = None) -> None:
        self.kind, self.field, self.message = kind, field, message or KINDS[kind].message
        super().__init__(self.message)


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


def printable(text: str) -> str:
    """The text with halves of surrogate pairs by their number, which a file's name that is no UTF-8 has."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


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


def plain_text(part: str | list[dict]) -> str:
    """The characters of a prompt's or reply's content; messages one after the other with nothing between.

    Tool calls and reasoning in keys of their own are not content and not in it.
    """
    if isinstance(part, str):
        return part
    return "".join([message["content"] or "" for message in part])


def checked_extras(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """weight, prompt_id, tools and chat_template_kwargs (both JSON text); of a pair margin too, or the
    difference of two scores for it.

    A null counts as absent. Raises `BadRow`.
    """
    if _OPTIONAL.isdisjoint(row):
        return {}
    pair = kind == PAIRS
    names = NUMBERS if pair else ("weight",)
    numbers = {name: finite(row[name], name) for name in names if row.get(name) is not None}
    if "margin" not in numbers and SCORES[0] in numbers and SCORES[1] in numbers:
        numbers["margin"] = finite(numbers[SCORES[0]] - numbers[SCORES[1]], "margin")
    if numbers.get("weight", 0.0) < 0:
        raise BadRow(f"a weight must not be below 0, found {numbers['weight']}", field="weight")
    extras: dict[str, Any] = {name: numbers[name] for name in ("margin", "weight") if name in numbers}
    for name in RANKS if pair else ():
        if row.get(name) is not None:
            extras[name] = checked_rank(row[name], name)
    identity = row.get("prompt_id")
    if identity is not None and identity != "":
        number = isinstance(identity, int) and not isinstance(identity, bool)
        extras["prompt_id"] = str(identity) if number else checked_text(identity, "prompt_id")
    tools = row.get("tools")
    if tools is not None and tools != "":
        extras["tools"] = json_text(checked_tools(tools), "tools")
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and kwargs != "" and (checked := template_kwargs(kwargs)):
        extras["chat_template_kwargs"] = json_text(checked, "chat_template_kwargs")
    return extras


def checked_label(value: Any) -> bool:
    """true or false, or 1 or 0 for them; raises `BadRow` for anything else."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    found = str(value) if isinstance(value, int | float) else kind_of(value)
    raise BadRow(
        f"expected true or false, found {found}",
        field="label",
        mend="Write true (or 1) for a desirable completion, false (or 0) for an undesirable one",
    )


def checked_scores(row: Mapping[str, Any], replies: int) -> list[float]:
    """The `scores` of a row (higher is better), or its `ranks` (1 is best) as scores, which are -rank.

    A null counts as absent. Raises `BadRow` where there are both or none, and where they are not as many as
    the replies, not numbers, or not finite.
    """
    given = [name for name in ("scores", "ranks") if row.get(name) is not None]
    if len(given) != 1:
        raise BadRow(
            "the row has both scores and ranks" if given else "the row has neither scores nor ranks",
            field="scores",
            mend="Give scores (higher is better), or ranks (1 is best)",
        )
    field, values = given[0], row[given[0]]
    if not isinstance(values, list):
        raise BadRow(f"expected a list of numbers, found {kind_of(values)}", field=field)
    if len(values) != replies:
        raise BadRow(
            f"{len(values)} {field} for {replies} completions",
            field=field,
            mend="Give one for each completion, in their order",
        )
    if field == "scores":
        return [finite(value, f"scores[{i}]") for i, value in enumerate(values)]
    return [-finite(checked_rank(value, f"ranks[{i}]"), f"ranks[{i}]") for i, value in enumerate(values)]


def checked_rank(rank: Any, field: str) -> int:
    """A rank, counted from 1, the best; raises `BadRow` for anything else."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        found = str(rank) if isinstance(rank, float | int) else kind_of(rank)
        raise BadRow(f"expected a rank, found {found}", field=field, mend="Count ranks from 1, the best")
    if rank > _LARGEST_RANK:
        raise BadRow("the rank is larger than 64 bits hold", field=field, mend="Count ranks from 1, the best")
    return rank


def finite(value: Any, field: str) -> float:
    """The value as a float; raises `BadRow` where it is no number, or not a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"expected a number, found {kind_of(value)}", field=field)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"expected a finite number, found {number}", field=field)
    return number


def checked_tools(value: Any) -> list:
    """Tool descriptions, from a list of objects or of JSON texts of them, or the whole as JSON text.

    Raises `BadRow`.
    """
    found = value if isinstance(value, list) else None
    if found is None:
        text = checked_text(value, "tools")
        with suppress(BadRow):
            found = parsed_json(text, "tools")
    if not isinstance(found, list):
        raise BadRow("expected a list of tool descriptions, or one as JSON text", field="tools")
    tools = [
        json_object(tool, f"tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(found)
    ]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadRow(f"expected a tool's description, found {kind_of(tool)}", field=f"tools[{i}]")
    return tools


def template_kwargs(value: Any, field: str = "chat_template_kwargs") -> dict[str, Any]:
    """A row's own variables for its chat template, from an object or JSON text of one; nulls count as absent.

    Raises `BadRow`, also for names that `apply_chat_template` keeps for itself.
    """
    found = value if isinstance(value, dict) else json_object(value, field)
    for name in found:
        if name in RESERVED_KWARGS:
            raise BadRow(
                f"'{name}' is no variable of a chat template",
                field=f"{field}.{name}",
                mend="Take it out; dpo_kit sets it by itself",
            )
    return {name: setting for name, setting in found.items() if setting is not None}


def json_object(value: Any, field: str) -> dict[str, Any]:
    """The object that a JSON text holds; raises `BadRow`."""
    found = parsed_json(checked_text(value, field), field)
    if not isinstance(found, dict):
        raise BadRow(f"expected an object as JSON text, found {kind_of(found)}", field=field)
    return found


def json_text(value: Any, field: str) -> str:
    """The value as JSON text; raises `BadRow` where JSON or UTF-8 cannot hold it."""
    _require_shallow(value, field)
    try:
        return checked_text(json.dumps(value, ensure_ascii=False, allow_nan=False), field)
    except (TypeError, ValueError) as error:
        raise BadRow(f"cannot be written as JSON: {error}", field=field) from None


def parsed_json(text: str, field: str) -> Any:
    """What a JSON text holds; raises `BadRow`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}", field=field) from None
    _require_shallow(value, field)
    return value


def _require_shallow(value: Any, field: str) -> None:
    """Refuses what those who walk through it later, templates among them, would run out of stack with."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(DEEPEST):
        insides = [inner.values() if isinstance(inner, dict) else inner for inner in level]
        level = [inner for inside in insides for inner in inside if isinstance(inner, list | dict)]
        if not level:
            return
    raise BadRow(f"it is nested more than {DEEPEST} deep", field=field)
