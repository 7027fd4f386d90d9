"""Dialogues: HH's texts and ShareGPT's lists of turns."""

from __future__ import annotations

from typing import Any

from dpo_kit.pairs.formats.registry import Convert, Format, Row
from dpo_kit.pairs.formats.turns import SHAREGPT_ROLES, SYSTEM, message_of, taking_system
from dpo_kit.pairs.formats.values import label
from dpo_kit.pairs.kinds import UNPAIRED
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, kind_of

_SIDES = ("chosen", "rejected")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


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
        for name in _SIDES
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
        replies = {name: _reply(row[name], name) for name in _SIDES}
        return {"prompt": _turns(row[turns], turns), **replies}

    return taking_system(convert)


def _sharegpt_kto(row: Row) -> Row:
    whole = _turns(row["conversations"], "conversations")
    return {"completion": whole, "label": label(row["kto_tag"], "kto_tag")}


def _turns(turns: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise BadRow(f"expected a list of turns, found {kind_of(turns)}", field=field)
    return [message_of(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]


def _reply(reply: Any, field: str) -> list[dict[str, Any]]:
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    if isinstance(reply, list):
        return _turns(reply, field)
    if isinstance(reply, dict):
        return [message_of(reply, field)]
    raise BadRow(f"expected text or a turn, found {kind_of(reply)}", field=field)


def _not_replies(row: Row) -> list[str]:
    """Detection: replies beside the messages, and no prompt; not conversations with a copy of one of them."""
    lists = [name for name in _SIDES if isinstance(row.get(name), list)]
    whole = [name for name in lists if not _is_of_assistant(row[name], 0)]
    lacks = [f"text or one turn in '{name}'" for name in whole]
    if lists and _is_of_assistant(row.get("messages"), -1):
        lacks.append("messages without a reply at their end")
    return [*lacks, "a row without 'prompt'"] if "prompt" in row else lacks


def _not_context(row: Row) -> list[str]:
    turns = isinstance(row.get("context"), list)
    lacks = ["a list of turns in 'context'"] if "context" in row and not turns else []
    return [*lacks, *(f"one turn in '{name}'" for name in _SIDES if not isinstance(row.get(name, {}), dict))]


def _is_of_assistant(turns: Any, at: int) -> bool:
    turn = turns[at] if isinstance(turns, list) and turns else None
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"


def _swift(row: Row) -> Row:
    """The conversation with another last reply is the rejected one."""
    whole = _turns(row["messages"], "messages")
    if not _is_of_assistant(whole, -1):
        raise UnusablePair("reply_not_one_assistant_message", field="messages")
    return {
        "prompt": whole[:-1],
        "chosen": whole[-1:],
        "rejected": _reply(row["rejected_response"], "rejected_response"),
    }


def _swift_conversations(row: Row) -> Row:
    return {name: _turns(row[on_disk], on_disk) for name, on_disk in _SWIFT_SIDES.items()}


_SWIFT_SIDES = {"chosen": "messages", "rejected": "rejected_messages"}


FORMATS = (
    Format(
        "sharegpt",
        "{conversations: [{from, value}], chosen, rejected} (hiyouga/LLaMA-Factory)",
        ("conversations", "chosen", "rejected"),
        _sharegpt("conversations"),
        optional=SYSTEM,
        prompt_field="conversations",
    ),
    Format(
        "messages_and_replies",
        "{messages: [{role, content}], chosen, rejected} as text or one turn each (LLaMA-Factory's openai "
        "format, ranked)",
        ("messages", "chosen", "rejected"),
        _sharegpt("messages"),
        _not_replies,
        optional=SYSTEM,
        prompt_field="messages",
    ),
    Format(
        "swift",
        "{messages: a whole conversation, rejected_response: text in place of its last reply} "
        "(modelscope/ms-swift)",
        ("messages", "rejected_response"),
        taking_system(_swift),
        optional=SYSTEM,
        prompt_field="messages",
        names={"chosen": "messages", "rejected": "rejected_response"},
    ),
    Format(
        "swift_conversations",
        "{messages, rejected_messages}: whole conversations, the better and the worse (modelscope/ms-swift)",
        ("messages", "rejected_messages"),
        taking_system(_swift_conversations),
        optional=SYSTEM,
        names=_SWIFT_SIDES,
    ),
    Format(
        "context_turns",
        "{context: [{role: human or assistant, text}], chosen: {role, text}, rejected: {role, text}} "
        "(PKU-Alignment/processed-hh-rlhf)",
        ("context", "chosen", "rejected"),
        _sharegpt("context"),
        _not_context,
        optional=SYSTEM,
        prompt_field="context",
    ),
    Format(
        "ultrainteract",
        "{trajectory: [{from, value}], chosen, rejected}: the next action, better and worse "
        "(openbmb/UltraInteract_pair)",
        ("trajectory", "chosen", "rejected"),
        _sharegpt("trajectory"),
        optional=SYSTEM,
        prompt_field="trajectory",
    ),
    Format(
        "sharegpt_kto",
        "{conversations: [{from, value}], kto_tag: true where the last reply is desirable} "
        "(hiyouga/LLaMA-Factory)",
        ("conversations", "kto_tag"),
        taking_system(_sharegpt_kto),
        optional=SYSTEM,
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
