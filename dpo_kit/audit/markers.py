"""Signs of turns inside replies: the name of a speaker at the start, and the start of another turn after it.

What stands in code is left alone, where people explain such signs.
"""

from __future__ import annotations

import re

from dpo_kit.audit.code_spans import without_code

_CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|start_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|endoftext|>", "<|end_of_text|>", "</s>"),
)
_NAME = (
    r"(?:Human:|User:|Assistant:|### ?(?:Instruction|Human|User|Assistant|Response)\b:?"
    r"|<\|im_start\|> ?(?:user|assistant)?|<\|(?:user|assistant)\|>)"
)
_AT_START = re.compile(_NAME)
_INSIDE = re.compile(rf"\n{_NAME}|" + "|".join(map(re.escape, _CONTROL)))


def markers_of(reply: str) -> tuple[str, tuple[str, int] | None]:
    """The speaker's name with which the reply begins ("" for none), and the first sign of another turn in
    the rest with its place; the reply has no white space at its start."""
    name = _AT_START.match(reply)
    start = name.end() if name else 0
    if not any(sign in reply for sign in ("\n", "<", "[")):
        return (name[0] if name else ""), None
    inside = _INSIDE.search(reply, start)
    if inside is not None and any(sign in reply for sign in ("`", "$", "\\")):
        inside = _INSIDE.search(without_code(reply), start)
    return (name[0] if name else ""), (inside[0].strip(), inside.start()) if inside else None
