"""Texts that went through the wrong decoder, or not through one that they needed.

Lost characters, UTF-8 read as something else, escapes and markup left in prose, characters that nobody sees.
Only training rows are looked at. Code, formulas and paths are left alone, as far as they can be told.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace

from dpo_kit.audit.code_spans import without_code
from dpo_kit.audit.faults import PROMPT, Account, clipped, reply_labels, reply_sides
from dpo_kit.audit.findings import Example, Finding, Result, Severity

# All of ASCII that is no text: NUL and control characters, but tab, newline and the carriage return.
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r"))

# What cp1252 makes of the bytes 0x80 to 0xbf, which go on a character in UTF-8; where it makes nothing of
# them, and in Latin-1, the control characters of the same number.
_FOLLOWING = bytes(range(0x80, 0xA0)).decode("cp1252", "ignore") + "".join(map(chr, range(0x80, 0xC0)))
_BYTE_OF = {ord(bytes([b]).decode("cp1252", "ignore") or chr(b)): b for b in range(0x80, 0x100)}
_BYTE_OF |= {b: b for b in range(0x80, 0x100)}
_MAYBE_MISREAD = re.compile(f"[\u00c2-\u00f4][{_FOLLOWING}]")
_MISREAD = re.compile(
    f"(?:[\u00c2-\u00df][{_FOLLOWING}]|[\u00e0-\u00ef][{_FOLLOWING}]{{2}}|[\u00f0-\u00f4][{_FOLLOWING}]{{3}})+"
)
# After a word in capitals these close a quotation or go on with dots: `CAFÉ»`.
_AFTER_CAPITALS = frozenset("»”’“‘…›")
# As many characters as this in a row are no accident, whatever they are.
_RUN = 3

_SUSPICIOUS = re.compile(
    "[\ufffd\ufeff\u0080-\u009f\u0300-\u036f\u00ad\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u2064"
    "\ue000-\uf8ff\U000f0000-\U0010fffd]"
)
# Joiners belong to emoji and to scripts that join letters, marks of direction to those from right to left.
_UNSEEN = re.compile("[\u00ad\u200b\u2028\u2029\u202a-\u202e\u2060-\u2064]")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")
_C1 = re.compile("[\u0080-\u0084\u0086-\u009f]")

# A run of escapes; what follows is looked at apart, or the search would try every shorter run.
_ESCAPES = re.compile(r"(?<!\\)(?:\\r)?(?:\\[nt])++|(?<!\\)\\u[0-9a-fA-F]{4}(?![\"'\]-])")
# Where a quotation begins or ends, a pattern, or a set of characters.
_BEFORE_QUOTED = frozenset("\"'`([/|{+")
_AFTER_QUOTED = frozenset("\"'`)]/|\\}%+*?")
# Commands of LaTeX that begin like an escape with a letter after it.
_COMMAND = re.compile(
    r"\\(?:n(?:abla|eg?|eq|ew\w*|o(?:t|tin|indent|number|limits|de\w*|rmalsize)|u|exists|mid|parallel"
    r"|leq|geq|i|atural|earrow|warrow|cong|sim|subseteq)"
    r"|t(?:ext\w*|imes|heta|au|anh?|o|op|frac|ilde|ri\w*|itle|able\w*|oday|iny|abular|ikz\w*|herefore"
    r"|hinspace|wo\w*|binom))(?![a-z])"
)
_PATH = re.compile(r"(?:[A-Za-z]:|\\)\\\S*\Z")
_PATH_LENGTH = 100
# So many escapes are no mention, where they are more than the line ends.
_ESCAPES_MEANT = 2
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|ndash|mdash|hellip|[lr][sd]quo|#\d{2,6}|#x[0-9a-fA-F]{2,6});"
)
_TAG = re.compile(
    r"</?(?:br|p|div|span|b|i|u|em|strong|ul|ol|li|a|h[1-6]|table|tr|td|th|font|blockquote)"
    r"(?:\s[^<>]{0,300})?/?>",
    re.IGNORECASE,
)
_LONE_RETURN = re.compile(r"\r(?!\n)")
# Letters with a mark apart, where one character has both.
_APART = re.compile("[A-Za-z\u0400-\u04ff][\u0300-\u0304\u0306-\u030c\u0323\u0327\u0328]")


class Damage:
    """Damage to the characters of prompts and replies."""

    name = "damage"

    def __init__(self) -> None:
        self._account = Account()
        self._last: tuple[str, list[tuple[str, str, int]]] = ("", [])

    def add(self, example: Example) -> None:
        """One row; held-out ones are passed over."""
        if example.held_out:
            return
        sides = reply_sides(example)
        self._account.count(example, sides)
        if example.prompt != self._last[0]:
            found = [hit for hit in damages(example.prompt) if hit[0] not in _OF_REPLIES]
            self._last = (example.prompt, found)
        hits: dict[str, tuple[int, dict[str, str]]] = {}
        texts = [(PROMPT, "prompt", example.prompt, self._last[1])] if self._last[1] else []
        for side, i in zip(sides, range(len(sides)), strict=True):
            reply = example.replies[i]
            found = list(damages(reply))
            if found:
                texts.append((side, reply_labels(example)[i], reply, found))
        for side, label, text, found in texts:
            for name, what, at in found:
                where, show = hits.get(name, (0, {}))
                hits[name] = (where | side, {"what": what} | show | {label: clipped(text, at)})
        for name, (where, show) in hits.items():
            self._account.add(name, example, where, show)

    def result(self) -> Result:
        """Findings; figures count the rows with each kind of damage by side."""
        findings = [self._account.finding(name, *words) for name, words in _FAULTS.items()]
        found = [finding for finding in findings if finding is not None]
        return Result(tuple(map(_capped, found)), self._account.by_side())


def damages(text: str) -> Iterator[tuple[str, str, int]]:
    """(name, what is there, at which character) for each kind of damage that the text has."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw.translate(None, _CONTROLS)) != len(raw):
        at = next(i for i, char in enumerate(text) if ord(char) < 128 and ord(char) in _CONTROLS)
        yield "control_characters", _code_point(text[at]), at
    if "\r" in text and (lone := _LONE_RETURN.search(text)):
        yield "lone_carriage_returns", _code_point("\r"), lone.start()
    if "\\" in text:
        yield from _escapes(text)
    if "&" in text or "</" in text or "<br" in text or "<p" in text:
        yield from _markup(text)
    if not text.isascii():
        yield from _beyond_ascii(text)


