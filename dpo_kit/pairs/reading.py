"""One file -> its rows, each a dict with its place, in the order of the file.

JSON lines and CSV are read as a stream, parquet and arrow by batches; a JSON document is held whole.
Everything is strict: UTF-8, JSON without duplicate keys, CSV rows as long as the header; whatever is not
becomes an `InputError` with file and line. What the rows mean is the business of `formats`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.schema import NUMBERS, Place, kind_of

# A line of JSON that cannot be read is given as its error, so that an audit can go on behind it.
RawRow = tuple[dict[str, Any] | InputError, Place]
Line = tuple[int, str]

COMPRESSIONS = (".gz", ".zst")
BATCH_ROWS = 1000
_LABELS = {"true": True, "false": False, "1": True, "0": False}
_WHITE = re.compile(r"[ \t\r\n]*")
_ONE_A_LINE = "Each line must hold one JSON object; where the file is one JSON document, name it .json"
_LIST_OF_ROWS = "A .json file holds a list of rows, an object with one such list, or one row on each line"


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


def _lines(path: str) -> Iterator[Line]:
    """The lines with their numbers from 1 and their line ends; only `\\n` ends a line."""
    number = 0
    try:
        with _open(path) as stream:
            for raw in stream:
                number += 1
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8",
                        file=path,
                        line=number,
                        mend="Save the file as UTF-8",
                    ) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, EOFError) or "Truncated" in str(error):
            problem, mend = f"the compressed file is cut off after line {number}", "Fetch or pack it again"
        else:
            problem, mend = f"cannot be read: {getattr(error, 'strerror', None) or error}", None
        raise InputError(problem, file=path, mend=mend) from None


def _filled_lines(path: str) -> Iterator[Line]:
    return (line for line in _lines(path) if line[1].strip())


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


def _decoded(path: str, text: str, at: int, line: int, *, alone: bool = False) -> tuple[Any, int]:
    """The JSON value at an offset of the text, and the offset behind it.

    `line` is where in the file the value begins; `alone` says that the text is that line and no more.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _broken(path, error, line if alone else None) from None
    except _DuplicateKeyError as error:
        raise InputError(
            "the key is twice in one JSON object", file=path, line=line, field=str(error)
        ) from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply to be read", file=path, line=line) from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"the JSON cannot be read: {error}", file=path, line=line) from None


def _broken(path: str, error: json.JSONDecodeError, line: int | None = None) -> InputError:
    """`line` is given where the text that the error speaks of is that one line of the file."""
    return InputError(
        f"broken JSON: {error.msg} at column {error.colno}",
        file=path,
        line=error.lineno if line is None else line,
        mend=None if line is None else _ONE_A_LINE,
    )


def _check_row(path: str, value: Any, line: int, mend: str) -> None:
    if not isinstance(value, dict):
        raise InputError(
            f"a row must be a JSON object, found {kind_of(value)}", file=path, line=line, mend=mend
        )


def _skip_white(text: str, at: int) -> int:
    return _WHITE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string too


def _rows_of_lines(path: str, lines: Iterator[Line]) -> Iterator[RawRow]:
    for number, line in lines:
        try:
            yield _row_of_line(path, number, line.rstrip("\r\n")), Place(path, number)
        except InputError as error:
            yield error, Place(path, number)


def _row_of_line(path: str, number: int, text: str) -> dict[str, Any]:
    value, end = _decoded(path, text, _skip_white(text, 0), number, alone=True)
    end = _skip_white(text, end)
    if end < len(text):
        raise _broken(path, json.JSONDecodeError("Extra data", text, end), number)
    _check_row(path, value, number, _ONE_A_LINE)
    return value


def _json_lines(path: str) -> Iterator[RawRow]:
    return _rows_of_lines(path, _filled_lines(path))


def _json(path: str) -> Iterator[RawRow]:
    """A .json file: JSON lines where its first line is a whole object and more follow, else a document."""
    lines = _lines(path)
    start = next((line for line in lines if line[1].strip()), None)
    if start is None:
        return
    if _is_object(start[1]):
        more = next((line for line in lines if line[1].strip()), None)
        if more is not None:
            yield from _rows_of_lines(path, chain((start, more), (line for line in lines if line[1].strip())))
            return
    # The blank lines before the start are put back, so that every line keeps its number.
    text = "".join(chain("\n" * (start[0] - 1), (start[1],), (text for _, text in lines)))
    yield from _rows_of_document(path, text)


def _is_object(line: str) -> bool:
    if not line.startswith("{") or not line.rstrip().endswith("}"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_of_document(path: str, text: str) -> Iterator[RawRow]:
    start = _skip_white(text, 0)
    line = text.count("\n", 0, start) + 1
    if text[start] == "[":
        end = yield from _elements(path, text, start)
        if _skip_white(text, end) < len(text):
            raise _broken(path, json.JSONDecodeError("Extra data", text, _skip_white(text, end)))
        return
    document, end = _decoded(path, text, start, line)
    end = _skip_white(text, end)
    if end < len(text):
        raise _broken(path, json.JSONDecodeError("Extra data", text, end))
    _check_row(path, document, line, _LIST_OF_ROWS)
    lists = [key for key, value in document.items() if _is_rows(value)]
    if len(lists) > 1:
        raise InputError(
            f"several fields hold a list of objects: {', '.join(lists)}",
            file=path,
            line=line,
            mend="Leave the one that holds the rows",
        )
    if lists:
        yield from _elements(path, text, _value_offset(text, start, lists[0]))
    elif list(document.values()) != [[]]:
        yield document, Place(path, line)


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


def _elements(path: str, text: str, at: int) -> Generator[RawRow, None, int]:
    """The rows of the JSON list that begins at `at`, one at a time; returns the offset behind it."""
    line, counted, number = 1, 0, 0
    at = _skip_white(text, at + 1)
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decoded(path, text, at, line)
        _check_row(path, value, line, _LIST_OF_ROWS)
        number += 1
        yield value, Place(path, line, number)
        at = _skip_white(text, at)
        mark = text[at : at + 1]
        if mark == "]":
            return at + 1
        if mark != ",":
            raise _broken(path, json.JSONDecodeError("Expecting ',' delimiter", text, at))
        at = _skip_white(text, at + 1)


def _csv(path: str) -> Iterator[RawRow]:
    """Comma-separated, first record the names, quotes doubled; every cell is text except as in `_cell`."""
    limit = csv.field_size_limit(2**31 - 1)
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
            raise InputError(problem, file=path, line=line, mend="The first line holds the columns' names")
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
