"""Text on its way to a person: nothing in it moves a cursor, and no key or password is shown.

What is written into files for programs is not changed here; recipes with secrets are refused (`recipe`).
"""

from __future__ import annotations

import os
import re

# What a terminal obeys (C0 and C1 controls, ESC among them), what turns the direction of writing, and halves
# of surrogate pairs, which no file can hold. Tab and line feed stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Keys of Hugging Face, OpenAI and its kind, GitHub, AWS; and what stands before the host in a URL, which a
# path writes with one slash. In hf://name@split there is no such thing, but with a colon.
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=\bBearer )[\w.~+/=-]{8,}"
)
_CREDENTIALS = re.compile(r"\b((?!hf:)[a-z][a-z0-9+.-]+:/{1,2}|hf:/{1,2}(?=[^/\s@]*:))[^/\s@]+(?=@)", re.I)
_OF_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
# A shorter one stands in ordinary words.
_SHORTEST_SECRET = 12
_INSTEAD = "[secret]"


def visible(text: str) -> str:
    """The text with control characters (all but tab and line feed) by their number: none moves a cursor."""
    return _CONTROLS.sub(_number, text)


def _number(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def without_secrets(text: str) -> str:
    """The text with [secret] for what looks like a key, or is the value of a variable such as $HF_TOKEN."""
    text = _CREDENTIALS.sub(rf"\g<1>{_INSTEAD}", _SECRETS.sub(_INSTEAD, text))
    for value in _environment_secrets():
        text = text.replace(value, _INSTEAD)
    return text


def holds_secret(text: str) -> bool:
    """Whether `without_secrets` would change it."""
    return without_secrets(text) != text


def _environment_secrets() -> list[str]:
    """Values of variables whose names say that they are secret; a path is where one lies, and is none."""
    return [
        value
        for name, value in os.environ.items()
        if name.upper().endswith(_OF_SECRETS)
        and len(value) >= _SHORTEST_SECRET
        and not re.search(r"[/\s]", value)
    ]
