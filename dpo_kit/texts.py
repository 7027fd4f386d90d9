"""Sources -> texts to learn to write, and prompts to reply to; one at a time, in the order of the sources.

A source is a `.txt` file (or a glob that ends so), one text a line, or whatever preference data may lie in
(`pairs.sources`): json, jsonl, csv, parquet, arrow, folders, globs, `hf://owner/name@split`. Which texts are
used is the callers'.
"""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.pairs.formats import detected_format
from dpo_kit.pairs.found_files import matched, require_inside, require_regular
from dpo_kit.pairs.messages import require_usable, says_something, text_or_messages
from dpo_kit.pairs.reading import RawRow
from dpo_kit.pairs.schema import KINDS, BadRow, Place, UnusablePair
from dpo_kit.pairs.sources import Source, find_sources

Prompt = str | list[dict[str, str]]

_TEXT_FIELDS = ("text", "review")
_PROMPT_FIELDS = ("prompt", *_TEXT_FIELDS)
# What makes a row nothing to learn from, and leaves its prompt as good as any.
_OF_REPLIES = frozenset(("identical", "empty_completion", "reply_not_text", "nothing_to_compare", "unjudged"))


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

    Preference data of any known shape gives the prompts of its rows, each once: those of ties too, and of
    replies that nothing can be learned from. Warns (`DpoKitWarning`) of rows without a usable prompt.

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
                yield from _prompts_of_pairs(found.name, chain((first,), rows))
            else:
                yield from _prompts_of_rows(found, chain((first,), rows))


def is_text_file(source: str) -> bool:
    """Whether a source is read as one text a line."""
    return str(source).lower().endswith(".txt")


def identity(prompt: Prompt) -> str:
    """Text that is the same for the same prompt, and for no other."""
    return json.dumps(prompt, ensure_ascii=False)


def _lines(source: str, field: str) -> Iterator[str]:
    path = os.path.expanduser(source)
    paths = [path]
    if glob.has_magic(path) and not os.path.exists(path):
        folder, paths = matched(path)
        for found in paths:
            require_inside(folder, found)
    elif os.path.exists(path):
        require_regular(path)
    if not paths:
        raise InputError("no file matches", file=source, field=field)
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:
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


def _prompts_of_pairs(source: str, rows: Iterator[RawRow]) -> Iterator[Prompt]:
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    try:
        for prompt in _prompt_of_each(rows, left_out):
            if (mark := identity(prompt)) not in seen:
                seen.add(mark)
                yield prompt
    finally:
        if left_out:
            why = "; ".join(f"{count:,}: {KINDS[kind].message}" for kind, count in left_out.items())
            message = f"{source}: rows without a usable prompt are left out, {why}"
            warnings.warn(message, DpoKitWarning, stacklevel=2)


def _prompt_of_each(rows: Iterator[RawRow], left_out: Counter[str]) -> Iterator[Prompt]:
    """The prompts of rows of one shape; rows that have none are counted by what is the matter with them."""
    row, place = first = next(rows)
    form = detected_format(row, place)  # type: ignore[arg-type]
    convert, rows = form.convert, chain((first,), rows)
    for row, place in form.gather(rows) if form.gather else rows:
        if isinstance(row, InputError):
            raise row
        try:
            parts = list(form.canonical(row, convert))
        except BadRow as bad:
            raise place.error(bad.message, field=bad.field, mend=bad.mend) from None
        unusable = [part for part in parts if isinstance(part, UnusablePair)]
        found = [part["prompt"] for part in parts if not isinstance(part, UnusablePair)]
        if not found and all(part.kind in _OF_REPLIES for part in unusable):
            found = _own_prompt(row)
        if not found:
            left_out[unusable[0].kind if unusable else "nothing_to_compare"] += 1
        yield from found


def _own_prompt(row: dict[str, Any]) -> list[Prompt]:
    """The row's field `prompt`, where it has one that says something."""
    try:
        prompt = text_or_messages(row.get("prompt"), "prompt")
        if not isinstance(prompt, str):
            require_usable(prompt, "prompt")
    except (BadRow, UnusablePair):
        return []
    if isinstance(prompt, str) and any(isinstance(row.get(name), list) for name in ("chosen", "rejected")):
        prompt = [{"role": "user", "content": prompt}]  # as beside replies that are messages
    return [prompt] if says_something(prompt) else []


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
