"""JSON text -> rows: that of one line, and those of a document, which is a list of rows or holds one.

A list is read as a stream: a window of its text goes over it, and each row is decoded when it is there whole.
An object with a list of rows in it is held whole: which of its fields are the rows is known at its end. JSON
is read strictly; what it breaks becomes an `InputError` with line and column of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.schema import Place, kind_of

# A line of JSON that cannot be read is given as its error, so that an audit can go on behind it.
RawRow = tuple[dict[str, Any] | InputError, Place]
Line = tuple[int, str]

# What the window over a document grows by at the least, in characters; 9 (`-Infinity`) or more.
WINDOW = 1 << 20
# Of one row, in bytes or characters: a small packed file can be a line without end.
LONGEST = 1 << 28
# Of a document that is held whole, in characters.
_LONGEST_HELD = 1 << 32
_WHITE = re.compile(r"[ \t\r\n]*")
_ONE_A_LINE = "Each line must hold one JSON object; where the file is one JSON document, name it .json"
_LIST_OF_ROWS = "A .json file holds a list of rows, an object with one such list, or one row on each line"


# An object that has one of these beside a list of objects is a row, and these its replies.
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context")


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(twice)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def row_of_line(path: str, number: int, text: str) -> dict[str, Any]:
    """The row that is all of a line; raises `InputError`."""
    try:
        value, end = _DECODER.raw_decode(text, _skip_white(text, 0))
        end = _skip_white(text, end)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise _broken(path, error.msg, number, error.colno, _ONE_A_LINE) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error, number) from None
    return _checked_row(path, value, number, _ONE_A_LINE)


def rows_of_document(path: str, parts: Iterable[str], line: int = 1) -> Iterator[RawRow]:
    """The rows of a document, whose text is these parts, one behind the other, from this line of the file on.

    Raises `InputError`.
    """
    window = _Window(path, iter(parts), line)
    if window.mark() == "[":
        yield from _elements(window)
        if window.mark():
            raise window.broken("Extra data")
        return
    window.hold_all()
    start, line = window.at, window.line()
    document = window.value()
    if window.mark():
        raise window.broken("Extra data")
    _checked_row(path, document, line, _LIST_OF_ROWS)
    one_row = any(document.get(name) for name in _PROMPTS)
    lists = [] if one_row else [key for key, value in document.items() if _is_rows(value)]
    if len(lists) > 1:
        raise InputError(
            f"several fields hold a list of objects: {', '.join(lists)}",
            file=path,
            line=line,
            mend="Leave the one that holds the rows",
        )
    if lists:
        window.go_back(_value_offset(window.text, start, lists[0]))
        yield from _elements(window)
    elif list(document.values()) != [[]]:
        yield document, Place(path, line)


def _elements(window: _Window) -> Iterator[RawRow]:
    """The rows of the list that the window is at, which it then is behind."""
    window.at += 1
    if window.mark() == "]":
        window.at += 1
        return
    number = 0
    while True:
        line = window.line()
        row = _checked_row(window.path, window.value(), line, _LIST_OF_ROWS)
        number += 1
        yield row, Place(window.path, line, number)
        mark = window.mark()
        if mark not in ("]", ","):
            raise window.broken("Expecting ',' delimiter")
        window.at += 1
        if mark == "]":
            return
        window.mark()


class _Window:
    """The part of a text that is looked at: it grows at its end, and what lies behind `at` is dropped.

    Attributes:
        text: what is in the window.
        at: where in `text` the next thing is to be read.
    """

    def __init__(self, path: str, parts: Iterator[str], line: int) -> None:
        self.path, self.text, self.at = path, "", 0
        self._parts = parts
        self._line, self._column = line, 1  # where in the file the text begins
        self._counted = (0, line)  # an offset in the text, and its line

    def mark(self) -> str:
        """Go to the next character that is not white, and give it; "" at the end of the text."""
        while True:
            self.at = _skip_white(self.text, self.at)
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Read the JSON value that begins here.

        An error of `json` may come from the window's end, which cuts it. One that is the same with more text
        does not, if it is not that of a string which goes on.
        """
        said = ""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                problem, cut = self._broken_at(error.pos, error.msg), error.msg.startswith("Unterminated")
            except (ValueError, RecursionError) as error:
                problem, cut = _unreadable(self.path, error, self.line()), False
            else:
                # A number could go on behind the end.
                if end < len(self.text) or not self._grow():
                    self.at = end
                    return value
                continue
            if (str(problem) == said and not cut) or not self._grow():
                raise problem
            said = str(problem)

    def line(self) -> int:
        """The line of the file that `at` is in."""
        before, line = self._counted
        self._counted = self.at, line + self.text.count("\n", before, self.at)
        return self._counted[1]

    def broken(self, problem: str) -> InputError:
        """What is wrong with the JSON here."""
        return self._broken_at(self.at, problem)

    def hold_all(self) -> None:
        """Take in all that is left of the text; raises `InputError` where that is too much."""
        held, parts = len(self.text), [self.text]
        for part in self._parts:
            held += len(part)
            if held > _LONGEST_HELD:
                problem = f"the document has more than {_LONGEST_HELD:,} characters and is no list"
                raise InputError(problem, file=self.path, mend=_ONE_A_LINE)
            parts.append(part)
        self.text = "".join(parts)

    def go_back(self, at: int) -> None:
        """To a place that is still in the window."""
        self.at, self._counted = at, (0, self._line)

    def _broken_at(self, at: int, problem: str) -> InputError:
        line = self._line + self.text.count("\n", 0, at)
        return _broken(self.path, problem, line, self._column_of(at))

    def _column_of(self, at: int) -> int:
        end = self.text.rfind("\n", 0, at)
        return at - end if end >= 0 else self._column + at

    def _grow(self) -> bool:
        """Take in at least as much as there is, so that a long value is tried a few times only.

        What lies behind `at` is dropped. False, and nothing done, at the end of the text.
        """
        wanted, parts = max(WINDOW, len(self.text) - self.at), []
        for part in self._parts:
            parts.append(part)
            wanted -= len(part)
            if wanted <= 0:
                break
        if not parts:
            return False
        if len(self.text) - self.at > LONGEST:
            raise InputError(f"a row has more than {LONGEST:,} characters", file=self.path, line=self.line())
        self._line, self._column = self.line(), self._column_of(self.at)
        self._counted = (0, self._line)
        self.text = "".join([self.text[self.at :], *parts])
        self.at = 0
        return True


