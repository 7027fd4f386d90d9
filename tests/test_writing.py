"""Canonical rows written to a file load again to the same rows."""

import gzip
import json

import pytest
from pair_files import write

from dpo_kit.errors import InputError
from dpo_kit.pairs import LoadOptions, read_pairs
from dpo_kit.pairs.writing import RowWriter, convert_pairs

TEXTS = [
    {"prompt": f"Frage {i}\n", "chosen": f" gut, {i} ✓", "rejected": "\tno\r\nno", "margin": i / 3}
    for i in range(3)
]
MESSAGES = [
    {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "go away"}],
        "tools": '[{"name": "search"}]',
    }
]
CALL = {"type": "function", "function": {"name": "search", "arguments": {"q": "DPO"}}}
TOOLS = [
    {
        "prompt": [{"role": "user", "content": "find it", "name": "ann"}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": "no", "reasoning_content": "hm"}],
        "chat_template_kwargs": '{"thinking": true}',
    }
]
LISTS = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [3.0, 1.0, 1.0], "weight": 0.5}]
UNPAIRED = [{"prompt": "p", "completion": "a", "label": False, "prompt_id": "7"}]


def content(path, **options):
    """The rows as they load, but for where they stand."""
    rows = read_pairs(path, **options)[0]
    return [{name: value for name, value in row.items() if name != "source"} for row in rows]


@pytest.mark.parametrize(
    "ending", ["jsonl", "ndjson", "json", "parquet", "jsonl.gz", "jsonl.zst", "ndjson.gz", "ndjson.zst"]
)
@pytest.mark.parametrize("rows", [TEXTS, MESSAGES, TOOLS, LISTS, UNPAIRED])
def test_what_is_written_loads_to_the_same_rows(tmp_path, ending, rows):
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / f"out.{ending}"
    options = LoadOptions(shape="lists" if rows is LISTS else "auto")
    report = convert_pairs(source, out, options)
    assert report.made == len(rows)
    assert content(out, shape=options.shape) == content(source, shape=options.shape) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", out.name])


def test_more_rows_than_a_row_group_keep_their_order(tmp_path):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(2345)]
    source = write(tmp_path / "in.jsonl", *rows)
    convert_pairs(source, tmp_path / "out.parquet")
    assert content(tmp_path / "out.parquet") == rows


def test_the_first_place_is_kept_as_origin(tmp_path):
    source = write(tmp_path / "in.jsonl", TEXTS[0], TEXTS[1])
    convert_pairs(source, tmp_path / "out.jsonl.gz")
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["origin"] for line in lines] == [f"{source}:1", f"{source}:2"]
    assert "source" not in json.loads(lines[0])


def test_pairs_made_of_a_list_are_written_as_pairs_with_their_margins(tmp_path):
    source = write(tmp_path / "in.jsonl", *LISTS)
    report = convert_pairs(source, tmp_path / "out.jsonl")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in content(tmp_path / "out.jsonl")] == [
        ("a", "b", 2.0),
        ("a", "c", 2.0),
    ]
    assert (report.read, report.made, report.counts) == (1, 2, {"tie": 1})


def test_an_unusable_row_stops_it_and_leaves_the_old_file(tmp_path):
    source = write(tmp_path / "in.jsonl", TEXTS[0], {**TEXTS[0], "rejected": ""})
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(InputError, match="empty_completion 1"):
        convert_pairs(source, out)
    assert out.read_text() == "old"
    assert convert_pairs(source, out, LoadOptions(invalid="drop")).made == 1
    assert len(content(out)) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_it_does_not_overwrite_what_it_reads(tmp_path):
    source = write(tmp_path / "in.jsonl", *TEXTS)
    (tmp_path / "link.jsonl").symlink_to(source)
    for out in (source, tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="one of the sources"):
            convert_pairs(source, out)
    assert content(source) == TEXTS


@pytest.mark.parametrize(
    ("name", "problem"),
    [("a.csv", "ending"), ("nowhere/a.jsonl", "no such folder"), ("a.json", "folder")],
)
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, name, problem):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=problem):
        RowWriter(tmp_path / name)


def test_an_error_on_the_way_leaves_no_file(tmp_path):
    row = {**TEXTS[0], "chosen": object()}
    for ending in ("jsonl", "parquet"):
        with RowWriter(tmp_path / f"whole.{ending}") as writer:
            writer.write(TEXTS[0])
        with pytest.raises((TypeError, ValueError)), RowWriter(tmp_path / f"broken.{ending}") as writer:
            writer.write(row)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.jsonl", "whole.parquet"]
