"""Canonical rows in Arrow: in memory where they are few, else in a file, which the next loading finds again.

A file of rows is known by what they were made of: the bytes and names of the sources, the options, and the
code of this package, whose next version may read the same row otherwise. It is written as a stream under a
temporary name, and read by a memory map. Beside it lies the account of the loading as JSON, with the digest
of the file, by which damage is noticed. What a row is, is `loading`'s.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_kit.cache_folder import ELSEWHERE, cache_folder, sweep
from dpo_kit.disk import writing
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.tally import PairsReport

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch, Schema

# Up to so many batches stay in memory: about 20 MB, and a file costs more than making them again.
BATCHES_IN_MEMORY = 20


def file_of_rows(files: Sequence[str], options: LoadOptions) -> Path | None:
    """Where the rows of these files lie, if they were loaded before; None where a file cannot be read."""
    key = hashlib.sha256(json.dumps([_code(), asdict(options)], default=repr).encode())
    try:
        for file in files:
            # The name too: it stands in the rows' places.
            key.update(json.dumps([file, _digest(file)]).encode())
    except OSError:
        return None
    return cache_folder(None, "rows") / f"{key.hexdigest()[:40]}.arrow"


@cache
def _code() -> str:
    """A digest of this package's own code."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _digest(file: str | Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def kept_rows(file: Path) -> tuple[Dataset, PairsReport] | None:
    """What `store_rows` kept in the file; None where it did not, or where that is damaged (a warning)."""
    account = file.with_suffix(".json")
    if not (file.exists() and account.exists()):
        return None
    try:
        kept = json.loads(account.read_text(encoding="utf-8"))
        if kept["digest"] != _digest(file):
            raise ValueError("the digest is another")
        return _mapped(file, kept["absent"]), PairsReport.from_state(kept["report"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(
            f"{file}: the cache of rows is damaged ({error}); loading again", DpoKitWarning, stacklevel=4
        )
        return None


def store_rows(
    batches: Iterator[RecordBatch], extras: Sequence[str], report: PairsReport, file: Path | None
) -> Dataset:
    """Batches of rows -> a data set without those of the columns `extras` that no row has.

    The last batch has the schema of all; fields of structs may have come to it on the way. `file` None: many
    rows go to a file too, but to one that is gone when the process ends. `report` is what the batches' making
    has filled when the last of them is there.
    """
    import pyarrow
    from datasets import Dataset

    head = list(islice(batches, BATCHES_IN_MEMORY))
    more = next(batches, None)
    if more is None:
        schema = head[-1].schema
        table = pyarrow.Table.from_batches([batch.cast(schema) for batch in head], schema)
        return Dataset(table.drop_columns([name for name in extras if table[name].null_count == len(table)]))
    making = _folder_for_making()
    try:
        rows = making / "rows.arrow"
        with writing("the cache of rows", making.parent, mend=ELSEWHERE):
            present = _write(chain(head, [more], batches), rows)
        absent = [name for name in extras if name not in present]
        if file is None:
            atexit.register(shutil.rmtree, making, ignore_errors=True)
            return _mapped(rows, absent)
        kept = {"digest": _digest(rows), "absent": absent, "report": report.to_state()}
        with writing("the cache of rows", making.parent, mend=ELSEWHERE):
            (making / "rows.json").write_text(json.dumps(kept), encoding="utf-8")
        os.replace(rows, file)
        os.replace(making / "rows.json", file.with_suffix(".json"))
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    making.rmdir()
    return _mapped(file, absent)


def _folder_for_making() -> Path:
    folder = cache_folder(None, "rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, "making-*")
        return Path(tempfile.mkdtemp(prefix="making-", dir=folder))
    except OSError as error:
        raise InputError(
            f"cannot make the folder for the cache of rows: {error.strerror}",
            file=folder,
            mend="Set DPO_KIT_CACHE to a folder that can be written",
        ) from error


def _mapped(file: Path, absent: Sequence[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_file(str(file)).remove_columns(list(absent))


def _write(batches: Iterator[RecordBatch], file: Path) -> set[str]:
    """Returns the columns that any row has something in."""
    import pyarrow

    first = next(batches)
    batches = chain([first], batches)
    present: set[str] = set()
    while True:
        wider = _write_alike(batches, first.schema, file, present)
        if wider is None:
            return present
        narrow = file.rename(file.with_suffix(".narrow"))
        with pyarrow.memory_map(str(narrow)) as written:
            before = (batch.cast(wider.schema) for batch in pyarrow.ipc.open_stream(written))
            rest = _write_alike(chain(before, [wider], batches), wider.schema, file, present)
        narrow.unlink()
        assert rest is None
        return present


def _write_alike(
    batches: Iterator[RecordBatch], schema: Schema, file: Path, present: set[str]
) -> RecordBatch | None:
    """Write up to the first batch of another schema, and return that."""
    import pyarrow

    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            if batch.schema != schema:
                return batch
            present.update(name for name in schema.names if batch[name].null_count < len(batch))
            writer.write_batch(batch)
    return None
