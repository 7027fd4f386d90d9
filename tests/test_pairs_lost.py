"""What may be lost though the rows load: columns that look like part of the prompt, and rows that hold the
prompt or the replies in the wrong place."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pair_files import error_of, write

from dpo_kit.audit import inspect_pairs
from dpo_kit.cli import main
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs
from dpo_kit.pairs.loading import load_with_report
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.tally import PairsReport
from dpo_kit.pairs.writing import convert_pairs

ASK = [{"role": "user", "content": "Name a city."}]
GOOD, BAD = [{"role": "assistant", "content": "Paris"}], [{"role": "assistant", "content": "Mars"}]
ROW = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
TEXT = {"prompt": "Name a city.", "chosen": "Paris", "rejected": "Mars"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def lost(path: Path, *rows: Any, **options: Any) -> dict[str, int]:
    return read_pairs(write(path, *rows), **options)[1].sources[0].lost_columns


# Columns that look like part of the prompt


def test_a_column_like_a_prompt_is_counted_said_and_logged(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        ROW,
        {**ROW, "context": "Be brief."},
        {**ROW, "context": ""},
        {**ROW, "context": "Be kind.", "id": 3},
    ]
    with caplog.at_level(logging.WARNING, logger="dpo_kit.pairs"):
        load_pairs(write(file, *rows))
    (logged,) = caplog.messages
    words = "columns not used that look like part of the prompt: context (2 rows)"
    assert f"{file}: {words}; " in logged
    assert "give a mapping" in logged
    report = read_pairs(file)[1]
    assert report.sources[0].lost_columns == {"context": 2}
    assert report.sources[0].unused_columns == ["context", "id"]
    assert f"  {words}" in report.summary().splitlines()
    assert report.to_dict()["sources"][0]["lost_columns"] == {"context": 2}
    assert PairsReport.from_state(json.loads(json.dumps(report.to_state()))) == report
    assert inspect_pairs(file).sources[0].lost_columns == {"context": 2}


def test_what_stands_in_the_prompt_already_is_not_lost(file: Path) -> None:
    rag = {**TEXT, "prompt": "Read:\n  A  text.\nName a city."}
    assert lost(file, {**rag, "context": "A text."}) == {}
    assert lost(file, {**rag, "context": ["A text.", "another text"]}) == {"context": 1}
    assert lost(file, {**ROW, "messages": [*ASK, *GOOD]}) == {}
    assert lost(file, {**ROW, "messages": [{"role": "user", "content": "Hello."}, *ASK]}) == {"messages": 1}
    assert lost(file, {**TEXT, "history": [], "input": "  ", "context": {"a": None}, "image": None}) == {}


def test_an_image_is_lost_and_used_columns_are_not(file: Path, tmp_path: Path) -> None:
    assert lost(file, {**TEXT, "image": "a.png"}, {**TEXT, "image": "b.png"}) == {"image": 2}
    assert lost(file, {"system": "S", "prompt": "p", "chosen": "a", "rejected": "b"}) == {}
    mapping = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert lost(file, {"q": "1 + 1", "a": "2", "b": "3", "Context": "x"}, mapping=mapping) == {"Context": 1}
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**TEXT, "images": [{"bytes": b"x"}]}]), path)
    assert read_pairs(path)[1].sources[0].lost_columns == {"images": 1}


def test_rows_that_are_left_out_lose_nothing_and_deep_values_are_looked_into(file: Path) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    rows = [{**TEXT, "context": deep}, {**TEXT, "chosen": "", "context": "y"}]
    assert lost(file, *rows, invalid="drop") == {"context": 1}


# Training and held-out data as one set


def test_a_folder_of_train_and_test_files_is_remarked_on(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        write(tmp_path / name, TEXT)
    for source in (tmp_path, f"{tmp_path}/*.jsonl"):
        rows, report = read_pairs(source)
        assert len(rows) == 3
        (remark,) = report.remarks
        assert "train-0.jsonl and test-0.jsonl are all read as one set" in remark
        assert remark in report.summary()
        assert load_with_report(source, LoadOptions())[1].remarks == [remark]
        assert inspect_pairs(source).to_dict()["remarks"] == [remark]
    assert read_pairs(f"{tmp_path}/train-*.jsonl")[1].remarks == []
    assert read_pairs([tmp_path / "train-0.jsonl", tmp_path / "test-0.jsonl"])[1].remarks == []


def test_the_word_must_be_a_word_of_the_name_below_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    for name in ("train.jsonl", "latest.jsonl", "developers.jsonl"):
        write(folder / name, TEXT)
    assert read_pairs(folder)[1].remarks == []
    (folder / "validation").mkdir()
    write(folder / "validation" / "0.jsonl", TEXT)
    assert len(read_pairs(folder)[1].remarks) == 1


# Fields that hold more than they say


def kind_of_trouble(path: Path, row: Any, **options: Any) -> str:
    """The one kind of problem with the row, beside one that is right; loading stops at it."""
    error = error_of(write(path, row), **options)
    audit = inspect_pairs(path, **options)
    ((kind, count),) = audit.counts.items()
    assert count == 1
    assert kind in str(error)
    return kind


def test_a_prompt_that_ends_with_a_reply(file: Path) -> None:
    row = {**TEXT, "prompt": [*ASK, *GOOD]}
    assert kind_of_trouble(file, row) == "prompt_holds_reply"
    assert "the prompt ends with the reply in 'chosen'" in str(error_of(file))
    assert kind_of_trouble(file, {**ROW, "prompt": [*ASK, *BAD]}) == "prompt_holds_reply"
    listed = {"prompt": [*ASK, *BAD], "completions": [" Mars", "Rome"], "scores": [1, 2]}
    assert kind_of_trouble(file, listed) == "prompt_holds_reply"
    begun = [*ASK, {"role": "assistant", "content": "The city of"}]
    assert read_pairs(write(file, {**ROW, "prompt": begun}))[0][0]["prompt"] == begun


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(GOOD),
        json.dumps([{"from": "gpt", "value": 'It\'s "Paris"\n'}]),
        str(GOOD),
        " [\n {'content': 'Name a city.', 'role': 'user'}\n {'content': 'Pa\\d', 'role': 'assistant'}]\n",
    ],
)
def test_messages_written_as_text(file: Path, written: str) -> None:
    assert kind_of_trouble(file, {**TEXT, "chosen": written}) == "messages_as_text"
    assert kind_of_trouble(file, {**TEXT, "prompt": written}) == "messages_as_text"
    assert kind_of_trouble(file, {**ROW, "chosen": written, "rejected": "no"}) == "messages_as_text"


@pytest.mark.parametrize(
    "text", ['[{"a": 1}]', "[{x}]", "[{'role': 'user'", f"Write: {GOOD}", "[" * 5000 + "{"]
)
def test_text_that_only_looks_like_messages_is_text(file: Path, text: str) -> None:
    (row,), _ = read_pairs(write(file, {**TEXT, "chosen": text}))
    assert row["chosen"] == text


def test_replies_that_all_begin_with_the_prompt(file: Path) -> None:
    prompt = "Q: Name a large city.\n\nA:"
    row = {"prompt": prompt, "chosen": f"{prompt} Paris", "rejected": f"\n{prompt} Mars"}
    assert kind_of_trouble(file, row) == "reply_repeats_prompt"
    unpaired = {"prompt": prompt, "completion": f"{prompt} Paris", "label": True}
    assert kind_of_trouble(file, unpaired) == "reply_repeats_prompt"
    for right in ({**row, "rejected": "Mars"}, {"prompt": "I am", "chosen": "I am x", "rejected": "I am y"}):
        assert len(read_pairs(write(file, right))[0]) == 1


# Replies put together by their prompt


def test_another_tool_is_another_prompt(file: Path) -> None:
    tools = [{"type": "function", "function": {"name": "map", "parameters": {}}}]
    good = {"prompt": ASK, "completion": GOOD, "label": True}
    bad = {"prompt": ASK, "completion": BAD, "label": False}
    write(file, {**good, "tools": tools}, {**bad, "tools": tools}, good, bad)
    rows, _ = read_pairs(file, shape="pairs")
    assert [("tools" in row, row["chosen"]) for row in rows] == [(True, GOOD), (False, GOOD)]
    write(file, {**good, "tools": tools}, bad)
    assert inspect_pairs(file, shape="pairs").counts == {"nothing_to_compare": 2}


def test_replies_of_a_prompt_have_one_weight(file: Path) -> None:
    good = {"prompt": "p", "completion": "a", "label": True, "weight": 2}
    bad = {"prompt": "p", "completion": "b", "label": False, "weight": 2}
    (row,), _ = read_pairs(write(file, good, bad), shape="pairs")
    assert row["weight"] == 2.0
    error = error_of(write(file, good, {**bad, "weight": 3}), shape="pairs")
    assert (error.line, error.field) == (2, "weight")
    assert f"{file}:1" in str(error)
    assert inspect_pairs(file, shape="pairs").counts == {"bad_row": 1}


# Options that would do nothing

LABELLED = {"prompt": "p", "completion": "a", "label": True}
RANKED = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("row", "options", "field"),
    [
        (TEXT, {"shape": "unpaired"}, "shape"),
        (RANKED, {"shape": "unpaired"}, "shape"),
        (RANKED, {"shape": "lists", "min_margin": 1}, "min_margin"),
        (RANKED, {"shape": "lists", "weights": "margin"}, "weights"),
        (LABELLED, {"min_margin": 1}, "min_margin"),
        (LABELLED, {"weights": "margin"}, "weights"),
        (RANKED, {"weights": "agreement"}, "weights"),
        (TEXT, {"weights": "agreement"}, "weights"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    file: Path, row: Any, options: dict[str, Any], field: str
) -> None:
    error = error_of(write(file, row), **options)
    assert error.field == field
    assert "Leave" in str(error) or "leave" in str(error)


# What once crashed


def test_numbers_beyond_what_a_column_holds(file: Path) -> None:
    assert error_of(write(file, {**TEXT, "chosen_rank": 2**63, "rejected_rank": 1})).field == "chosen_rank"
    assert load_pairs(write(file, {**TEXT, "chosen_rank": 2**63 - 1}))[0]["chosen_rank"] == 2**63 - 1
    far = {"prompt": "p", "completions": ["a", "b"], "scores": [1e308, -1e308]}
    error = error_of(write(file, far))
    assert (error.line, error.field) == (1, "scores")
    assert inspect_pairs(file).counts == {"bad_row": 1}
    assert (
        error_of(write(file, {**TEXT, "margin": 1e200, "weight": 1e200}), weights="margin").field == "weight"
    )


def test_names_that_utf_8_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a\udcff.jsonl"
    file.write_text(json.dumps({**TEXT, "\ud800": 1}) + "\n", encoding="utf-8")
    assert load_pairs(file)[0]["source"] == f"{tmp_path}/a\\udcff.jsonl:1"
    assert load_pairs(file)[0]["chosen"] == "Paris"
    out = tmp_path / "out.jsonl"
    for arguments in (("inspect", file), ("inspect", file, "--json"), ("convert", file, out, "--json")):
        with pytest.raises(SystemExit) as left:
            main(["data", *map(str, arguments)])
        assert left.value.code in (0, None), capsys.readouterr().err
    assert load_pairs(out)[0]["chosen"] == "Paris"


def test_a_broken_first_line_does_not_hide_the_others(file: Path) -> None:
    file.write_text('{"prompt": \n[]\n' + json.dumps(TEXT) + "\n")
    audit = inspect_pairs(file)
    assert (audit.read, audit.kept, audit.counts) == (3, 1, {"bad_row": 2})
    assert audit.sources[0].format == "explicit_prompt"
    assert error_of(file).line == 1
    file.write_text('{"prompt": \n')
    audit = inspect_pairs(file)
    assert (audit.read, audit.kept, audit.statistics) == (1, 0, None)


def test_what_cannot_be_written_is_the_users_to_mend(file: Path, tmp_path: Path) -> None:
    write(file, TEXT)
    for name in ("x" * 250 + ".jsonl", "x" * 250 + ".parquet"):
        with pytest.raises(InputError, match="cannot be written"):
            convert_pairs(file, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_stopped_command_leaves_no_half_file(file: Path, tmp_path: Path) -> None:
    write(file, *[{**TEXT, "prompt": f"Name a city, {i}."} for i in range(30_000)])
    for ending in ("jsonl", "parquet"):
        command = [
            sys.executable,
            "-m",
            "dpo_kit",
            "data",
            "convert",
            str(file),
            str(tmp_path / f"b.{ending}"),
        ]
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(".*.writing")) and running.poll() is None:
            time.sleep(0.01)
        running.terminate()
        assert running.wait(30) == 143
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_index_that_pandas_writes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",prompt,chosen,rejected\n0,p,a,b\n")
    assert "column 1 has no name" in str(error_of(file))
    assert "index=False" in str(error_of(file))


def test_one_row_that_holds_a_list_of_replies_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    answers = [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}]
    nectar = {"prompt": "\n\nHuman: p\n\nAssistant: ", "answers": answers, "turns": 1}
    for indent in (None, 2):
        file.write_text(json.dumps(nectar, indent=indent))
        (row,), report = read_pairs(file)
        assert (report.sources[0].format, plain_text(row["chosen"])) == ("nectar", "a")
    file.write_text(json.dumps({"about": "Two rows of\nNectar", "data": [nectar, nectar]}))
    assert read_pairs(file)[1].read == 2


def test_training_says_what_may_be_lost(tmp_path: Path) -> None:
    from dpo_kit.recipe import Recipe
    from dpo_kit.run import read_pairs_of

    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, {**TEXT, "context": "France", "id": 1})
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: m}}\ndata: {{train: [{tmp_path}/t*.jsonl]}}\ntrain: {{output_dir: {tmp_path}}}\n"
    )
    said: list[str] = []
    rows = read_pairs_of(Recipe.load(tmp_path / "recipe.yaml", []), "train", said.append)
    assert rows is not None
    words = "\n".join(said)
    for each in ("context (1 row)", "columns not used: context, id", "are all read as one set"):
        assert each in words
