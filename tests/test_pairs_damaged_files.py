"""Files with flipped, lost and inserted bytes are read or refused with an `InputError`, never a crash."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from dpo_kit.errors import InputError
from dpo_kit.pairs import read_pairs

TEXTS = [{"prompt": f"Ask {i} é", "chosen": f" yes {i}", "rejected": " no", "margin": 1.5} for i in range(30)]
MESSAGES = [
    {"prompt": [{"role": "user", "content": f"Ask {i}"}]}
    | {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for i in range(30)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TEXTS).encode()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict], layout: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with layout(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES = {
    "lines.jsonl": LINES,
    "document.json": json.dumps(TEXTS, indent=1).encode(),
    "lines.jsonl.gz": gzip.compress(LINES),
    "lines.jsonl.zst": zstandard.compress(LINES),
    "cells.csv": as_csv(TEXTS),
    "texts.parquet": as_parquet(TEXTS),
    "messages.parquet": as_parquet(MESSAGES),
    "stream.arrow": as_arrow(TEXTS, pa.ipc.new_stream),
    "messages.arrow": as_arrow(MESSAGES, pa.ipc.new_stream),
    "indexed.arrow": as_arrow(MESSAGES, pa.ipc.new_file),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        kind = rng.choice(["flipped", "flipped", "cut", "lost", "inserted"])
        if kind == "flipped":
            data[at] = rng.randrange(256)
        elif kind == "cut":
            del data[max(at, 1) :]
        elif kind == "lost":
            del data[max(at, 1) : at + rng.randint(1, 20)]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    rng, outcomes, file = random.Random(name), Counter[str](), tmp_path / name
    assert len(read_pairs(write(file, FILES[name]))[0]) == 30
    for _ in range(100):
        try:
            read_pairs(write(file, damaged(FILES[name], rng)), invalid="drop")
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file