def _escapes(text: str) -> Iterator[tuple[str, str, int]]:
    """Escapes that stand for line ends that the text has not, or for a letter inside of a word."""
    prose, meant = without_code(text), 0
    enough = max(_ESCAPES_MEANT, text.count("\n") + 1)
    first: re.Match[str] | None = None
    for found in _ESCAPES.finditer(prose):
        before, after = prose[found.start() - 1 : found.start()], prose[found.end() : found.end() + 1]
        if before in _BEFORE_QUOTED or (found[0][1] != "u" and not _is_line_end(prose, found, before, after)):
            continue
        if found[0][1] == "u":
            # Of the letters around it one at least belongs to it; else it is spoken of.
            meant += _ESCAPES_MEANT * (before.isalpha() or (not before and after.isalpha()))
        else:
            meant += found[0].count("\\")
        first = first or found
        if meant >= enough:
            yield "literal_escapes", first[0], first.start()
            return


def _is_line_end(prose: str, found: re.Match[str], before: str, after: str) -> bool:
    """Whether a run of escapes can be meant for line ends: it is not spoken of, and no path or command."""
    spoken_of = (not before or before.isspace()) and (not after or after.isspace() or after in ".,;:")
    if spoken_of or after in _AFTER_QUOTED or _COMMAND.match(prose, found.end() - 2):
        return False
    return not _PATH.search(prose, max(0, found.start() - _PATH_LENGTH), found.end())


def _markup(text: str) -> Iterator[tuple[str, str, int]]:
    prose = without_code(text)
    if "<html" in prose.lower():  # a whole page, which somebody asked for
        return
    for name, pattern in (("html_entities", _ENTITY), ("html_tags", _TAG)):
        if found := pattern.search(prose):
            yield name, found[0][:40], found.start()


