"""The shapes that preference data has on disk: one small adapter each, in a registry.

An adapter says what a row lacks to be of its shape, and turns such a row into a canonical one of its kind
(pair, unpaired, ranked list). It does not check the result: `canonical.canonical_row` does that for every
adapter alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_kit.errors import InputError
from dpo_kit.pairs.canonical import canonical_row
from dpo_kit.pairs.kinds import KINDS_OF_ROWS, LISTS, PAIRS, UNPAIRED, Kind
from dpo_kit.pairs.schema import (
    SCORES,
    BadRow,
    Place,
    UnusablePair,
    checked_extras,
    checked_text,
    filled_extras,
    kind_of,
    need,
)

Row = Mapping[str, Any]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
}


def _nothing(row: Row) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Format:
    """One shape: its name, what it looks like and where it comes from, and its adapter.

    `convert(row)` gives a row that `canonical_row` takes as one of the `kind`, and raises `BadRow` or
    `UnusablePair`; it need not copy the `common_fields`. A row is of this shape where it has the `fields`
    and `lacks_beside(row)` names nothing else (in words) that is missing. `optional` are columns that
    `convert` looks at too.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    convert: Callable[[Row], Row]
    lacks_beside: Callable[[Row], list[str]] = _nothing
    optional: tuple[str, ...] = ()
    prompt_field: str = "prompt"
    kind: Kind = PAIRS

    @property
    def common_fields(self) -> frozenset[str]:
        """Columns that any format of this kind may have."""
        return frozenset((*self.kind.extras, *(SCORES if self.kind == PAIRS else ())))

    def missing(self, row: Row) -> list[str]:
        """The fields that the row has not."""
        return [name for name in self.fields if name not in row]

    def lacks(self, row: Row) -> list[str]:
        """In words all that the row lacks to be of this shape; nothing where it fits."""
        return [f"the field '{name}'" for name in self.missing(row)] + self.lacks_beside(row)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Those of the columns that nothing is taken from."""
        return sorted({str(name) for name in columns} - self.common_fields - {*self.fields, *self.optional})

    def canonical(self, row: Row) -> dict[str, Any]:
        """The row as a canonical one of the kind; raises `BadRow` and `UnusablePair`."""
        for name in self.fields:
            need(row, name)
        try:
            converted = self.convert(row)
        except UnusablePair:
            checked_extras(row, self.kind)  # a bad row is bad whatever else is the matter with it
            raise
        except KeyError as error:  # the natural `row["question"]["text"]` of an adapter of the user's
            raise BadRow(f"format '{self.name}' finds no {error} in the row") from error
        if not isinstance(converted, Mapping):
            raise TypeError(
                f"format '{self.name}': convert must return a row, not {type(converted).__name__}"
            )
        extras = {name: row[name] for name in self.common_fields if name in row}
        return canonical_row({**extras, **converted}, self.kind, prompt_field=self.prompt_field)


FORMATS: dict[str, Format] = {}


def register_format(
    name: str,
    convert: Callable[[Row], Row],
    *,
    fields: Sequence[str],
    optional: Sequence[str] = (),
    detect: Callable[[Row], bool] | None = None,
    about: str = "",
    kind: Literal["pairs", "unpaired", "lists"] = "pairs",
) -> None:
    """Add a shape of your own, or replace one; it is tried before those that were there.

    Parameters
    ----------
    name: what `format=` calls it.
    convert: a row (a dict of column -> value) to a canonical row: `prompt`, `chosen`, `rejected` as text
        or lists of {role, content}, or the last two alone as whole conversations; of an unpaired row
        `prompt`, `completion`, `label`, of a list `prompt`, `completions`, `scores` (or `ranks`). It may
        raise `schema.UnusablePair` and `schema.BadRow`.
    fields: the columns that every row of this shape has.
    optional: other columns that `convert` looks at; the rest is reported as not used.
    detect: a further condition for rows that have these columns.
    about: one line: what the shape is, and where it comes from.
    kind: what a row is.
    """

    def lacks_beside(row: Row) -> list[str]:
        fits = detect is None or any(name not in row for name in fields) or detect(row)
        return [] if fits else [f"what '{name}' is detected by"]

    if name == "auto":
        raise ValueError("'auto' is what finds the format, and no name for one")
    known = {each.name: each for each in KINDS_OF_ROWS}
    if kind not in known:
        raise ValueError(f"unknown kind '{kind}'; known: {', '.join(known)}")
    added = Format(name, about, tuple(fields), convert, lacks_beside, tuple(optional), kind=known[kind])
    others = {key: value for key, value in FORMATS.items() if key != name}
    FORMATS.clear()
    FORMATS.update({name: added, **others})


def named_format(name: str) -> Format:
    """The format of this name; raises `InputError` with the nearest name where there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise InputError(
        f"unknown format '{name}'", field="format", mend=f"{hint}Known formats: auto, {', '.join(FORMATS)}"
    )


