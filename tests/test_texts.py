"""Sources of texts and prompts: which rows give one, text files, and what counts as the same prompt."""

import pytest
from pair_files import write

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.json_lines import read_lines, write_lines
from dpo_kit.prompts import draw_prompts
from dpo_kit.texts import read_prompts, read_texts


def test_ties_and_rows_that_teach_nothing_give_their_prompts(tmp_path):
    votes = tmp_path / "votes.jsonl"
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    write(votes, pair, pair | {"prompt": "b", "rejected": "x"}, pair | {"prompt": "c", "chosen": " "})
    assert list(read_prompts([str(votes)], field="x")) == ["a", "b", "c"]
    ties = tmp_path / "ties.jsonl"
    row = {"prompt": "a", "completions": ["x", "y"], "scores": [1.0, 1.0]}
    write(ties, row, row | {"prompt": "b", "scores": [1.0, 0.0]})
    assert list(read_prompts([str(ties)], field="x")) == ["a", "b"]


def test_rows_without_a_usable_prompt_are_told_of(tmp_path):
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    path = write(tmp_path / "p.jsonl", pair, pair | {"prompt": " "}, pair | {"prompt": ""})
    with pytest.warns(
        DpoKitWarning, match=r"p.jsonl: rows without a usable prompt .* 2: the prompt is empty"
    ):
        assert list(read_prompts([str(path)], field="x")) == ["a"]


def test_text_files_by_glob_home_and_with_a_mark_at_their_head(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("two\n", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("one\r\n")
    (tmp_path / "odd[1].txt").write_text("three\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_texts(["~/[ab].txt"], field="x")) == ["one", "two"]
    assert list(read_prompts([str(tmp_path / "odd[1].txt"), "~/b.txt"], field="x")) == ["three", "two"]
    with pytest.raises(InputError, match="no file matches"):
        list(read_texts([str(tmp_path / "c*.txt")], field="x"))


def test_prompts_that_differ_in_writing_only_are_one(tmp_path):
    """As `data split` has it: else one could be trained on and the other evaluated on."""
    (tmp_path / "a.txt").write_text("The film\nthe  film\nＴＨＥ film \nthe actor\n")
    drawn = draw_prompts([str(tmp_path / "a.txt")], 9, seed=0).prompts
    assert len(drawn) == 2
    assert "the actor" in drawn
    assert draw_prompts([str(tmp_path / "a.txt")], 9, seed=0, without=["THE FILM"]).prompts == ["the actor"]


def test_lines_come_back_as_they_were(tmp_path):
    rows = [{"a": "one\u2028two\u0085three\nfour\r"}, {"a": "half \ud83d"}, {"a": None}]
    write_lines(tmp_path / "a.jsonl", rows)
    assert read_lines(tmp_path / "a.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
