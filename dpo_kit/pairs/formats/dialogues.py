"""Dialogues: HH's texts and ShareGPT's lists of turns."""

from __future__ import annotations

from typing import Any

from dpo_kit.pairs.formats.registry import Convert, Format, Row
from dpo_kit.pairs.kinds import UNPAIRED
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, filled_extras, kind_of

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
    "developer": "developer",
    # Of a call only its text is known here, and what a template would write for it is not.
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
}


def split_hh(dialogue: str, field: str) -> tuple[str, str]:
    """HH dialogue -> (prompt, reply), cut just behind the last `\\n\\nAssistant:`; no character is lost."""
    at = dialogue.rfind(ASSISTANT)
    if at < 0:
        raise BadRow(r"the dialogue has no '\n\nAssistant:' turn", field=field)
    at += len(ASSISTANT)
    return dialogue[:at], dialogue[at:]


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


def _sharegpt(turns: str) -> Convert:
    """The adapter of rows with the turns before the reply in this column."""

    def convert(row: Row) -> Row:
        prompt = _sharegpt_prompt(row, turns)
        return {
            "prompt": prompt,
            **{name: _sharegpt_reply(row[name], name) for name in ("chosen", "rejected")},
        }

    return convert


def _sharegpt_kto(row: Row) -> Row:
    return {"completion": _sharegpt_prompt(row, "conversations"), "label": row["kto_tag"]}


def _sharegpt_prompt(row: Row, field: str) -> list[dict]:
    turns = row[field]
    if not isinstance(turns, list):
        raise BadRow(f"expected a list of turns, found {kind_of(turns)}", field=field)
    prompt = [_sharegpt_turn(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]
    system = row.get("system")
    if system is None or not checked_text(system, "system"):
        return prompt
    first = {"role": "system", "content": system}
    if not prompt or prompt[0]["role"] != "system":
        return [first, *prompt]
    if prompt[0] != first:
        raise BadRow("the system text is not that of the conversation's own system turn", field="system")
    return prompt


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
    sharegpt = "from" in turn or "value" in turn
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    if role_key not in turn or (sharegpt and text_key not in turn):
        missing = role_key if role_key not in turn else text_key
        raise BadRow("the turn has no such key", field=f"{field}.{missing}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        found = f"'{role}'" if isinstance(role, str) else kind_of(role)
        known = ", ".join(SHAREGPT_ROLES)
        raise BadRow(f"unknown role {found}", field=f"{field}.{role_key}", mend=f"Known roles: {known}")
    if not sharegpt:
        return {**turn, "role": SHAREGPT_ROLES[role]}
    extras = filled_extras(turn, (role_key, text_key))
    if extras.keys() & {"role", "content"}:
        raise BadRow("the turn has both from and value and role and content", field=field)
    text = turn[text_key]
    if text is not None or not extras:
        checked_text(text, f"{field}.{text_key}")
    return {**extras, "role": SHAREGPT_ROLES[role], "content": text}


def _not_turns(row: Row) -> list[str]:
    """Detection: replies beside the messages, and no prompt; not conversations with a copy of one of them."""
    lists = [name for name in ("chosen", "rejected") if isinstance(row.get(name), list)]
    beside = ["a row without 'prompt'"] if "prompt" in row else []
    return [f"text or one turn in '{name}'" for name in lists] + beside


FORMATS = (
    Format(
        "sharegpt",
        "{conversations: [{from, value}], chosen, rejected} (hiyouga/LLaMA-Factory)",
        ("conversations", "chosen", "rejected"),
        _sharegpt("conversations"),
        optional=("system",),
        prompt_field="conversations",
    ),
    Format(
        "messages_and_replies",
        "{messages: [{role, content}], chosen, rejected} as text or one turn each (LLaMA-Factory's openai "
        "format, ranked)",
        ("messages", "chosen", "rejected"),
        _sharegpt("messages"),
        _not_turns,
        optional=("system",),
        prompt_field="messages",
    ),
    Format(
        "ultrainteract",
        "{trajectory: [{from, value}], chosen, rejected}: the next action, better and worse "
        "(openbmb/UltraInteract_pair)",
        ("trajectory", "chosen", "rejected"),
        _sharegpt("trajectory"),
        optional=("system",),
        prompt_field="trajectory",
    ),
    Format(
        "sharegpt_kto",
        "{conversations: [{from, value}], kto_tag: true where the last reply is desirable} "
        "(hiyouga/LLaMA-Factory)",
        ("conversations", "kto_tag"),
        _sharegpt_kto,
        optional=("system",),
        prompt_field="conversations",
        names={"label": "kto_tag"},
        kind=UNPAIRED,
    ),
    Format(
        "hh",
        r"{chosen, rejected} as '\n\nHuman: ... \n\nAssistant: ...' dialogues (Anthropic/hh-rlhf)",
        ("chosen", "rejected"),
        _hh,
        _not_dialogues,
        prompt_field="chosen",
    ),
)
