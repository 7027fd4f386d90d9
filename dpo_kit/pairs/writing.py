"""Canonical rows -> files that load again to the same rows, one row at a time: JSON lines, JSON, parquet.

A file is written under a temporary name and renamed when it is whole. Which rows is `convert`'s and
`splitting`'s business. A row's `source` is written as `origin`, for the loader sets `source` anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_kit.errors import InputError
from dpo_kit.pairs.arrow_rows import arrow_schema, packed_row
from dpo_kit.pairs.kinds import kind_of_columns
from dpo_kit.pairs.loading import Sources, usable_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.sources import find_sources
from dpo_kit.pairs.tally import PairsReport

ORIGIN = "origin"
ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".json", ".parquet")
_ROW_GROUP = 1000


class RowWriter:
    """A file that rows go into; whole on leaving the `with` block, and not there where that is left in haste.

    Parquet has every optional column of the kind, null where a row has none, since its schema is written
    before the rows are known. Raises `InputError` for a path that cannot be written to, or an unknown ending.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.rows = 0
        name = self.path.name.lower()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.writing")
        if not any(name.endswith(ending) for ending in ENDINGS):
            raise InputError(
                "it has no ending that is known here", file=path, mend=f"Known: {', '.join(ENDINGS)}"
            )
        with self._writing():
            if self.path.is_dir():
                raise InputError(
                    "this is a folder", file=path, mend=f"Name a file in it: {self.path}/pairs.jsonl"
                )
            if not self.path.parent.is_dir():
                raise InputError("no such folder", file=self.path.parent, mend="Make it first")
            try:
                self._temporary.touch()
                parquet = name.endswith(".parquet")
                self._body = _Parquet(self._temporary) if parquet else _Json(self._temporary, name)
            except BaseException:  # a signal among them
                with suppress(OSError):
                    self._temporary.unlink(missing_ok=True)
                raise

    def __enter__(self) -> Self:
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a canonical row as `load_pairs` gives it; its null columns are left out."""
        plain = {name: value for name, value in row.items() if value is not None and name != "source"}
        if "source" in row:
            plain[ORIGIN] = row["source"]
        with self._writing():
            self._body.write(plain)
        self.rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._writing():
                if kind is None:
                    self._body.finish()
                self._body.close()
                if kind is None:
                    os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Trouble with the file, as one that has no place left, becomes an `InputError`."""
        try:
            yield
        except (OSError, UnicodeEncodeError) as error:
            problem = f"cannot be written: {getattr(error, 'strerror', None) or error}"
            raise InputError(problem, file=self.path) from error


class _Json:
    """JSON text, a row on each line; of a `.json` file the lines are the elements of one list."""

    def __init__(self, path: Path, name: str) -> None:
        import pyarrow

        packed = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
        self._stream = pyarrow.output_stream(str(path), compression=packed)
        listed = name.endswith(".json")
        self._before, self._between, self._after = ("[\n", ",\n", "\n]\n") if listed else ("", "\n", "\n")
        self._empty = True

    def write(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        self._stream.write(
            ((self._before if self._empty else self._between) + text).encode(errors="backslashreplace")
        )
        self._empty = False

    def finish(self) -> None:
        self._stream.write(((self._before if self._empty else "") + self._after).encode())

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[dict[str, Any]] = []
        self._writer: Any = None

    def write(self, row: dict[str, Any]) -> None:
        self._waiting.append(packed_row(row))
        if len(self._waiting) == _ROW_GROUP:
            self.finish()

    def finish(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._waiting:
            return
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(
                self._path, _schema_of(self._waiting[0]), compression="zstd"
            )
        self._writer.write_batch(pyarrow.RecordBatch.from_pylist(self._waiting, self._writer.schema))
        self._waiting.clear()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _schema_of(row: Mapping[str, Any]) -> Any:
    """What a column of the row's kind holds; of messages, the extras too, as `messages.packed` has them."""
    import pyarrow

    kind = kind_of_columns(row)
    assert kind is not None
    schema = arrow_schema(kind, messages=not isinstance(row["prompt"], str), extras=True)
    names = [ORIGIN if field.name == "source" else field.name for field in schema]
    return pyarrow.schema(list(zip(names, schema.types, strict=True)))


def convert_pairs(
    sources: Sources,
    out: str | Path,
    options: LoadOptions = LoadOptions(),  # noqa: B008
) -> PairsReport:
    """Write what `load_pairs` would load as canonical rows, without holding it; the account of the loading.

    Raises `InputError` as `load_pairs` does, for an `out` that cannot be written to, and for one that is
    among the sources; `out` is then as it was.
    """
    require_not_source(sources, out)
    report = PairsReport()
    with RowWriter(out) as writer:
        for row in usable_rows(sources, options, report):
            writer.write(row)
    return report


def require_not_source(sources: Sources, *outs: str | Path) -> None:
    """Raises `InputError` where one of the files to be written is read, or is to be written twice."""
    read = {os.path.realpath(source.name) for source in find_sources(sources)[0]}
    for i, out in enumerate(outs):
        real = os.path.realpath(Path(out).expanduser())
        if real in read:
            raise InputError("this file is one of the sources", file=out, mend="Name another file to write")
        if real in {os.path.realpath(Path(other).expanduser()) for other in outs[:i]}:
            raise InputError("the same file is to be written twice", file=out, mend="Name two files")
