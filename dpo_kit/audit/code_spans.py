"""Code and formulas in a text, taken out of it: in time linear in its length, whatever it holds."""

from __future__ import annotations

import re

_OPENING = re.compile(r"```|`|\$\$|\$|\\\(|\\\[|\\begin\{")
_CLOSING = {
    "```": "```",
    "`": "`",
    "$$": "$$",
    "$": "$",
    "\\(": "\\)",
    "\\[": "\\]",
    "\\begin{": "\\end{",
}
_ON_ONE_LINE = frozenset("`$")


def without_code(text: str) -> str:
    """The text with spaces in place of code and formulas of Markdown and LaTeX; others keep their places.

    A fence that is not closed goes on to the end; other openings without their closing are text, and so are a
    single backtick or dollar whose line has no second one.
    """
    if "`" not in text and "$" not in text and "\\" not in text:
        return text
    ahead = _Ahead(text)
    pieces, done, at = [], 0, 0
    while (opening := _OPENING.search(text, at)) is not None:
        mark, start = opening[0], opening.start()
        closing = _CLOSING[mark]
        end = ahead.find(closing, opening.end())
        if mark == "```" and end < 0:
            end = len(text)
        if end < 0 or (mark in _ON_ONE_LINE and 0 <= ahead.find("\n", start) < end):
            at = opening.end()
            continue
        at = min(end + len(closing), len(text))
        pieces += [text[done:start], " " * (at - start)]
        done = at
    return "".join([*pieces, text[done:]]) if pieces else text


class _Ahead:
    """Where marks stand next; asked at places that only grow, it reads the text once for each mark."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._next: dict[str, int] = {}

    def find(self, mark: str, start: int) -> int:
        """The first place of the mark from `start` on, or -1."""
        known = self._next.get(mark, 0)
        if known >= 0 and (known < start or mark not in self._next):
            self._next[mark] = self._text.find(mark, start)
        return self._next[mark]
