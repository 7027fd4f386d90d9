"""How replies begin that have little to do with their prompt."""

from __future__ import annotations

import re

# Characters of a reply that are looked at.
_HEAD = 160

OPENINGS = {
    "as an AI": re.compile(
        r"\b(?:as|i am|i'm|i’m) (?:just |only )?an? "
        r"(?:ai|artificial intelligence|(?:large )?language model)\b"
        r"|作为(?:一个|一种|一名)?(?:ai|人工智能|语言模型)"
    ),
    "refusal or apology": re.compile(
        r"\A\W*(?:i(?:'m|’m| am) (?:very |so |really )?sorry|sorry\b|i apologi[sz]e|my apologies"
        r"|i can(?:'|’|no)t|i(?:'m|’m| am) (?:not able|unable)"
        r"|i will not\b|i won(?:'|’)t\b|unfortunately|对不起|抱歉|很抱歉)"
    ),
    "eager filler": re.compile(
        r"\A\W*(?:sure\b|certainly\b|of course\b|absolutely\b|great question|good question|i'd be happy to"
        r"|i’d be happy to|当然)"
    ),
}


def openings_of(reply: str) -> list[str]:
    """The names of the `OPENINGS` that the reply has in its first characters."""
    head = reply[:_HEAD].lower()
    return [name for name, pattern in OPENINGS.items() if pattern.search(head)]
