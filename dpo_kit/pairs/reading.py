"""One file -> its rows, each a dict with its place, in the order of the file.

JSON and CSV are read as a stream, parquet and arrow by batches (of JSON documents see `json_rows`).
Everything is strict: UTF-8, JSON without duplicate keys, CSV rows as long as the header; whatever is not
becomes an `InputError` with file and line. What the rows mean is the business of `formats`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.json_rows import LONGEST, WINDOW, Line, RawRow, row_of_line, rows_of_document
from dpo_kit.pairs.schema import NUMBERS, Place

COMPRESSIONS = (".gz", ".zst")
BATCH_ROWS = 1000
_LABELS = {"true": True, "false": False, "1": True, "0": False}


def rows_of_file(path: str) -> Iterator[RawRow]:
    """The rows of a file of a supported kind (see `supported`)."""
    kind, _ = _suffixes(path)
    return _READERS[kind](path)


def supported(path: str) -> bool:
    """Whether the name ends like a file that `rows_of_file` reads."""
    kind, compression = _suffixes(path)
    return kind in _READERS and not (compression and kind in _COMPRESSED_INSIDE)


def supported_names() -> str:
    """The endings of `supported`, in words."""
    plain = [kind for kind in _READERS if kind not in _COMPRESSED_INSIDE]
    return f"{', '.join(plain)} (each also {' or '.join(COMPRESSIONS)}), {', '.join(_COMPRESSED_INSIDE)}"


def _suffixes(path: str) -> tuple[str, str]:
    """`a/b.jsonl.gz` -> (`.jsonl`, `.gz`)."""
    name = Path(path.lower())
    if name.suffix in COMPRESSIONS:
        return Path(name.stem).suffix, name.suffix
    return name.suffix, ""


def _open(path: str) -> io.BufferedIOBase:
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        import pyarrow

        # Unlike the zstandard package's stream, this one notices a file that ends too early.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _lines(path: str, longest: int = -1) -> Iterator[Line]:
    """The lines with their numbers from 1 and their line ends; only `\\n` ends a line.

    A line of more bytes than `longest`, where that is given, comes in several parts.
    """
    number, given, rest = 1, 0, b""  # the line, its bytes that were given out, and half a character of it
    try:
        with _open(path) as stream:
            while (raw := stream.readline(LONGEST + 1 if longest < 0 else longest)) or rest:
                if len(raw) > LONGEST:
                    raise InputError(f"the line has more than {LONGEST:,} bytes", file=path, line=number)
                ended = raw.endswith(b"\n")
                whole = longest < 0 or ended or len(raw) < longest
                raw = rest + raw
                try:
                    text, used = codecs.utf_8_decode(raw, "strict", whole)
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"byte {given + error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8",
                        file=path,
                        line=number,
                        mend="Save the file as UTF-8",
                    ) from None
                yield number, text.removeprefix("\ufeff") if number == 1 and not given else text
                if ended:
                    number, given, rest = number + 1, 0, b""
                else:
                    given, rest = given + used, raw[used:]
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, EOFError) or "Truncated" in str(error):
            problem = f"the compressed file is cut off after line {number - 1}"
            mend: str | None = "Fetch or pack it again"
        else:
            problem, mend = f"cannot be read: {getattr(error, 'strerror', None) or error}", None
        raise InputError(problem, file=path, mend=mend) from None


def _filled_lines(path: str) -> Iterator[Line]:
    return (line for line in _lines(path) if line[1] and not line[1].isspace())


def _rows_of_lines(path: str, lines: Iterator[Line]) -> Iterator[RawRow]:
    for number, line in lines:
        try:
            yield row_of_line(path, number, line.rstrip("\r\n")), Place(path, number)
        except InputError as error:
            yield error, Place(path, number)


def _json_lines(path: str) -> Iterator[RawRow]:
    return _rows_of_lines(path, _filled_lines(path))


def _json(path: str) -> Iterator[RawRow]:
    """A .json file: JSON lines where its first line is a whole object and more follow, else a document."""
    start = next((line for line in _lines(path, WINDOW) if line[1].strip()), None)
    if start is None:
        return
    if start[1].startswith("{") and _is_lines(path):
        yield from _json_lines(path)
        return
    parts = (text for number, text in _lines(path, WINDOW) if number >= start[0])
    yield from rows_of_document(path, parts, start[0])


def _is_lines(path: str) -> bool:
    lines = _filled_lines(path)
    return _is_object(next(lines)[1]) and next(lines, None) is not None


def _is_object(line: str) -> bool:
    if not line.startswith("{") or not line.rstrip().endswith("}"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _csv(path: str) -> Iterator[RawRow]:
    """Comma-separated, first record the names, quotes doubled; every cell is text except as in `_cell`."""
    limit = csv.field_size_limit(LONGEST)
    records = csv.reader((text for _, text in _lines(path)), strict=True)
    header: list[str] | None = None
    number = 0
    line = 1
    try:
        for record in records:
            if header is None and record:
                header = _checked_header(path, record, line)
            elif header is not None and record:
                number += 1
                if len(record) != len(header):
                    raise InputError(
                        f"row {number} has {len(record)} cells where the header has {len(header)}",
                        file=path,
                        line=line,
                        mend="Put cells that hold commas, quotes or line ends in double quotes",
                    )
                row = {name: _cell(name, text) for name, text in zip(header, record, strict=True)}
                yield row, Place(path, line, number)
            line = records.line_num + 1
    except csv.Error as error:
        raise InputError(f"broken CSV: {error}", file=path, line=line) from None
    finally:
        csv.field_size_limit(limit)


def _checked_header(path: str, names: list[str], line: int) -> list[str]:
    for i, name in enumerate(names):
        if not name.strip() or name in names[:i]:
            problem = f"the column '{name}' is there twice" if name.strip() else f"column {i + 1} has no name"
            mend = "The first line holds the columns' names"
            if not name.strip() and i == 0:
                mend += "; is it the index that pandas writes? Then write the file with index=False"
            raise InputError(problem, file=path, line=line, mend=mend)
    return names


def _cell(name: str, text: str) -> Any:
    """A number or label where one belongs and is written, nothing where it is left empty; else the text."""
    if name == "label":
        return _LABELS.get(text.lower(), text or None)
    if name not in NUMBERS:
        return text
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _parquet(path: str) -> Iterator[RawRow]:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file.schema_arrow.names
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return _rows_of_batches(path, batches())


def _arrow(path: str) -> Iterator[RawRow]:
    """Both of Arrow's layouts: the file with an index, and the stream, which is what `datasets` writes."""
    import pyarrow
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(path) as source:
            try:
                indexed = pyarrow.ipc.open_file(source)
                found = (indexed.get_batch(i) for i in range(indexed.num_record_batches))
                names = indexed.schema.names
            except pyarrow.ArrowInvalid:
                source.seek(0)
                found = pyarrow.ipc.open_stream(source)
                names = found.schema.names
            yield names
            for batch in found:
                yield from (batch.slice(at, BATCH_ROWS) for at in range(0, batch.num_rows, BATCH_ROWS))

    return _rows_of_batches(path, batches())


def _rows_of_batches(path: str, batches: Iterator[Any]) -> Iterator[RawRow]:
    """Rows of Arrow record batches, which follow the columns' names."""
    import pyarrow

    number = 0
    try:
        names = next(batches)
        for i, name in enumerate(names):
            if name in names[:i]:
                raise InputError("the column is there twice", file=path, field=name)
        for batch in batches:
            batch.validate(full=True)  # Arrow believes a damaged file's offsets, and reads beyond its memory
            for row in batch.to_pylist():
                number += 1
                yield row, Place(path, row=number)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = f"cannot be read after row {number}: {error}"
        raise InputError(problem, file=path, mend="Is it whole, and of the kind its name says?") from None


_READERS: dict[str, Callable[[str], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
_COMPRESSED_INSIDE = (".parquet", ".arrow")
