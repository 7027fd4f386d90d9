"""Arenas: the conversations of two models on the same questions, and which one people preferred.

Where the models' conversations went apart before the last reply, the pair has no common prompt and is
reported as such (`prompts_differ`): a preference for a whole conversation is none for its last reply.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_kit.pairs.formats.comparisons import share
from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_label, checked_text, kind_of, parsed_json

WINNERS = {"model_a": 1, "model_b": 0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
_FLAGS = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0.5}


def _battle(row: Row) -> Row:
    sides = [_conversation(row, name) for name in ("conversation_a", "conversation_b")]
    return {"chosen": sides[0], "rejected": sides[1], "preference": share(row["winner"], "winner", WINNERS)}


def _conversation(row: Row, name: str) -> list[Any]:
    """The messages up to the reply that was judged; a column of JSON text (arena-human-preference-100k) too.

    `turn` counts the turns of a conversation; MT-bench has all of them in each row, and judges the one that
    it names.
    """
    messages = parsed_json(row[name], name) if isinstance(row[name], str) else row[name]
    if not isinstance(messages, list):
        raise BadRow(f"expected a list of messages, found {kind_of(messages)}", field=name)
    turn = row.get("turn")
    if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int) or turn < 1):
        raise BadRow("expected a number of turns, 1 or more", field="turn")
    replies = [
        i for i, each in enumerate(messages) if isinstance(each, dict) and each.get("role") == "assistant"
    ]
    if turn is not None and turn < len(replies):
        messages = messages[: replies[turn - 1] + 1]
    return [_without_count(message) for message in messages]


def _without_count(message: Any) -> Any:
    """The message without the arena's own count of its tokens."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key != "num_tokens"}


def _turn_lists(row: Row) -> Row:
    chosen = [name for name in _FLAGS if _flag(row[name], name)]
    if len(chosen) != 1:
        found = f"{len(chosen)} of them are 1"
        raise BadRow(f"expected one of {', '.join(_FLAGS)} to be 1, found {found}", field="winner_model_a")
    questions = _listed(row["prompt"], "prompt")
    if questions is None:
        questions = [row["prompt"]]
        replies = {name: [row[name]] for name in ("response_a", "response_b")}
    else:
        replies = {name: _replies(row[name], name, len(questions)) for name in ("response_a", "response_b")}
    sides = [_interleaved(questions, texts, name) for name, texts in replies.items()]
    return {"chosen": sides[0], "rejected": sides[1], "preference": _FLAGS[chosen[0]]}


def _flag(value: Any, field: str) -> bool:
    try:
        return checked_label({"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else value)
    except BadRow as bad:
        raise BadRow(bad.message, field=field, mend="Known values: 0, 1") from bad


def _listed(value: Any, field: str) -> list[Any] | None:
    """The turns of a column: a list, or a list as JSON text; None where it is plain text."""
    if isinstance(value, list):
        return value
    if not checked_text(value, field).startswith("["):
        return None
    try:
        listed = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return listed if isinstance(listed, list) else None


def _replies(value: Any, field: str, questions: int) -> list[Any]:
    replies = _listed(value, field)
    if replies is None or len(replies) != questions:
        found = kind_of(value) if replies is None else f"{len(replies)}"
        raise BadRow(
            f"expected a list of {questions} replies, one for each question, found {found}", field=field
        )
    return replies


def _interleaved(questions: list[Any], replies: list[Any], field: str) -> list[dict[str, str]]:
    """Questions and replies -> messages; nulls and halves of characters, which are there, are unusable."""
    messages = []
    for i, (question, reply) in enumerate(zip(questions, replies, strict=True)):
        if question is None:
            raise UnusablePair("empty_prompt", field=f"prompt[{i}]")
        if reply is None:
            raise UnusablePair("reply_not_text", field=f"{field}[{i}]", message="the reply is null")
        messages.append({"role": "user", "content": _whole(question, f"prompt[{i}]")})
        messages.append({"role": "assistant", "content": _whole(reply, f"{field}[{i}]")})
    return messages


def _whole(text: Any, field: str) -> str:
    try:
        return checked_text(text, field)
    except BadRow as bad:
        if not isinstance(text, str):
            raise
        raise UnusablePair("content_not_text", field=field, message=bad.message) from bad


FORMATS = (
    Format(
        "chatbot_arena",
        "{conversation_a, conversation_b: messages, winner: model_a, model_b, tie, ...}, up to the turn that "
        "'turn' names (lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments, "
        "lmarena-ai/arena-human-preference-100k and -140k)",
        ("conversation_a", "conversation_b", "winner"),
        _battle,
        optional=("turn",),
        prompt_field="conversation_a",
        names={"chosen": "conversation_a", "rejected": "conversation_b", "preference": "winner"},
    ),
    Format(
        "chatbot_arena_kaggle",
        "{prompt, response_a, response_b: a list of turns as JSON text each, winner_model_a, winner_model_b, "
        "winner_tie: 0 or 1} (lmarena-ai/arena-human-preference-55k, Kaggle's lmsys-chatbot-arena)",
        ("prompt", "response_a", "response_b", *_FLAGS),
        _turn_lists,
        names={"chosen": "response_a", "rejected": "response_b"},
    ),
)
