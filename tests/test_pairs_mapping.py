"""Shapes of the user's own, said by paths into the row; and what an unknown shape's error proposes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs
from dpo_kit.pairs.formats.guessing import guessed_mapping, in_words
from dpo_kit.pairs.formats.mapping import mapping_format
from dpo_kit.pairs.formats.paths import ABSENT, parsed_path
from tests.pair_files import error_of, write

ROW = {"a": {"b": [{"c": 1}, {"c": 2}]}, "my key": {"x.y": 3}, "e[0]": 4, 'q"t': 5, "n": None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def mapped(file: Path, row: Any, mapping: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    rows = row if isinstance(row, list) else [row]
    return read_pairs(write(file, *rows), mapping=mapping, **options)[0]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.b[0].c", 1),
        ("a.b[-1].c", 2),
        ("a.b[*].c", [1, 2]),
        ("a['b'][1]", {"c": 2}),
        ("a.b[:-1]", [{"c": 1}]),
        ("a.b[1:][*].c", [2]),
        ('["my key"]["x.y"]', 3),
        ("'my key'.'x.y'", 3),
        ('["e[0]"]', 4),
        (r'["q\"t"]', 5),
        ("n", None),
        (" a.b[ 0 ].c ", 1),
    ],
)
def test_paths(path: str, found: Any) -> None:
    assert parsed_path(path, "mapping.prompt").of(ROW) == found


@pytest.mark.parametrize("path", ["a.z?", "a.b[5]?", "z.b?", "n.x?"])
def test_paths_that_may_be_missing(path: str) -> None:
    assert parsed_path(path, "mapping.weight").of(ROW) is ABSENT


def test_an_element_that_may_be_missing_is_null() -> None:
    assert parsed_path("a[*].c?", "mapping.scores").of({"a": [{"c": 1}, {}]}) == [1, None]


@pytest.mark.parametrize(
    "path", ["", " ", ".a", "a.", "a..b", "a[b]", "a[", "a[1:2:3]", "[0].a", 'a"b"', "a b", "[*]", 5, None]
)
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(InputError) as caught:
        parsed_path(path, "mapping.prompt")
    assert caught.value.field == "mapping.prompt"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a.d.x", "there is no 'd' in 'a'|There: b."),
        ("aa.b", "there is no 'aa'|Did you mean 'a'? There: a, my key, e[0], q\"t, n."),
        ("a.b.c", "'c' needs an object, found a list in 'a.b'"),
        ("a.b[2].c", "there is no [2] in a list of 2 in 'a.b'"),
        ("a[0]", "'[0]' needs a list, found an object in 'a'"),
        ("a[:-1]", "'[:]' needs a list, found an object in 'a'"),
        ("a.b[*].d", "there is no 'd' in 'a.b[0]'|There: c."),
        ("n.x", "'x' needs an object, found null in 'n'"),
    ],
)
def test_a_missing_piece_is_named(file: Path, path: str, words: str) -> None:
    mapping = {"prompt": path, "chosen": "n", "rejected": "n"}
    error = error_of(write(file, ROW), mapping=mapping)
    assert (error.line, error.field) == (1, path)
    assert all(part in str(error) for part in words.split("|"))


# Kinds


def test_pairs_with_all_that_may_stand_beside(file: Path) -> None:
    row = {
        "q": {"text": "Name it."},
        "said": [{"t": "A"}, {"t": "B"}],
        "meta": {"w": "0.5", "m": 2, "id": 7, "tools": [{"name": "f"}], "kw": {"thinking": False}},
        "weight": "a person's weight, and not the pair's",
    }
    mapping = {
        "prompt": "q.text",
        "chosen": "said[0].t",
        "rejected": "said[1].t",
        "weight": "meta.w",
        "margin": "meta.m",
        "prompt_id": "meta.id",
        "tools": "meta.tools",
        "chat_template_kwargs": "meta.kw",
    }
    (pair,) = mapped(file, row, mapping)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Name it.", "A", "B")
    assert (pair["weight"], pair["margin"], pair["prompt_id"]) == (0.5, 2.0, "7")
    assert pair["tools"] == '[{"name": "f"}]'
    assert pair["chat_template_kwargs"] == '{"thinking": false}'
    plain = mapped(file, row, {"prompt": "q.text", "chosen": "said[0].t", "rejected": "said[1].t"})
    assert plain[0].keys() == {"prompt", "chosen", "rejected", "source"}
    _, report = read_pairs(file, mapping={name: mapping[name] for name in ("prompt", "chosen", "rejected")})
    assert (report.sources[0].format, report.sources[0].unused_columns) == ("mapping", ["meta", "weight"])


def test_whole_conversations_and_scores(file: Path) -> None:
    ask = [{"role": "user", "content": "Hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    row = {"good": ask + good, "bad": ask + bad, "s": [4, 1.5]}
    mapping = {"chosen": "good", "rejected": "bad", "score_chosen": "s[0]", "score_rejected": "s[1]"}
    (pair,) = mapped(file, row, mapping)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["margin"]) == (ask, good, bad, 2.5)


def test_turns_and_a_part_of_a_list(file: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]
    row = {"turns": turns, "other": "no", "s": "Be brief."}
    mapping = {"prompt": "turns[:-1]", "chosen": "turns[-1].value", "rejected": "other"}
    (pair,) = mapped(file, row, mapping)
    ask, good, bad = ({"role": "user", "content": "Hi"}, *said("yes", "no"))
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([ask], [good], [bad])
    (pair,) = mapped(file, row, {**mapping, "system": "s"})
    assert pair["prompt"] == [{"role": "system", "content": "Be brief."}, ask]
    whole = {"chosen": "turns", "rejected": "worse", "system": "s"}
    worse = [turns[0], {"from": "gpt", "value": "no"}]
    (pair,) = mapped(file, {**row, "worse": worse}, whole)
    assert (pair["prompt"][0]["content"], pair["prompt"][1], pair["rejected"]) == ("Be brief.", ask, [bad])
    error = error_of(
        write(file, {**row, "turns": [{"from": "narrator", "value": "Hi"}, turns[1]]}), mapping=mapping
    )
    assert error.field == "turns[:-1][0].from"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text} for text in texts]


CHOICE = {"prompt": "q", "first": "one", "second": "two", "preference": "winner"}
VALUES = {"first": ["A", 1], "second": "B", "tie": ["both", None, False]}


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [("A", "x"), (1, "x"), (1.0, "x"), ("B", "y"), ("both", None), (None, None), (False, None)],
)
def test_values_of_a_verdict(file: Path, winner: Any, chosen: str | None) -> None:
    rows = [
        {"q": "p", "one": "x", "two": "y", "winner": winner},
        {"q": "kept", "one": "x", "two": "y", "winner": "A"},
    ]
    pairs = mapped(file, rows, {**CHOICE, "values": VALUES})
    assert [pair["chosen"] for pair in pairs if pair["prompt"] == "p"] == ([chosen] if chosen else [])
    half = mapped(file, rows, {**CHOICE, "values": VALUES}, ties="half")
    of_it = [(pair["chosen"], pair.get("weight")) for pair in half if pair["prompt"] == "p"]
    assert of_it == ([(chosen, None)] if chosen else [("x", 0.5), ("y", 0.5)])


@pytest.mark.parametrize("winner", ["a", "1", True, 0, 2, "", []])
def test_values_are_compared_strictly(file: Path, winner: Any) -> None:
    row = {"q": "p", "one": "x", "two": "y", "winner": winner}
    error = error_of(write(file, row), mapping={**CHOICE, "values": VALUES})
    assert error.field == "winner"
    assert "'A', 1, 'B'" in str(error)


@pytest.mark.parametrize(
    ("share", "chosen", "weight"), [(0.75, "x", 0.5), ("0.25", "y", 0.5), (1, "x", None)]
)
def test_a_numeric_preference_is_the_share_of_the_first(
    file: Path, share: Any, chosen: str, weight: float | None
) -> None:
    row = {"q": "p", "one": "x", "two": "y", "winner": share}
    (pair,) = mapped(file, row, CHOICE, weights="agreement")
    assert (pair["chosen"], pair.get("weight")) == (chosen, weight)


@pytest.mark.parametrize("share", [1.5, -1, 2, "A", None, True, "2"])
def test_a_preference_that_is_no_share(file: Path, share: Any) -> None:
    error = error_of(write(file, {"q": "p", "one": "x", "two": "y", "winner": share}), mapping=CHOICE)
    assert error.field == "winner"
    assert "mapping.values" in str(error)


def test_unpaired(file: Path) -> None:
    rows = [{"q": "p", "said": "x", "ok": "yes"}, {"q": "p", "said": "y", "ok": "no"}]
    mapping = {"prompt": "q", "completion": "said", "label": "ok", "values": {"good": ["yes"], "bad": ["no"]}}
    assert [(row["completion"], row["label"]) for row in mapped(file, rows, mapping)] == [
        ("x", True),
        ("y", False),
    ]
    (pair,) = mapped(file, rows, mapping, shape="pairs")
    assert (pair["chosen"], pair["rejected"]) == ("x", "y")
    del mapping["values"]
    assert error_of(write(file, *rows), mapping=mapping).field == "ok"
    assert [row["label"] for row in mapped(file, {**rows[0], "ok": "True"}, mapping)] == [True]


def test_lists_by_score_and_by_rank(file: Path) -> None:
    row = {"q": "p", "answers": [{"text": "x", "n": 1}, {"text": "y", "n": "2"}, {"text": "z", "n": None}]}
    mapping = {"prompt": "q", "completions": "answers[*].text", "scores": "answers[*].n"}
    made, report = read_pairs(write(file, row), mapping=mapping)
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in made] == [("y", "x", 1.0)]
    assert report.counts == {"unjudged": 1}
    row["answers"] = [{"text": "x", "n": 1}, {"text": "y", "n": 2}]
    (pair,) = mapped(file, row, {"prompt": "q", "completions": "answers[*].text", "ranks": "answers[*].n"})
    assert (pair["chosen"], pair["chosen_rank"], pair["rejected_rank"]) == ("x", 1, 2)
    short = {"prompt": "q", "completions": "answers[*].text", "scores": "n"}
    assert error_of(write(file, {**row, "n": [1]}), mapping=short).field == "n"


def test_scored_replies_meet_by_their_prompt(file: Path) -> None:
    rows = [{"q": "p", "said": "x", "s": "0.5"}, {"q": "p", "said": "y", "s": 3}]
    (pair,) = mapped(file, rows, {"prompt": "q", "completion": "said", "score": "s"})
    assert (pair["chosen"], pair["margin"]) == ("y", 2.5)


def test_a_system_text_stands_before_every_prompt_as_messages(file: Path) -> None:
    rows = [
        {"q": "Hi", "a": "x", "b": "y", "s": "Be brief."},
        {"q": "Ho", "a": "x", "b": "y", "s": None},
        {"q": "Hu", "a": "x", "b": "y"},
    ]
    pairs = mapped(file, rows, {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s?"})
    assert [[turn["content"] for turn in pair["prompt"]] for pair in pairs] == [
        ["Be brief.", "Hi"],
        ["Ho"],
        ["Hu"],
    ]
    own = [{"role": "system", "content": "Other."}, {"role": "user", "content": "Hi"}]
    mapping = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}
    assert error_of(write(file, {**rows[0], "q": own}), mapping=mapping).field == "s"


# Mappings that cannot be


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"prompt": "q", "chosen": "a", "rejcted": "b"}, "unknown field 'rejcted'. Did you mean 'rejected'?"),
        ({"prompt": "q", "chosen": "a"}, "the mapping lacks 'rejected'"),
        ({"prompt": "q"}, "lacks 'chosen' and 'rejected'"),
        ({"prompt": "q", "first": "a", "second": "b"}, "lacks 'preference'"),
        (
            {"prompt": "q", "completions": "a", "scores": "b", "ranks": "c"},
            "'ranks', which has no meaning beside",
        ),
        ({"chosen": "a", "rejected": "b", "score": "c"}, "'score', which has no meaning beside"),
        ({"completion": "a", "label": "b", "margin": "c"}, "'margin', which has no meaning beside"),
        ({"chosen": "a", "rejected": "b", "values": {}}, "'values', which has no meaning beside"),
        ({**CHOICE, "values": {"first": ["A"]}}, "which values mean 'second'"),
        ({**CHOICE, "values": {"first": ["A"], "second": ["B"], "ties": ["C"]}}, "cannot mean 'ties'"),
        ({**CHOICE, "values": {"first": ["A"], "second": ["A"]}}, "'A' has two meanings"),
        ({**CHOICE, "values": "A"}, "found text"),
        ({}, "expected field: path"),
    ],
)
def test_mappings_that_cannot_be(file: Path, mapping: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        mapping_format(mapping)
    assert words in str(caught.value)
    write(file, {"q": "p"})
    assert error_of(file, mapping=mapping).exit_status == 2


def test_a_mapping_is_a_format_of_its_own(file: Path) -> None:
    with pytest.raises(InputError, match="Leave out the format"):
        load_pairs(file, mapping={"chosen": "a", "rejected": "b"}, format="hh")


# What is proposed where nothing fits


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"question": "q", "good_answer": "x", "bad_answer": "y"},
            {"prompt": "question", "chosen": "good_answer", "rejected": "bad_answer"},
        ),
        (
            {"user input": "q", "responseA": "x", "responseB": "y", "verdict": "A"},
            {
                "prompt": '["user input"]',
                "first": "responseA",
                "second": "responseB",
                "preference": "verdict",
                "values.first": "...",
                "values.second": "...",
            },
        ),
        (
            {"query": "q", "text_1": "x", "text_2": "y", "preference": 0.8},
            {"prompt": "query", "first": "text_1", "second": "text_2", "preference": "preference"},
        ),
        (
            {"model_1": "gpt-4", "model_2": "phi", "winner": "1"}
            | {"prompt": "q", "response_1": "x", "response_2": "y"},
            {
                "prompt": "prompt",
                "first": "response_1",
                "second": "response_2",
                "preference": "winner",
                "values.first": "...",
                "values.second": "...",
            },
        ),
        (
            {"task": "q", "id_a": "17", "id_b": "18", "left": "A long one.", "right": "Another one."}
            | {"verdict": 0.3},
            {"prompt": "task", "first": "left", "second": "right", "preference": "verdict"},
        ),
        (
            {"question": {"t": 1}, "candidates": [{"text": "x", "votes": 3}]},
            {"prompt": "...", "completions": "candidates[*].text", "scores": "candidates[*].votes"},
        ),
        (
            {"prompt": "q", "reply": "x", "rating": 3},
            {"prompt": "prompt", "completion": "reply", "score": "rating"},
        ),
        (
            {"prompt": "q", "reply": "x", "thumbs": True},
            {"prompt": "prompt", "completion": "reply", "label": "thumbs"},
        ),
        ({"x": 1}, None),
        ({"chosen": "x", "rejected": "y"}, None),
        ({}, None),
    ],
)
def test_guesses_by_names(row: dict[str, Any], mapping: dict[str, str] | None) -> None:
    assert guessed_mapping(row) == mapping
    if mapping and "..." not in mapping.values():
        mapping_format(mapping)


def test_the_error_for_an_unknown_shape_proposes_a_mapping(file: Path) -> None:
    row = {"user input": "q", "responseA": "x", "responseB": "y", "verdict": "A"}
    error = error_of(write(file, row))
    assert "these columns: user input, responseA, responseB, verdict" in str(error)
    assert """--map 'prompt=["user input"]' --map first=responseA""" in str(error)
    assert str(error).count("' lacks ") == 3
    mapping = guessed_mapping(row) or {}
    assert in_words(mapping).count("--map ") == 6


def test_the_nearest_shapes_are_those_with_names_like_the_columns(file: Path) -> None:
    error = error_of(write(file, {"instruct": "q", "chosen_reply": "x", "rejected_reply": "y"}))
    assert "'alpaca' lacks the field 'instruction', the field 'chosen'" in str(error)
    assert "--map prompt=instruct --map chosen=chosen_reply --map rejected=rejected_reply" in str(error)
