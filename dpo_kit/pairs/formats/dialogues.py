"""Dialogues: HH's texts and ShareGPT's lists of turns."""

from __future__ import annotations

from typing import Any

from dpo_kit.pairs.formats.registry import Format, Row
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


FORMATS = (
    Format(
        "sharegpt",
        "{conversations: [{from, value}], chosen, rejected} (hiyouga/LLaMA-Factory)",
        ("conversations", "chosen", "rejected"),
        _sharegpt,
        optional=("system",),
        prompt_field="conversations",
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
