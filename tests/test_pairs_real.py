"""The loaders on real public files, against counts made here with nothing but json."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from dpo_kit.audit import inspect_pairs
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
ENGLISH = DATA / "llama-factory" / "dpo_en_demo.json"
CHINESE = DATA / "medicalgpt" / "dpo_zh_500.jsonl"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")


def test_hh_rows_and_odd_ones() -> None:
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    halves = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in rows]
    differ = [i for i, (c, r) in enumerate(halves, 1) if c[0] != r[0]]
    empty = [i for i, (c, r) in enumerate(halves, 1) if not (c[2].strip() and r[2].strip())]
    assert (len(rows), differ, empty) == (2312, [1255, 1689, 1951, 1953, 2037], [87, 517, 926, 1104])

    pairs, report = read_pairs(HH, invalid="drop")
    assert (report.read, report.kept) == (2312, 2303)
    assert report.counts == {"prompts_differ": 5, "empty_completion": 4}
    places = {
        kind: [problem.place.line for problem in report.problems if problem.kind == kind]
        for kind in report.counts
    }
    assert places == {"prompts_differ": differ, "empty_completion": empty}
    for pair in pairs:
        row = rows[int(pair["source"].rpartition(":")[2]) - 1]
        assert pair["prompt"] + pair["chosen"] == row["chosen"]
        assert pair["prompt"] + pair["rejected"] == row["rejected"]

    with pytest.raises(InputError) as caught:
        load_pairs(HH)
    assert (caught.value.file, caught.value.line) == (str(HH), 87)
    assert "9 of 2312 rows" in str(caught.value)


def test_english_sharegpt() -> None:
    rows = json.loads(ENGLISH.read_text(encoding="utf-8"))
    data = load_pairs(ENGLISH)
    assert len(rows) == data.num_rows == 300
    lines = ENGLISH.read_bytes().split(b"\n")
    for row, pair in zip(rows, data, strict=True):
        assert [m["content"] for m in pair["prompt"]] == [turn["value"] for turn in row["conversations"]]
        assert pair["chosen"] == [{"role": "assistant", "content": row["chosen"]["value"]}]
        assert pair["rejected"] == [{"role": "assistant", "content": row["rejected"]["value"]}]
        line = re.fullmatch(rf"{re.escape(str(ENGLISH))}:(\d+) \(row \d+\)", pair["source"])
        assert line is not None
        assert lines[int(line[1]) - 1].strip() == b"{"
    assert sum(pair["prompt"][0]["role"] == "system" for pair in data) == 80
    again = [json.dumps(row, sort_keys=True) for row in rows]
    seen = inspect_pairs(ENGLISH).statistics
    assert seen is not None
    assert seen.duplicated_pairs == len(again) - len(set(again)) == 5


def test_chinese_sharegpt_with_replies_as_text() -> None:
    rows = [json.loads(line) for line in CHINESE.read_text(encoding="utf-8").split("\n") if line]
    data = load_pairs(CHINESE)
    assert len(rows) == data.num_rows == 500
    for row, pair in zip(rows, data, strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": row["chosen"]}]
        assert pair["rejected"] == [{"role": "assistant", "content": row["rejected"]}]
        assert [m["content"] for m in pair["prompt"]] == [turn["value"] for turn in row["conversations"]]


def test_labelled_conversations() -> None:
    file = DATA / "llama-factory" / "kto_en_demo.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    data = load_pairs(file)
    assert len(rows) == data.num_rows == 300
    assert data.column_names == ["prompt", "completion", "label", "source"]
    for row, loaded in zip(rows, data, strict=True):
        assert loaded["prompt"] + loaded["completion"] == row["messages"]
        assert len(loaded["completion"]) == 1
        assert loaded["label"] is row["label"]
    assert sum(data["label"][:]) == 150


@pytest.mark.parametrize("name", ["oasst/en_100_tree.jsonl", "gpt2-tokenizer/vocab.json"])
def test_files_of_other_shapes_are_refused_with_their_columns(name: str) -> None:
    with pytest.raises(InputError, match="no known format has these columns"):
        read_pairs(DATA / name)
