"""The loaders on real public files, against counts made here with nothing but json."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from pair_files import error_of

from dpo_kit.audit import inspect_pairs
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
ENGLISH = DATA / "llama-factory" / "dpo_en_demo.json"
CHINESE = DATA / "medicalgpt" / "dpo_zh_500.jsonl"
PANDALM = DATA / "pandalm" / "testset-v1.json"

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
    assert sum("\ufeff" in json.dumps(pair, ensure_ascii=False) for pair in data) == 1
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
    assert sum(pair["prompt"][0]["role"] == "system" for pair in data) == 84
    damaged = [json.dumps(pair, ensure_ascii=False).count("\ufffd") for pair in data]
    assert (sum(map(bool, damaged)), sum(damaged)) == (13, 34)


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


def test_stack_exchange() -> None:
    file = DATA / "torchtune" / "stack_exchange_paired_tiny.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    pairs, report = read_pairs(file)
    assert (len(rows), report.kept, len({pair["prompt"] for pair in pairs})) == (25, 25, 8)
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (row["question"], row["response_j"], row["response_k"]) for row in rows
    ]


def test_safe_rlhf_by_either_judgement() -> None:
    file = DATA / "align-anything" / "train.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    read = {name: read_pairs(file, judgement=name)[0] for name in ("better", "safer")}
    assert read_pairs(file)[0] == read["better"]
    for name, pairs in read.items():
        assert len(pairs) == len(rows) == 32
        for row, pair in zip(rows, pairs, strict=True):
            first = row[f"{name}_response_id"]
            assert pair["prompt"] == row["prompt"]
            assert (pair["chosen"], pair["rejected"]) == (
                row[f"response_{first}"],
                row[f"response_{1 - first}"],
            )
    differ = [b["chosen"] != s["chosen"] for b, s in zip(read["better"], read["safer"], strict=True)]
    assert sum(differ) == sum(row["better_response_id"] != row["safer_response_id"] for row in rows) == 19


def pandalm_votes(row: dict) -> list[int]:
    return [row[f"annotator{i}"] for i in (1, 2, 3)]


def test_pandalm_by_majority() -> None:
    """Of 999 rows 6 have a boolean for a reply and 54 an empty one; of the others 103 are ties.

    Three annotators; a tie where two or three say so, or where they say three different things. In none of
    the rows do they, so that the majority is the value that two of them name.
    """
    rows = json.loads(PANDALM.read_text(encoding="utf-8"))
    replies = [(row["response1"], row["response2"]) for row in rows]
    not_text = [i for i, two in enumerate(replies, 1) if not all(isinstance(reply, str) for reply in two)]
    empty = [i for i, two in enumerate(replies, 1) if not all(str(reply).strip() for reply in two)]
    assert all(len(set(pandalm_votes(row))) < 3 for row in rows)
    majority = [sorted(pandalm_votes(row))[1] for row in rows]
    usable = [i for i in range(1, 1000) if i not in {*not_text, *empty}]
    tied = [i for i in usable if majority[i - 1] == 0]
    assert (len(rows), len(not_text), len(empty), len(tied)) == (999, 6, 54, 103)

    pairs, report = read_pairs(PANDALM, invalid="drop")
    assert report.counts == {"tie": 103, "empty_completion": 54, "reply_not_text": 6}
    found = {
        kind: [problem.place.row for problem in report.problems if problem.kind == kind]
        for kind in report.counts
    }
    assert found == {"tie": tied, "empty_completion": empty, "reply_not_text": not_text}
    assert len(pairs) == report.kept == 836
    for pair, i in zip(pairs, [i for i in usable if i not in tied], strict=True):
        row, first = rows[i - 1], majority[i - 1]
        asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        assert pair["prompt"] == asked
        assert (pair["chosen"], pair["rejected"]) == (row[f"response{first}"], row[f"response{3 - first}"])
    assert sum(majority[i - 1] == 1 for i in usable) == 394
    assert "60 of 999 rows" in str(error_of(PANDALM))


def test_pandalm_by_shares() -> None:
    """836 rows with a majority, 94 of them with a vote for the other reply or for a tie."""
    rows = json.loads(PANDALM.read_text(encoding="utf-8"))
    pairs, report = read_pairs(PANDALM, invalid="drop", votes="share")
    votes = [
        sorted(pandalm_votes(rows[int(pair["source"].rpartition("row ")[2][:-1]) - 1])) for pair in pairs
    ]
    shares = {
        (1, 1, 1): 1,
        (0, 1, 1): 5 / 6,
        (1, 1, 2): 2 / 3,
        (1, 2, 2): 2 / 3,
        (0, 2, 2): 5 / 6,
        (2, 2, 2): 1,
    }
    assert (report.kept, report.made) == (836, 930)
    weights = [pair.get("weight", 1.0) for pair in pairs]
    assert sum(weights) == pytest.approx(836)
    assert all(
        weight == pytest.approx(shares[tuple(vote)]) or weight == pytest.approx(1 - shares[tuple(vote)])
        for vote, weight in zip(votes, weights, strict=True)
    )
    tied, report = read_pairs(PANDALM, invalid="drop", ties="half")
    assert (report.kept, report.made) == (939, 836 + 2 * 103)
    assert sum(pair.get("weight", 1.0) == 0.5 for pair in tied) == 2 * 103


@pytest.mark.slow
def test_a_file_that_is_no_preference_data_is_refused_with_its_columns() -> None:
    assert "no known format has these columns" in str(error_of(DATA / "gpt2-tokenizer" / "vocab.json"))