def detected_format(row: Row, place: Place) -> Format:
    """The first format that the row fits; raises `InputError` with what the nearest ones lack."""
    for form in FORMATS.values():
        if not form.lacks(row):
            return form
    nearest = sorted(FORMATS.values(), key=lambda form: len(form.lacks(row)))[:3]
    words = [f"'{form.name}' lacks {', '.join(form.lacks(row))}" for form in nearest]
    if all(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        words.append("where a reply begins in a whole text cannot be told from its characters")
    first = nearest[0]
    raise place.error(
        f"no known format has these columns: {', '.join(map(str, row)) or 'none'}. "
        f"The nearest: {'; '.join(words)}",
        field=first.missing(row)[0] if len(first.lacks(row)) == 1 and first.missing(row) else None,
        mend="Rename or add fields, or name the format",
    )


def split_hh(dialogue: str, field: str) -> tuple[str, str]:
    """HH dialogue -> (prompt, reply), cut just behind the last `\\n\\nAssistant:`; no character is lost."""
    at = dialogue.rfind(ASSISTANT)
    if at < 0:
        raise BadRow(r"the dialogue has no '\n\nAssistant:' turn", field=field)
    at += len(ASSISTANT)
    return dialogue[:at], dialogue[at:]


def _columns(*names: str) -> Callable[[Row], Row]:
    """An adapter that takes these columns as they are, those that there are."""
    return lambda row: {name: row[name] for name in names if name in row}


def _not_conversations(row: Row) -> list[str]:
    sides = [name for name in ("chosen", "rejected") if name in row]
    return [f"a list of messages in '{name}'" for name in sides if not isinstance(row[name], list)]


def _implicit(row: Row) -> Row:
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str):
            raise BadRow(
                "expected a whole conversation as a list of messages, found text; where a reply begins "
                "in a whole text cannot be told from its characters",
                field=name,
            )
    return {name: row[name] for name in ("chosen", "rejected")}


def _not_dialogues(row: Row) -> list[str]:
    return [
        rf"'\n\nHuman:' and '\n\nAssistant:' turns in '{name}'"
        for name in ("chosen", "rejected")
        if name in row and not (isinstance(row[name], str) and HUMAN in row[name] and ASSISTANT in row[name])
    ]