def _skip_white(text: str, at: int) -> int:
    return _WHITE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string too


def _is_rows(value: Any) -> bool:
    """Whether a field holds rows: a list of objects that are not the turns of a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not item.keys() & {"role", "from"} for item in value)
    )


def _value_offset(text: str, at: int, key: str) -> int:
    """Where the key's value begins in the (valid) JSON object that begins at `at`."""
    at = _skip_white(text, at + 1)
    while True:
        name, at = _DECODER.raw_decode(text, at)
        at = _skip_white(text, _skip_white(text, at) + 1)
        if name == key:
            return at
        _, at = _DECODER.raw_decode(text, at)
        at = _skip_white(text, _skip_white(text, at) + 1)


def _checked_row(path: str, value: Any, line: int, mend: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(
            f"a row must be a JSON object, found {kind_of(value)}", file=path, line=line, mend=mend
        )
    return value


def _broken(path: str, problem: str, line: int, column: int, mend: str | None = None) -> InputError:
    return InputError(f"broken JSON: {problem} at column {column}", file=path, line=line, mend=mend)


def _unreadable(path: str, error: ValueError | RecursionError, line: int) -> InputError:
    """For JSON that is not broken, and cannot be read yet; `line` is where the value begins."""
    if isinstance(error, _DuplicateKeyError):
        return InputError("the key is twice in one JSON object", file=path, line=line, field=str(error))
    if isinstance(error, RecursionError):
        return InputError("the JSON is nested too deeply to be read", file=path, line=line)
    # An integer of thousands of digits.
    return InputError(f"the JSON cannot be read: {error}", file=path, line=line)
