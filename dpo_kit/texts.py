"""Sources -> texts to learn to write, and prompts to reply to; one at a time, in the order of the sources.

A source is a `.txt` file, one text a line, or whatever preference data may lie in (`pairs.sources`): json,
jsonl, csv, parquet, arrow, folders, globs, `hf://owner/name@split`. Which texts are used is the callers'.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs import LoadOptions
from dpo_kit.pairs.formats import detected_format
from dpo_kit.pairs.loading import stream_rows
from dpo_kit.pairs.messages import says_something, text_or_messages
from dpo_kit.pairs.reading import RawRow
from dpo_kit.pairs.schema import BadRow, Place
from dpo_kit.pairs.sources import Source, find_sources
from dpo_kit.pairs.tally import PairsReport

Prompt = str | list[dict[str, str]]

_TEXT_FIELDS = ("text", "review")
_PROMPT_FIELDS = ("prompt", *_TEXT_FIELDS)


def read_texts(sources: Sequence[str], *, field: str) -> Iterator[str]:
    """The lines of text files and the `text` (or `review`) of rows; those that say nothing are left out.

    Args:
        sources: see the module.
        field: what names them in a recipe or on the command line, for errors.

    Raises:
        InputError: while reading; a file that is not there or damaged, a row without such a field.
    """
    for source in sources:
        if is_text_file(source):
            yield from _lines(source, field)
            continue
        for found in find_sources([source])[0]:
            for value, place, name in _values(found, found.rows(), _TEXT_FIELDS):
                if not isinstance(value, str):
                    raise place.error("expected text", field=name)
                if says_something(value):
                    yield value


def read_prompts(sources: Sequence[str], *, field: str) -> Iterator[Prompt]:
    """Prompts, texts or messages: of rows their `prompt` (or `text`, `review`), of text files the lines.

    Preference data of any known shape gives the prompts of its usable rows, each once.

    Args:
        sources: see the module.
        field: as of `read_texts`.

    Raises:
        InputError: as `read_texts`; and a row whose prompt is empty or neither text nor messages.
    """
    for source in sources:
        if is_text_file(source):
            yield from _lines(source, field)
            continue
        for found in find_sources([source])[0]:
            rows = found.rows()
            first = next(rows, None)
            if first is None:
                raise InputError("there is no prompt in the file", file=found.name, field=field)
            if not isinstance(first[0], InputError) and _is_preference_data(first[0], first[1]):
                yield from _prompts_of_pairs(found.name)
            else:
                yield from _prompts_of_rows(found, chain((first,), rows))


def is_text_file(source: str) -> bool:
    """Whether a source is read as one text a line."""
    return str(source).lower().endswith(".txt")


def identity(prompt: Prompt) -> str:
    """Text that is the same for the same prompt, and for no other."""
    return json.dumps(prompt, ensure_ascii=False)


def _lines(path: str, field: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from (text for line in file if (text := line.rstrip("\n")).strip())
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the file cannot be read: {problem}", file=path, field=field) from None


def _is_preference_data(row: dict[str, Any], place: Place) -> bool:
    try:
        detected_format(row, place)
    except InputError:
        return False
    return True


def _prompts_of_pairs(source: str) -> Iterator[Prompt]:
    seen: set[int] = set()
    for row in stream_rows([source], LoadOptions(invalid="drop"), PairsReport()):
        mark = hash(identity(row["prompt"]))
        if mark not in seen:
            seen.add(mark)
            yield row["prompt"]


def _prompts_of_rows(source: Source, rows: Iterator[RawRow]) -> Iterator[Prompt]:
    for value, place, name in _values(source, rows, _PROMPT_FIELDS):
        try:
            prompt = text_or_messages(value, name)
        except BadRow as bad:
            raise place.error(bad.message, field=bad.field, mend=bad.mend) from None
        if not says_something(prompt):
            raise place.error("expected text or a list of messages, found nothing", field=name)
        yield prompt


def _values(
    source: Source, rows: Iterator[RawRow], names: tuple[str, ...]
) -> Iterator[tuple[Any, Place, str]]:
    """Of each row what stands in the field that the first row has, with its place and the field."""
    name: str | None = None
    for row, place in rows:
        if isinstance(row, InputError):
            raise row
        name = name or next((known for known in names if known in row), None)
        if name is None or name not in row:
            raise place.error("the row has no such field", field=name or names[0], mend=_mend(row, names))
        yield row[name], place, name


def _mend(row: dict[str, Any], names: tuple[str, ...]) -> str:
    columns = ", ".join(map(str, row)) or "none"
    return f"Its columns: {columns}; expected {' or '.join(names)}."