def _hh(row: Row) -> Row:
    chosen_prompt, chosen = split_hh(checked_text(row["chosen"], "chosen"), "chosen")
    rejected_prompt, rejected = split_hh(checked_text(row["rejected"], "rejected"), "rejected")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if HUMAN in reply:
            raise UnusablePair(
                "reply_not_one_assistant_message",
                field=name,
                message="the dialogue ends with a human turn, where the assistant's reply should be",
            )
    if chosen_prompt != rejected_prompt:
        raise UnusablePair("prompts_differ", field="rejected")
    if not chosen_prompt.replace(HUMAN, "").replace(ASSISTANT, "").strip():
        raise UnusablePair("empty_prompt", field="chosen")
    return {"prompt": chosen_prompt, "chosen": chosen, "rejected": rejected}


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRow(f"expected a list of turns, found {kind_of(turns)}", field="conversations")
    prompt = [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    replies = {name: _sharegpt_reply(row[name], name) for name in ("chosen", "rejected")}
    system = row.get("system")
    if system is not None and checked_text(system, "system"):
        first = {"role": "system", "content": system}
        if not prompt or prompt[0]["role"] != "system":
            prompt = [first, *prompt]
        elif prompt[0] != first:
            raise BadRow("the system text is not that of the conversation's own system turn", field="system")
    return {"prompt": prompt, **replies}


def _sharegpt_reply(reply: Any, field: str) -> list[dict]:
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    if isinstance(reply, dict):
        return [_sharegpt_turn(reply, field)]
    if isinstance(reply, list):
        return [_sharegpt_turn(turn, f"{field}[{i}]") for i, turn in enumerate(reply)]
    raise BadRow(f"expected text or a turn, found {kind_of(reply)}", field=field)


def _sharegpt_turn(turn: Any, field: str) -> dict[str, Any]:
    """{from, value} or {role, content} -> a message, with whatever else the turn says still there."""
    if not isinstance(turn, dict):
        raise BadRow(f"expected a turn with from and value, found {kind_of(turn)}", field=field)
    role_key, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    for key in (role_key, text_key):
        if key not in turn:
            raise BadRow("the turn has no such key", field=f"{field}.{key}")
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        found = f"'{role}'" if isinstance(role, str) else kind_of(role)
        known = ", ".join(SHAREGPT_ROLES)
        raise BadRow(f"unknown role {found}", field=f"{field}.{role_key}", mend=f"Known roles: {known}")
    extras = filled_extras(turn, (role_key, text_key))
    if extras.keys() & {"role", "content"}:
        raise BadRow("the turn has both from and value and role and content", field=field)
    if text is not None or not extras:
        checked_text(text, f"{field}.{text_key}")
    return {**extras, "role": SHAREGPT_ROLES[role], "content": text}


def _not_ranked(row: Row) -> list[str]:
    return [] if row.keys() & {"scores", "ranks"} else ["the field 'scores' or 'ranks'"]


def _labelled_conversation(row: Row) -> Row:
    return {"completion": row["messages"], "label": row["label"]}


_BUILT_IN = (
    Format(
        "explicit_prompt",
        "{prompt, chosen, rejected} as text or messages; chosen and rejected may repeat the prompt as "
        "messages (HuggingFaceH4/ultrafeedback_binarized)",
        ("prompt", "chosen", "rejected"),
        _columns("prompt", "chosen", "rejected"),
    ),
    Format(
        "sharegpt",
        "{conversations: [{from, value}], chosen, rejected} (hiyouga/LLaMA-Factory)",
        ("conversations", "chosen", "rejected"),
        _sharegpt,
        optional=("system",),
        prompt_field="conversations",
    ),
    Format(
        "implicit_prompt",
        "{chosen, rejected} as whole conversations, lists of messages",
        ("chosen", "rejected"),
        _implicit,
        _not_conversations,
    ),
    Format(
        "hh",
        r"{chosen, rejected} as '\n\nHuman: ... \n\nAssistant: ...' dialogues (Anthropic/hh-rlhf)",
        ("chosen", "rejected"),
        _hh,
        _not_dialogues,
        prompt_field="chosen",
    ),
    Format(
        "ranked",
        "{prompt, completions: [K], scores: [K] (higher is better) or ranks: [K] (1 is best)} as text or "
        "messages",
        ("prompt", "completions"),
        _columns("prompt", "completions", "scores", "ranks"),
        _not_ranked,
        optional=("scores", "ranks"),
        kind=LISTS,
    ),
    Format(
        "unpaired",
        "{prompt, completion, label} as text or messages; label: true where the completion is desirable "
        "(huggingface/trl)",
        ("prompt", "completion", "label"),
        _columns("prompt", "completion", "label"),
        kind=UNPAIRED,
    ),
    Format(
        "unpaired_messages",
        "{messages, label} with a whole conversation (hiyouga/LLaMA-Factory)",
        ("messages", "label"),
        _labelled_conversation,
        prompt_field="messages",
        kind=UNPAIRED,
    ),
)
FORMATS.update({form.name: form for form in _BUILT_IN})
