"""Files of JSON lines: one object a line, UTF-8. Preference data is read and written by `pairs`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_kit.disk import writing


def json_line(row: Any) -> str:
    """A row as it stands in a file, with its line break."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a whole file, row by row: beside its place first, then renamed."""
    written = path.with_name(f".{path.name}.writing")
    # Half of a surrogate pair has no UTF-8, but an escape in JSON: the same as backslashreplace writes.
    with writing(path.name, path.parent, partial=written):
        with open(written, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(map(json_line, rows))
        os.replace(written, path)


def read_lines(path: Path) -> list[Any]:
    """The rows of a file; empty lines are none."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[Any]:
    """`read_lines`, one row at a time."""
    # A text's own line separators (U+2028) end no line, as they would for `splitlines`.
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from (json.loads(line) for line in file if line.strip())
