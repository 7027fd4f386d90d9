"""Files, folders, globs and hub splits: the same rows from every container, and broken files named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs
from dpo_kit.pairs.json_rows import rows_of_document

# Characters that careless readers take for line ends, quotes and separators.
ODD = "“x”\u2028\x85 a,b;\"c\"\r\n\ttab \ufeff 😀 '\\n'"
ROWS = [{"prompt": f"{i} {ODD}", "chosen": f"{ODD} yes", "rejected": f" no {i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def error_of(sources: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_pairs(sources)
    assert caught.value.exit_status == 2
    return caught.value


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: list[dict], opener: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with opener(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def as_parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


JSON_LIST = json.dumps(ROWS, indent=2).encode()
CONTAINERS = {
    "a.jsonl": (LINES, [":1", ":2", ":3"]),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINES, [":1", ":2", ":3"]),
    "crlf.JSONL": (b"\r\n" + LINES.replace(b"}\n", b"}\r\n\r\n"), [":2", ":4", ":6"]),
    "no-last-line-end.ndjson": (LINES.rstrip(), [":1", ":2", ":3"]),
    "a.jsonl.gz": (gzip.compress(LINES[:99]) + gzip.compress(LINES[99:]), [":1", ":2", ":3"]),
    "a.jsonl.zst": (
        zstandard.compress(LINES[:99]) + zstandard.compress(LINES[99:]),
        [":1", ":2", ":3"],
    ),
    "list.json": (b"\n" + JSON_LIST, [":3 (row 1)", ":8 (row 2)", ":13 (row 3)"]),
    "list.json.gz": (gzip.compress(JSON_LIST), [":2 (row 1)", ":7 (row 2)", ":12 (row 3)"]),
    "one-line.json": (json.dumps(ROWS).encode(), [":1 (row 1)", ":1 (row 2)", ":1 (row 3)"]),
    "object.json": (
        json.dumps({"about": {"n": [3]}, "tags": ["x"], "data": ROWS}, indent=1).encode(),
        [":11 (row 1)", ":16 (row 2)", ":21 (row 3)"],
    ),
    "object-in-a-line.json": (
        json.dumps({"data": ROWS}).encode(),
        [":1 (row 1)", ":1 (row 2)", ":1 (row 3)"],
    ),
    "really-lines.json": (b"\n" + LINES, [":2", ":3", ":4"]),
    "a.csv": (as_csv(ROWS), [":2 (row 1)", ":5 (row 2)", ":8 (row 3)"]),
    "a.csv.gz": (gzip.compress(as_csv(ROWS)), [":2 (row 1)", ":5 (row 2)", ":8 (row 3)"]),
    "a.parquet": (as_parquet(ROWS), [":row 1", ":row 2", ":row 3"]),
    "stream.arrow": (as_arrow(ROWS, pa.ipc.new_stream), [":row 1", ":row 2", ":row 3"]),
    "file.arrow": (as_arrow(ROWS, pa.ipc.new_file), [":row 1", ":row 2", ":row 3"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows_and_their_places(tmp_path: Path, name: str) -> None:
    content, places = CONTAINERS[name]
    path = tmp_path / name
    path.write_bytes(content)
    pairs, _ = read_pairs(path)
    assert [{key: pair[key] for key in ROWS[0]} for pair in pairs] == ROWS
    assert [pair["source"] for pair in pairs] == [f"{path}{place}" for place in places]


MESSAGE_ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(3)
]


def test_messages_in_parquet_where_a_column_is_null_for_some(tmp_path: Path) -> None:
    rows: list[dict] = [{**row, "margin": None, "prompt_id": None} for row in MESSAGE_ROWS]
    rows[1]["prompt"] = [{"role": "user", "content": "1", "name": None}]
    rows[2]["margin"] = 0.5
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(rows))
    data = load_pairs(path)
    assert [{key: row[key] for key in MESSAGE_ROWS[0]} for row in data] == MESSAGE_ROWS
    assert data["margin"][:] == [None, None, 0.5]
    assert "prompt_id" not in data.column_names


def test_single_sharegpt_row_is_not_taken_for_a_list_of_rows(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "a", "rejected": "b"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row, indent=2))
    assert read_pairs(path)[0][0]["source"] == f"{path}:1"


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.lists(st.integers()), max_size=3)),
    indent=st.sampled_from([None, 0, 3]),
    before=st.sampled_from(["", "\n", " \r\n\t"]),
)
def test_json_list_walk_agrees_with_json_and_names_true_lines(rows: list, indent: int, before: str) -> None:
    text = f"{before}{json.dumps(rows, indent=indent)}\n "
    found = list(rows_of_document("f", [text]))
    assert [row for row, _ in found] == rows
    lines = text.split("\n")
    if indent is not None:
        assert all(lines[place.line - 1].strip().startswith("{") for _, place in found if place.line)
    assert len({place.line for _, place in found}) == (len(rows) if indent is not None else min(1, len(rows)))


def test_csv_numbers_and_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,margin,prompt_id\r\n1,2,3,0.5,\r\n\r\n4,5,6,,x\r\n")
    pairs, _ = read_pairs(path)
    assert pairs == [
        {"prompt": "1", "chosen": "2", "rejected": "3", "margin": 0.5, "source": f"{path}:2 (row 1)"},
        {"prompt": "4", "chosen": "5", "rejected": "6", "prompt_id": "x", "source": f"{path}:4 (row 2)"},
    ]
    path.write_text("prompt,chosen,rejected,margin\n1,2,3,high\n")
    error = error_of(path)
    assert (error.line, error.field) == (2, "margin")


def test_csv_cells_beyond_the_csv_modules_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv([{"prompt": "p" * 300_000, "chosen": "a", "rejected": "b"}]))
    assert len(read_pairs(path)[0][0]["prompt"]) == 300_000
    assert csv.field_size_limit() == before


def test_line_of_ten_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"prompt": "é" * 10_000_000, "chosen": "a", "rejected": "b"}) + "\n" + LINES.decode()
    )
    pairs, _ = read_pairs(path)
    assert len(pairs[0]["prompt"]) == 10_000_000
    assert pairs[3]["source"] == f"{path}:4"


# Folders, globs, the hub


def test_folders_are_walked_sorted_and_globs_matched(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/.hidden.jsonl", ".git/x.jsonl", "a/dataset_info.json", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    _, report = read_pairs(tmp_path)
    assert [s.file for s in report.sources] == [str(tmp_path / "b.jsonl"), str(tmp_path / "a/z.jsonl")]
    assert report.ignored == [str(tmp_path / "LICENSE"), str(tmp_path / "a/dataset_info.json")]
    _, report = read_pairs([f"{tmp_path}/**/z*", tmp_path / "b.jsonl"])
    assert [s.file for s in report.sources] == [str(tmp_path / "a/z.jsonl"), str(tmp_path / "b.jsonl")]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(LINES)
    assert len(read_pairs(tmp_path / "a[1].jsonl")[0]) == 3


def test_hub_notation_with_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    (tmp_path / "set" / "test.jsonl").write_bytes(LINES.splitlines(keepends=True)[2])
    monkeypatch.chdir(tmp_path)
    pairs, report = read_pairs("hf://./set@train")
    assert [{key: pair[key] for key in ROWS[0]} for pair in pairs] == ROWS
    assert pairs[2]["source"] == "hf://./set@train:row 3"
    assert report.sources[0].file == "hf://./set@train"
    assert read_pairs("hf://./set@test")[1].read == 1
    assert "dev" in str(error_of("hf://./set@dev"))
    assert "no such folder" in str(error_of("hf://./other@train"))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    error = error_of("hf://nobody-here/no-such-set/config@train")
    assert error.file == "hf://nobody-here/no-such-set/config@train"
    assert "without the hub" in str(error)


@pytest.mark.parametrize(
    "source", ["hf://owner/name", "hf://name@train", "hf://a/b/c/d@train", "hf://@train"]
)
def test_hub_notation_is_checked(source: str) -> None:
    error = error_of(source)
    assert error.file == source
    assert error.mend is not None
    assert "hf://owner/name[/config]@split" in error.mend


# Broken files


def spoilt_gzip() -> bytes:
    text = "".join(
        json.dumps({**ROWS[0], "prompt": random.Random(i).random().hex()}) + "\n" for i in range(2000)
    )
    return gzip.compress(text.encode())[:-2000]


GOOD = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"
BROKEN = {
    "cut.jsonl": (GOOD * 2 + GOOD[:20], 3, "broken JSON: Unterminated string"),
    "two-in-a-line.jsonl": (GOOD + GOOD.strip() + GOOD, 2, "Extra data at column"),
    "list.jsonl": (b"[" + GOOD.strip() + b"]\n", 1, "found a list. Each line must hold one JSON object"),
    "pretty.jsonl": (b"{\n}\n", 1, "name it .json"),
    "latin1.jsonl": (GOOD + b'{"prompt": "caf\xe9"}\n', 2, "(0xe9) is not UTF-8"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), 1, "is not UTF-8"),
    "latin1.json": (b"[\n" + GOOD + b',{"prompt": "caf\xe9"}]', 3, "(0xe9) is not UTF-8"),
    "twice.jsonl": (
        GOOD + b'{"prompt": "a", "chosen": "b", "chosen": "c"}',
        2,
        "field 'chosen': the key is twice",
    ),
    "twice.json": (b'[\n{"prompt": {"x": 1, "x": 1}}]', 2, "field 'x': the key is twice"),
    "deep.jsonl": (GOOD + b'{"prompt": ' + b"[" * 200_000, 2, "nested too deeply"),
    "deep.json": (b"[\n" + GOOD + b"," + b"[" * 200_000 + b"]" * 200_000, 3, "nested too deeply"),
    "digits.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}", 1, "the JSON cannot be read"),
    "number.json": (b"3", 1, "must be a JSON object, found a number"),
    "items.json": (b"[" + GOOD + b", 3]", 2, "must be a JSON object, found a number"),
    "comma.json": (b"[\n" + GOOD + GOOD + b"]", 3, "Expecting ',' delimiter"),
    "open.json": (b"[\n" + GOOD + b",", 3, "broken JSON: Expecting value"),
    "after.json": (b"[\n" + GOOD + b"]\n}", 4, "Extra data at column 1"),
    "object.json": (b'{"data": [\n' + GOOD + b"],\n}", 4, "broken JSON"),
    "lists.json": (b'{"a": [{"x": 1}], "b": [{"x": 1}]}', 1, "several fields hold a list of objects: a, b"),
    "lines.json": (GOOD + GOOD[:9], 2, "broken JSON"),
    "cells.csv": (
        b'prompt,chosen,rejected\n"a\nb",c,d\na,b\n',
        4,
        "row 2 has 2 cells where the header has 3",
    ),
    "quote.csv": (b'prompt,chosen,rejected\na,b,c\n"a,b,c\nd', 3, "broken CSV"),
    "quotes.csv": (b'prompt,chosen,rejected\n"a"b,b,c\n', 2, "broken CSV"),
    "header.csv": (b"prompt,chosen,chosen\n", 1, "'chosen' is there twice"),
    "nameless.csv": (b"prompt,,chosen\n", 1, "column 2 has no name"),
    "cut.jsonl.gz": (spoilt_gzip(), None, "is cut off after line 1"),
    "cut.jsonl.zst": (zstandard.compress(GOOD)[:-3], None, "is cut off"),
    "not.jsonl.gz": (GOOD, None, "Not a gzipped file"),
    "not.jsonl.zst": (GOOD, None, "cannot be read"),
    "not.parquet": (GOOD, None, "cannot be read"),
    "cut.parquet": (as_parquet(ROWS)[:-20], None, "cannot be read"),
    "not.arrow": (GOOD, None, "cannot be read"),
    "cut.arrow": (as_arrow(ROWS, pa.ipc.new_stream)[:-300], None, "cannot be read"),
    "empty.jsonl": (b"", None, "no row in it"),
    "blank.json": (b" \n \n", None, "no row in it"),
    "list-of-none.json": (b"[ ]", None, "no row in it"),
    "object-of-none.json": (b'{"data": []}', None, "no row in it"),
    "header-only.csv": (b"prompt,chosen,rejected\n", None, "no row in it"),
    "empty.arrow": (b"", None, "cannot be read"),
    "empty.jsonl.gz": (gzip.compress(b""), None, "no row in it"),
    "a.txt": (GOOD, None, "Known endings: .jsonl"),
    "a.parquet.gz": (GOOD, None, "Known endings: .jsonl"),
    "a.gz": (GOOD, None, "Known endings: .jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str) -> None:
    content, line, said = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    error = error_of(path)
    assert error.file == str(path)
    if line is not None:
        assert error.line == line
    assert said in str(error)


def test_missing_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(LINES)
    error = error_of(tmp_path / "pair.jsonl")
    assert (error.file, error.problem) == (str(tmp_path / "pair.jsonl"), "no such file or folder")
    assert "holds: pairs.jsonl" in str(error)
    assert "not there either" in str(error_of(tmp_path / "no" / "pair.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "holds no file of pairs" in str(error_of(tmp_path / "empty"))
    assert "matches" in str(error_of(f"{tmp_path}/*.parquet"))
    assert "no source" in str(error_of([]))
    assert "found int" in str(error_of([3]))


def test_a_bad_row_without_a_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet([ROWS[0], {**ROWS[0], "chosen": None}]))
    assert str(error_of(path)).startswith(f"{path}:row 2: field 'chosen': expected text")


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"])] * 4, names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert error_of(tmp_path / "a.parquet").field == "chosen"
