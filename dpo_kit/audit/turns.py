"""The turns of a prompt, be it messages or the text of a dialogue with `Human:` and `Assistant:`."""

from __future__ import annotations

import re

from dpo_kit.audit.findings import Example

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns_of(example: Example) -> list[tuple[str, bool]] | None:
    """(role, whether it says anything) of each turn of the prompt; None where the prompt is one text.

    Tool calls say something, content or not. The `Assistant:` that ends a dialogue opens the reply, and is no
    turn.
    """
    prompt = example.row["prompt"]
    if not isinstance(prompt, str):
        return [
            (message["role"], bool((message["content"] or "").strip() or message.get("tool_calls")))
            for message in prompt
        ]
    if "\n\nHuman:" not in prompt:
        return None
    marks = list(_TURN.finditer(prompt))
    ends = [*(mark.start() for mark in marks[1:]), len(prompt)]
    turns = [
        (_ROLES[mark[1]], bool(prompt[mark.end() : end].strip()))
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == ("assistant", False):
        turns.pop()
    return turns


def last_question(example: Example) -> str:
    """What the user said last, without white space around it; the whole prompt where it has no turns."""
    prompt = example.row["prompt"]
    if not isinstance(prompt, str):
        said = [message["content"] or "" for message in prompt if message["role"] == "user"]
        return said[-1].strip() if said else ""
    _, found, question = prompt.rpartition("\n\nHuman:")
    return question.partition("\n\nAssistant:")[0].strip() if found else prompt.strip()
