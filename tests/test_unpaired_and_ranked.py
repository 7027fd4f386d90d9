"""Unpaired rows and ranked lists: loaded, checked and counted as pairs are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from pair_files import error_of, write

from dpo_kit.audit import inspect_pairs
from dpo_kit.pairs import load_pairs, read_pairs, register_format
from dpo_kit.pairs.formats import FORMATS

ASK = [{"role": "user", "content": "Name a city."}]
PARIS = [{"role": "assistant", "content": "Paris"}]
LONDON = [{"role": "assistant", "content": "London"}]
TEXT = {"prompt": "Name a city.", "completion": " Paris", "label": True}
LIST = {"prompt": "Name a city.", "completions": [" Paris", " London", " Rome"], "scores": [0.5, 2, -1]}
PAIR = {"prompt": "Name a city.", "chosen": " Paris", "rejected": " London"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


# Loading.


def test_unpaired_text(file: Path) -> None:
    extras = {"weight": 2, "prompt_id": 7, "tools": [{"name": "f"}], "margin": 1, "score_chosen": "high"}
    data = load_pairs(write(file, TEXT, {**TEXT, "completion": " Mud", "label": 0, **extras}))
    assert data.column_names == [*("prompt", "completion", "label", "weight", "prompt_id", "tools", "source")]
    assert data.features["label"] == datasets.Value("bool")
    assert data[0] == {**TEXT, "weight": None, "prompt_id": None, "tools": None, "source": f"{file}:1"}
    second = {"weight": 2.0, "prompt_id": "7", "tools": '[{"name": "f"}]', "source": f"{file}:2"}
    assert data[1] == {"prompt": "Name a city.", "completion": " Mud", "label": False, **second}
    # A score difference is for pairs.
    assert read_pairs(file)[1].sources[0].unused_columns == ["margin", "score_chosen"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASK + PARIS, "label": True},
        {"prompt": ASK, "completion": PARIS, "label": True},
        {"prompt": ASK, "completion": ASK + PARIS, "label": True},
        {"prompt": "Name a city.", "completion": PARIS, "label": 1},
    ],
)
def test_unpaired_messages(file: Path, row: dict) -> None:
    assert load_pairs(write(file, row))[0] == {
        "prompt": ASK,
        "completion": PARIS,
        "label": True,
        "source": f"{file}:1",
    }


def test_scores_stay_and_ranks_become_scores(file: Path) -> None:
    ranked = {**LIST, "scores": None, "ranks": [2, 1, 2]}
    data = load_pairs(write(file, LIST, ranked, {**LIST, "prompt_id": "x", "weight": 0}), shape="lists")
    assert data.column_names == ["prompt", "completions", "scores", "weight", "prompt_id", "source"]
    assert data.features["scores"] == datasets.List(datasets.Value("float64"))
    assert data["scores"][:] == [[0.5, 2.0, -1.0], [-2.0, -1.0, -2.0], [0.5, 2.0, -1.0]]
    assert data[0]["completions"] == LIST["completions"]


def test_list_of_messages(file: Path) -> None:
    row = {"prompt": ASK, "completions": [PARIS, ASK + LONDON, PARIS], "ranks": [1, 3, 2]}
    data = load_pairs(write(file, row), shape="lists")
    assert data[0] == {
        "prompt": ASK,
        "completions": [PARIS, LONDON, PARIS],
        "scores": [-1.0, -3.0, -2.0],
        "source": f"{file}:1",
    }


def test_parquet_and_csv(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([LIST] * 2), tmp_path / "a.parquet")
    assert load_pairs(tmp_path / "a.parquet", shape="lists")["scores"][:] == [[0.5, 2.0, -1.0]] * 2
    (tmp_path / "a.csv").write_text('prompt,completion,label\nHi,"a, b",True\nHi,b,0\nHi,c,false\nHi,d,1\n')
    assert load_pairs(tmp_path / "a.csv")["label"][:] == [True, False, False, True]
    (tmp_path / "b.csv").write_text("prompt,completion,label\nHi,a,True\nHi,b,\n")
    assert (error_of(tmp_path / "b.csv").line, error_of(tmp_path / "b.csv").field) == (3, "label")


def test_a_format_of_ones_own_names_its_kind(file: Path) -> None:
    before = dict(FORMATS)

    def convert(row: Any) -> dict:
        return {"prompt": row["q"], "completions": row["answers"], "ranks": row["order"]}

    try:
        register_format("mine", convert, fields=["q", "answers", "order"], kind="lists")
        row = {"q": "Name a city.", "answers": ["Paris", "Mud"], "order": [1, 2], "weight": 3}
        (loaded,), report = read_pairs(write(file, row), shape="lists")
        assert (loaded["scores"], loaded["weight"]) == ([-1.0, -2.0], 3.0)
        assert report.sources[0].unused_columns == []
        with pytest.raises(ValueError, match="unknown kind 'triples'"):
            register_format("mine", convert, fields=["q"], kind="triples")
    finally:
        FORMATS.clear()
        FORMATS.update(before)


# What is wrong.

MESSAGES = {"messages": ASK + PARIS, "label": False}
BAD = [
    (TEXT, {**TEXT, "label": "yes"}, "label", "found text ('yes')"),
    (TEXT, {**TEXT, "label": 2}, "label", "expected true or false, found 2"),
    (TEXT, {**TEXT, "label": 0.5}, "label", "found 0.5"),
    (TEXT, {**TEXT, "label": None}, "label", "found null"),
    (TEXT, {"prompt": "a", "completion": "b"}, "label", "no such field"),
    (TEXT, {**TEXT, "completion": 3}, "completion", "found a number"),
    (TEXT, {**TEXT, "weight": -1}, "weight", "below 0"),
    (MESSAGES, {**MESSAGES, "messages": "Hi"}, "prompt", "cannot be told"),
    (
        MESSAGES,
        {**MESSAGES, "messages": [*ASK, {"role": "bot", "content": "x"}]},
        "messages[1].role",
        "'bot'",
    ),
    (LIST, {**LIST, "completions": "a"}, "completions", "expected a list of completions"),
    (LIST, {**LIST, "completions": ["a", None, "b"]}, "completions[1]", "found null"),
    (LIST, {**LIST, "completions": ["a", PARIS, "b"]}, "completions[1]", "one reply is text"),
    (LIST, {**LIST, "scores": [1, 2]}, "scores", "2 scores for 3 completions"),
    (LIST, {**LIST, "scores": [1, "2", 3]}, "scores[1]", "expected a number, found text"),
    (LIST, {**LIST, "scores": [1, None, 3]}, "scores[1]", "found null"),
    (LIST, {**LIST, "scores": [1, 2, math.nan]}, "scores[2]", "finite"),
    (LIST, {**LIST, "scores": [1, True, 3]}, "scores[1]", "boolean"),
    (LIST, {**LIST, "scores": 3}, "scores", "expected a list of numbers"),
    (LIST, {**LIST, "scores": None}, "scores", "neither scores nor ranks"),
    (LIST, {**LIST, "ranks": [1, 2, 3]}, "scores", "both scores and ranks"),
    (LIST, {**LIST, "scores": None, "ranks": [1, 2, 0]}, "ranks[2]", "Count ranks from 1"),
    (LIST, {**LIST, "scores": None, "ranks": [1, 2.0, 3]}, "ranks[1]", "found 2.0"),
]


@pytest.mark.parametrize(("good", "bad", "field", "said"), BAD)
@pytest.mark.parametrize("invalid", ["error", "drop"])
def test_a_bad_row_names_file_line_and_field(
    file: Path, invalid: str, good: dict, bad: dict, field: str, said: str
) -> None:
    error = error_of(write(file, good, bad, good), invalid=invalid)
    assert (error.file, error.line, error.field) == (str(file), 2, field)
    assert said in str(error)


UNUSABLE = [
    ("empty_completion", "completion", TEXT, {**TEXT, "completion": " "}),
    ("empty_prompt", "prompt", TEXT, {**TEXT, "prompt": ""}),
    ("empty_prompt", "messages", MESSAGES, {**MESSAGES, "messages": PARIS}),
    ("empty_completion", "messages", MESSAGES, {**MESSAGES, "messages": [*ASK, {**PARIS[0], "content": ""}]}),
    ("reply_not_one_assistant_message", "messages", MESSAGES, {**MESSAGES, "messages": ASK}),
    ("empty_completion", "completions[1]", LIST, {**LIST, "completions": ["a", "", "b"]}),
    ("empty_prompt", "prompt", LIST, {**LIST, "prompt": "\n"}),
    ("identical", "completions", LIST, {**LIST, "completions": ["a", "a", "a"]}),
    ("identical", "completions", LIST, {**LIST, "completions": ["a"], "scores": [1]}),
    ("identical", "completions", LIST, {**LIST, "completions": [], "scores": []}),
    (
        "prompts_differ",
        "completions[1]",
        {"prompt": ASK, "completions": [PARIS, LONDON], "scores": [1, 0]},
        {"prompt": ASK, "completions": [PARIS, [{**ASK[0], "content": "?"}, *LONDON]], "scores": [1, 0]},
    ),
]


@pytest.mark.parametrize(("kind", "field", "good", "bad"), UNUSABLE)
def test_unusable_rows_stop_the_loading_or_are_counted(
    file: Path, kind: str, field: str, good: dict, bad: dict
) -> None:
    write(file, good, bad, good, bad)
    shape = "lists" if "completions" in good else "auto"
    error = error_of(file)
    assert (error.line, error.field) == (2, field)
    assert f"2 of 4 rows cannot be used: {kind} 2 ({file}:2, :4)" in str(error)
    data = load_pairs(file, invalid="drop", shape=shape)
    assert data["source"][:] == [f"{file}:1", f"{file}:3"]
    assert inspect_pairs(file, shape=shape).counts == {kind: 2}


@pytest.mark.parametrize("tied", [{"scores": [2, 2.0, 2]}, {"scores": None, "ranks": [1, 1, 1]}])
def test_lists_of_equally_good_replies_are_left_out_counted(file: Path, tied: dict) -> None:
    write(file, LIST, {**LIST, **tied})
    assert len(load_pairs(file, shape="lists")) == 1
    assert inspect_pairs(file, shape="lists").counts == {"all_tied": 1}
    assert inspect_pairs(file).counts == {"tie": 3}


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    files = {
        name: write(tmp_path / f"{name}.jsonl", row)
        for name, row in (("pairs", PAIR), ("unpaired rows", TEXT), ("ranked lists", LIST))
    }
    said = str(error_of([files["pairs"], files["unpaired rows"]]))
    assert f"{files['pairs']}:1 is of the pairs, {files['unpaired rows']}:1 of the unpaired rows" in said
    said = str(error_of([files["ranked lists"], files["pairs"]], shape="lists"))
    assert f"{files['ranked lists']}:1 is of the ranked lists, {files['pairs']}:1 of the pairs" in said
    assert load_pairs(files["pairs"], shape="lists").column_names[:3] == ["prompt", "chosen", "rejected"]
    error = error_of(write(tmp_path / "a.jsonl", PAIR, TEXT))
    assert (error.line, error.field) == (2, "chosen")


def test_columns_of_a_list_without_scores_are_explained(file: Path) -> None:
    error = error_of(write(file, {"prompt": "a", "completions": ["b", "c"]}))
    assert "'ranked' lacks the field 'scores' or 'ranks'" in str(error)


# The account.


def test_statistics_by_hand(file: Path) -> None:
    rows = [("p", "aaaa", True), ("p", "aaaa", True), ("p", "aaaa", False), ("qq", "a" * 10, True)]
    report = inspect_pairs(write(file, *(dict(zip(TEXT, row, strict=True)) for row in rows)))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["kind"] == "unpaired"
    histograms = told["statistics"].pop("histograms")
    assert histograms["prompt"] == {"edges": [*range(1, 12)], "counts": [3, 1, *[0] * 8]}
    assert told["statistics"] == {
        "prompt_characters": {"median": 1.0, "p95": 2, "max": 2},
        "desirable_characters": {"median": 4.0, "p95": 10, "max": 10},
        "undesirable_characters": {"median": 4.0, "p95": 4, "max": 4},
        "distinct_prompts": 2,
        "duplicated_rows": 1,
        "desirable": 3,
        "undesirable": 1,
    }
    assert "labels: 3 desirable, 1 undesirable" in report.summary()
    lists = [("p", ["a", "bbb"], [0, 1]), ("p", ["cc", "d", "e"], [1, 1, 0]), ("p", ["a", "bbb"], [0, 1])]
    report = inspect_pairs(write(file, *(dict(zip(LIST, row, strict=True)) for row in lists)), shape="lists")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["kind"] == "lists"
    assert told["statistics"].pop("histograms")["best"]["counts"][:3] == [0, 1, 2]
    assert told["statistics"] == {
        "prompt_characters": {"median": 1.0, "p95": 1, "max": 1},
        "best_characters": {"median": 3.0, "p95": 3, "max": 3},
        "other_characters": {"median": 1.0, "p95": 1, "max": 1},
        "completions": {"median": 2.0, "p95": 3, "max": 3},
        "distinct_prompts": 1,
        "duplicated_lists": 1,
        "lists_with_ties": 1,
    }
    assert "kind: ranked lists" in report.summary()


def test_one_label_alone_can_be_inspected(file: Path) -> None:
    report = inspect_pairs(write(file, TEXT))
    assert report.statistics is not None
    assert report.to_dict()["statistics"]["undesirable_characters"] is None
    assert "undesirable " not in report.summary().split("labels")[0]