def _beyond_ascii(text: str) -> Iterator[tuple[str, str, int]]:
    if (misread := _misread(text)) is not None:
        yield "mojibake", f"{misread[0]} for {misread[1]}", text.find(misread[0])
    if not _SUSPICIOUS.search(text):
        return
    if (at := text.find("\ufffd")) >= 0:
        yield "replacement_characters", _code_point("\ufffd"), at
    if (at := text.find("\ufeff")) >= 0:
        yield "byte_order_marks", _code_point("\ufeff"), at
    for name, pattern in (
        ("control_characters", _C1 if misread is None else None),
        ("unseen_characters", _UNSEEN),
        ("private_characters", _PRIVATE),
    ):
        if pattern is not None and (found := pattern.search(text)):
            yield name, _code_point(found[0]), found.start()
    if (apart := _APART.search(text)) and len(unicodedata.normalize("NFC", apart[0])) == 1:
        yield "marks_apart", f"{unicodedata.normalize('NFC', apart[0])} in two characters", apart.start()


def _misread(text: str) -> tuple[str, str] | None:
    """A run of characters that is UTF-8 in Latin-1 or cp1252, and what it should have been.

    Single ones count where they give a letter with a mark, a dash, a quotation mark or the like: those two
    or three are rare beside each other in any language, while others could be a letter before punctuation
    (`É»`, `é …`).
    """
    if not _MAYBE_MISREAD.search(text):
        return None
    for found in _MISREAD.finditer(text):
        run = found[0]
        try:
            meant = bytes(_BYTE_OF[ord(char)] for char in run).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            continue
        before = text[found.start() - 1 : found.start()]
        if len(meant) < _RUN and run[1] in _AFTER_CAPITALS and before.isupper():
            continue
        if len(meant) >= _RUN or any(map(_is_plain, meant)) or any(ord(char) > 0xFFFF for char in meant):
            return run, meant
    return None


def _is_plain(char: str) -> bool:
    """Of the characters that texts in Latin script are full of."""
    return "\u00a0" <= char <= "\u017f" or "\u2010" <= char <= "\u203a" or char in "€™\ufeff"


def _code_point(char: str) -> str:
    return f"U+{ord(char):04X} {unicodedata.name(char, '')}".strip()


def _capped(finding: Finding) -> Finding:
    """Escapes are told from those that a text speaks of by guess: no error."""
    if finding.name != "literal_escapes" or finding.severity != "error":
        return finding
    return replace(finding, severity="warning")


# Of prompts these are what the user wrote, and said on purpose.
_OF_REPLIES = frozenset({"html_entities", "html_tags"})

_FAULTS: dict[str, tuple[str, str, Severity]] = {
    "replacement_characters": (
        "hold U+FFFD, which stands where a decoder lost a character",
        "Load the data anew from its source in the right encoding, or take these rows out.",
        "error",
    ),
    "mojibake": (
        "hold UTF-8 that was read as Latin-1 or cp1252",
        "Undo it, if all of the file has it (`text.encode('cp1252').decode('utf-8')`), or load it anew.",
        "error",
    ),
    "byte_order_marks": (
        "hold a byte order mark (U+FEFF) inside the text",
        "Take the marks out: they are tokens of their own, which no user types.",
        "warning",
    ),
    "literal_escapes": (
        r"hold a backslash with a letter in place of the character that it stands for (`\n`, `\u00e9`)",
        "Decode the escapes once more: the text was escaped twice.",
        "error",
    ),
    "html_entities": (
        "hold HTML entities such as `&amp;` in a reply, outside code",
        "Unescape them (`html.unescape`), unless the model is to write HTML.",
        "warning",
    ),
    "html_tags": (
        "hold HTML tags such as `<br>` in a reply, outside code",
        "Turn them to plain text or Markdown, unless the model is to write HTML.",
        "warning",
    ),
    "control_characters": (
        "hold control characters or NUL",
        "Take them out, after a look at what they stand for.",
        "warning",
    ),
    "lone_carriage_returns": (
        "hold carriage returns without a newline",
        "Write newlines in their place.",
        "warning",
    ),
    "unseen_characters": (
        "hold characters that nobody sees (zero-width space, soft hyphen, marks of direction, ...)",
        "Take them out, where they are left from a web page.",
        "warning",
    ),
    "private_characters": (
        "hold characters for private use, which mean nothing outside one font",
        "Find what they stand for (often a symbol or emoji of a web page), and replace them.",
        "warning",
    ),
    "marks_apart": (
        "hold letters and their marks as two characters, where Unicode has one (NFD)",
        "Normalise all texts to NFC (`unicodedata.normalize`): the same word has other tokens in NFD.",
        "warning",
    ),
}
