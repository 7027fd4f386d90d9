"""What can be seen of a reply without reading it: its surface features, as numbers.

Only features of one reply (and of the words that it has from its prompt); what they explain is for `shallow`.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_WORD = re.compile(r"\w+")
# Occurrences of each are counted, and taken as log(1 + count): twice as many words matter alike everywhere.
_COUNTED = {
    "sentences": re.compile(r"(?<![.!?。！？])[.!?。！？]++(?=\s|$)"),
    "new lines": re.compile(r"\n"),
    "paragraphs": re.compile(r"\n\s*\n"),
    "list items": re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]", re.MULTILINE),
    "headings": re.compile(r"^#{1,6}[ \t]", re.MULTILINE),
    "bold": re.compile(r"\*\*"),
    "code blocks": re.compile(r"```"),
    "inline code": re.compile(r"(?<!`)`(?!`)"),
    "question marks": re.compile(r"[?？]"),
    "exclamation marks": re.compile(r"[!！]"),
}
# Of all characters.
_SHARES = {
    "digits": re.compile(r"\d"),
    "capitals": re.compile(r"[A-Z]"),
    "punctuation": re.compile(r"[^\w\s]"),
    "outside ASCII": re.compile(r"[^\x00-\x7f]"),
}
_OPENINGS = {
    "opens with an apology": re.compile(
        r"\A\s*(?:i['’]?m|i am|we are|we['’]re)?\s*(?:very |so )?sorry\b", re.I
    ),
    "opens with 'As an AI'": re.compile(r"\A\s*as an? (?:ai|artificial|(?:large )?language model)\b", re.I),
    "opens with 'Sure'": re.compile(r"\A\s*sure\b", re.I),
    "opens with 'Certainly' or 'Of course'": re.compile(r"\A\s*(?:certainly|of course|absolutely)\b", re.I),
    "opens with 'I'": re.compile(r"\A\s*i\b", re.I),
}
_PRESENT = {
    **_OPENINGS,
    "refuses": re.compile(r"\bI (?:can['’]?t|cannot|can not|won['’]t|am unable|['’]m unable)\b", re.I),
    "speaks of AI": re.compile(r"\b(?:AI|language model)\b"),
    "has a URL": re.compile(r"https?://|www\."),
    "ends with punctuation": re.compile(r"[.!?。！？\"'”)]\s*\Z"),
    "begins with white space": re.compile(r"\A\s"),
    "ends with white space": re.compile(r"\s\Z"),
}
FEATURES = (
    "length",
    "words",
    "different words",
    "words of the prompt",
    "opens as the prompt",
    *_COUNTED,
    *_SHARES,
    *_PRESENT,
)
# Characters of a reply's opening that are looked for in the prompt.
_OPENING = 24


def surface(prompt: str, reply: str) -> Floats:
    """[F] the `FEATURES` of a reply: logarithms of counts, shares in [0, 1], and 1 or 0 for yes or no."""
    words = _WORD.findall(reply.lower())
    different = set(words)
    known = different & set(_WORD.findall(prompt.lower())) if different else set()
    opening = reply.strip()[:_OPENING]
    values = [
        math.log1p(len(reply)),
        math.log1p(len(words)),
        len(different) / max(len(words), 1),
        len(known) / max(len(different), 1),
        float(len(opening) == _OPENING and opening in prompt),
        *(math.log1p(_count(pattern, reply)) for pattern in _COUNTED.values()),
        *(_count(pattern, reply) / max(len(reply), 1) for pattern in _SHARES.values()),
        *(float(pattern.search(reply) is not None) for pattern in _PRESENT.values()),
    ]
    return np.array(values)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return len(pattern.findall(text))
