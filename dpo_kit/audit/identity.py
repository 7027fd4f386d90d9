"""When rows, prompts and replies are the same: as they stand, and whatever their case and white space.

What a model would read belongs to it: roles, the borders of turns, tool calls, and the tools and settings
that go with the prompt. A single message without any of that is the same as its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from dpo_kit.audit.minhash import words_of
from dpo_kit.pairs.kinds import CONTEXT

# So many words of a prompt's end are compared apart.
LAST_WORDS = 20

_BITS = 27


def digest(data: bytes, key: int = 0) -> int:
    """64 bits that tell the data, under this key, from others."""
    return int.from_bytes(blake2b(data, digest_size=8, salt=key.to_bytes(8, "little")).digest(), "little")


def words_in_context(row: Mapping[str, Any], part: str | list[dict[str, Any]]) -> list[bytes]:
    """The words of a prompt or reply whatever their case and white space, with words for roles and calls.

    Under other tools they are other words.
    """
    words = words_of(_written(part))
    context = [row[name] for name in CONTEXT if row.get(name)]
    if not context:
        return words
    mark = b"%x" % digest(json.dumps(context).encode())
    return [word + mark for word in words] or [mark]


def _written(part: str | list[dict[str, Any]]) -> str:
    if isinstance(part, str):
        return part
    if len(part) == 1 and part[0]["role"] in ("user", "assistant"):
        return _said(part[0])
    return " ".join([f"\0{message['role']} {_said(message)}" for message in part])


def _said(message: Mapping[str, Any]) -> str:
    """The message's content, and as JSON what else it holds."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    content = message["content"] or ""
    return f"{content} \0{json.dumps(rest, ensure_ascii=False)}" if rest else content


class Came:
    """Whether a digest came before, in 16 MB: now and then a new one is taken for an old one."""

    def __init__(self) -> None:
        self._bits = bytearray(2 ** (_BITS - 3))

    def before(self, number: int) -> bool:
        """Whether it did; from now on it has."""
        place, bit = divmod(number % 2**_BITS, 8)
        known = self._bits[place] >> bit & 1
        self._bits[place] |= 1 << bit
        return bool(known)
