"""Preference pairs from every shape and container, and what is said of those that are wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_files import error_of, write

from dpo_kit.audit import inspect_pairs
from dpo_kit.pairs import load_pairs, read_pairs, register_format
from dpo_kit.pairs.canonical import canonical_pair
from dpo_kit.pairs.formats import FORMATS
from dpo_kit.pairs.formats.dialogues import ASSISTANT, HUMAN, split_hh
from dpo_kit.pairs.schema import Place, UnusablePair

TEXT_ROW = {"prompt": "Name a city.", "chosen": " Paris", "rejected": " London"}
ASK = [{"role": "user", "content": "Name a city."}]
PARIS = [{"role": "assistant", "content": "Paris"}]
LONDON = [{"role": "assistant", "content": "London"}]
MESSAGE_ROW = {"prompt": ASK, "chosen": PARIS, "rejected": LONDON}


def parts(row: dict) -> tuple:
    return row["prompt"], row["chosen"], row["rejected"]


def only(path: Path, row: dict, **settings: Any) -> dict:
    (pair,), _ = read_pairs(write(path, row), **settings)
    return pair


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


# Shapes


def test_text_stays_as_it_stands(file: Path) -> None:
    pair = only(file, TEXT_ROW)
    assert pair == {**TEXT_ROW, "source": f"{file}:1"}


def conversation(reply: list[dict], *lead: dict) -> list[dict]:
    return [*lead, *ASK, *reply]


@pytest.mark.parametrize(
    "row",
    [
        MESSAGE_ROW,
        {"prompt": "Name a city.", "chosen": PARIS, "rejected": LONDON},
        {"prompt": ASK, "chosen": "Paris", "rejected": "London"},
        {"chosen": conversation(PARIS), "rejected": conversation(LONDON)},
        {"prompt": "Name a city.", "chosen": conversation(PARIS), "rejected": conversation(LONDON)},
        {"prompt": ASK, "chosen": conversation(PARIS), "rejected": conversation(LONDON)},
        {
            "conversations": [{"from": "human", "value": "Name a city."}],
            "chosen": {"from": "gpt", "value": "Paris"},
            "rejected": {"role": "assistant", "content": "London"},
        },
        {
            "conversations": [{"from": "user", "value": "Name a city."}],
            "chosen": "Paris",
            "rejected": [{"from": "bing", "value": "London", "weight": None}],
        },
    ],
)
def test_every_message_shape_is_one_pair(file: Path, row: dict) -> None:
    assert parts(only(file, row)) == (ASK, PARIS, LONDON)


def test_prompt_text_beside_conversations_may_follow_a_system_turn(file: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {
        "prompt": "Name a city.",
        "chosen": conversation(PARIS, system),
        "rejected": conversation(LONDON, system),
    }
    assert only(file, row)["prompt"] == [system, *ASK]


def test_sharegpt_system_field_is_the_first_turn(file: Path) -> None:
    turns = [{"from": "human", "value": "Name a city."}]
    row = {"conversations": turns, "chosen": "Paris", "rejected": "London", "system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    assert only(file, row)["prompt"] == [system, *ASK]
    same = {**row, "conversations": [{"from": "system", "value": "Be brief."}, *turns]}
    assert only(file, same)["prompt"] == [system, *ASK]
    other = {**row, "conversations": [{"from": "system", "value": "Be long."}, *turns]}
    assert error_of(write(file, other)).field == "system"


def test_common_beginnings_of_replies_are_not_taken_for_a_prompt(file: Path) -> None:
    error = error_of(write(file, {"chosen": "The capital is Paris", "rejected": "The capital is London"}))
    assert (error.line, error.field) == (1, "prompt")
    assert "cannot be told from its characters" in str(error)
    assert error_of(file, format="implicit_prompt").field == "chosen"


def test_hh_example(file: Path) -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A city\n\nAssistant:"
    pair = only(file, {"chosen": prompt + " Paris \n", "rejected": prompt + " London"})
    assert parts(pair) == (prompt, " Paris \n", " London")


@given(dialogue=st.text(), reply=st.text())
def test_hh_split_loses_no_character_and_cuts_at_the_last_turn(dialogue: str, reply: str) -> None:
    text = dialogue + ASSISTANT + reply
    prompt, last = split_hh(text, "chosen")
    assert prompt + last == text
    assert prompt.endswith(ASSISTANT)
    assert ASSISTANT not in last


TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    ),
    min_size=1,
    max_size=6,
)
REPLY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(prompt=TURNS, chosen=REPLY, rejected=REPLY)
def test_conversations_are_split_before_the_last_message(prompt: list, chosen: str, rejected: str) -> None:
    rejected += "." if chosen == rejected else ""
    replies = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    whole = {"chosen": prompt + replies[0], "rejected": prompt + replies[1]}
    expected = {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}
    assert canonical_pair(whole) == expected
    last = prompt[-1]["content"].strip()
    if prompt[-1]["role"] == "assistant" and last in (chosen.strip(), rejected.strip()):
        with pytest.raises(UnusablePair, match="the prompt ends with the reply"):
            canonical_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return
    assert canonical_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == expected
    if prompt[0]["role"] in ("system", "user"):
        assert canonical_pair({"prompt": prompt, **whole}) == expected


def test_extras_are_carried(file: Path) -> None:
    tools = [{"type": "function", "function": {"name": "größe"}}]
    first = {**TEXT_ROW, "score_chosen": 8, "score_rejected": 6.5, "prompt_id": 7, "tools": tools}
    second = {**TEXT_ROW, "margin": -1, "score_chosen": 8, "score_rejected": 1, "weight": 0.5}
    data = load_pairs(write(file, first, second))
    assert data.column_names == [
        *("prompt", "chosen", "rejected", "margin", "weight", "prompt_id", "tools", "source")
    ]
    assert data["margin"][:] == [1.5, -1.0]
    assert data["weight"][:] == [None, 0.5]
    assert data["prompt_id"][:] == ["7", None]
    assert json.loads(data[0]["tools"]) == tools


def test_dataset_of_messages(file: Path) -> None:
    data = load_pairs(write(file, *[MESSAGE_ROW] * 2500))
    assert data.column_names == ["prompt", "chosen", "rejected", "source"]
    assert data.num_rows == 2500
    assert data[2499] == {**MESSAGE_ROW, "source": f"{file}:2500"}


def test_a_format_of_ones_own_comes_first_and_is_checked_like_the_others(file: Path) -> None:
    before = dict(FORMATS)

    def convert(row: Any) -> dict:
        return {"prompt": row["q"]["text"], "chosen": row["chosen"], "rejected": row["rejected"]}

    try:
        register_format(
            "mine", convert, fields=["q", "chosen", "rejected"], detect=lambda row: bool(row["q"])
        )
        row = {"q": {"text": "Name a city."}, "chosen": "Paris", "rejected": "London", "margin": 2, "x": 0}
        pairs, report = read_pairs(write(file, row))
        assert parts(pairs[0]) == ("Name a city.", "Paris", "London")
        assert pairs[0]["margin"] == 2.0
        assert report.sources[0].format == "mine"
        assert report.sources[0].unused_columns == ["x"]
        assert "detected by" in str(error_of(write(file, {**row, "q": {}})))
        assert error_of(write(file, row, {**row, "q": {"text": 1}})).line == 2
        assert "'text'" in str(error_of(write(file, row, {**row, "q": {}})))
    finally:
        FORMATS.clear()
        FORMATS.update(before)


# Unusable pairs: `invalid` decides


def turn(role: str, content: Any, **extras: Any) -> dict:
    return {"role": role, "content": content, **extras}


HH = {"chosen": f"{HUMAN} Hi{ASSISTANT} Ho", "rejected": f"{HUMAN} Hi{ASSISTANT} Hu"}
UNUSABLE = [
    ("empty_completion", "rejected", TEXT_ROW, {**TEXT_ROW, "rejected": " \n"}),
    ("empty_completion", "chosen", MESSAGE_ROW, {**MESSAGE_ROW, "chosen": [turn("assistant", "")]}),
    ("identical", "rejected", TEXT_ROW, {**TEXT_ROW, "rejected": " Paris"}),
    ("identical", "rejected", MESSAGE_ROW, {**MESSAGE_ROW, "rejected": PARIS}),
    ("empty_prompt", "prompt", TEXT_ROW, {**TEXT_ROW, "prompt": "\t"}),
    ("empty_prompt", "prompt", MESSAGE_ROW, {**MESSAGE_ROW, "prompt": []}),
    ("prompts_differ", "rejected", HH, {**HH, "rejected": f"{HUMAN} Hi!{ASSISTANT} Hu"}),
    ("empty_completion", "chosen", HH, {**HH, "chosen": f"{HUMAN} Hi{ASSISTANT} "}),
    ("empty_prompt", "chosen", HH, {side: f"{HUMAN} {ASSISTANT} {side}" for side in ("chosen", "rejected")}),
    (
        "reply_not_one_assistant_message",
        "chosen",
        HH,
        {**HH, "chosen": f"{HUMAN} Hi{ASSISTANT} Ho{HUMAN} Bye"},
    ),
    (
        "prompts_differ",
        "rejected",
        {"chosen": ASK + PARIS, "rejected": ASK + LONDON},
        {"chosen": ASK + PARIS, "rejected": [turn("user", "Name a town."), *LONDON]},
    ),
    (
        "prompts_differ",
        "chosen",
        MESSAGE_ROW,
        {**MESSAGE_ROW, "chosen": [turn("user", "Name a town."), *PARIS]},
    ),
    ("reply_not_one_assistant_message", "rejected", MESSAGE_ROW, {**MESSAGE_ROW, "rejected": []}),
    ("reply_not_one_assistant_message", "chosen", MESSAGE_ROW, {**MESSAGE_ROW, "chosen": PARIS + PARIS}),
    ("reply_not_one_assistant_message", "chosen", MESSAGE_ROW, {**MESSAGE_ROW, "chosen": ASK}),
    (
        "unsupported_message_key",
        "chosen[0]",
        MESSAGE_ROW,
        {**MESSAGE_ROW, "chosen": [turn("assistant", None, refusal="I will not.")]},
    ),
    (
        "unsupported_message_key",
        "prompt[0]",
        MESSAGE_ROW,
        {**MESSAGE_ROW, "prompt": [turn("user", "Hi", name="Ann", weight=1, tool_calls=None)]},
    ),
    (
        "content_not_text",
        "prompt[0].content[1]",
        MESSAGE_ROW,
        {**MESSAGE_ROW, "prompt": [turn("user", ["What is it?", {"type": "image_url", "image_url": {}}])]},
    ),
]


@pytest.mark.parametrize(("kind", "field", "good", "bad"), UNUSABLE)
def test_unusable_pairs_stop_the_loading_or_are_counted(
    file: Path, caplog: pytest.LogCaptureFixture, kind: str, field: str, good: dict, bad: dict
) -> None:
    write(file, good, bad, good, bad)
    error = error_of(file)
    assert (error.file, error.line, error.field) == (str(file), 2, field)
    assert f"2 of 4 rows cannot be used: {kind} 2 ({file}:2, :4)" in str(error)
    assert "--invalid drop" in str(error)

    with caplog.at_level(logging.WARNING, logger="dpo_kit.pairs"):
        pairs, report = read_pairs(file, invalid="drop")
    assert [pair["source"] for pair in pairs] == [f"{file}:1", f"{file}:3"]
    assert report.counts == {kind: 2}
    assert [(problem.place, problem.field) for problem in report.problems] == [
        (Place(str(file), 2), field),
        (Place(str(file), 4), field),
    ]
    (record,) = caplog.records
    assert record.name == "dpo_kit.pairs"
    assert f"{kind} 2 ({file}:2, :4)" in record.getMessage()
    assert f"left out: {kind} 2" in report.summary()


def test_when_nothing_is_left_dropping_is_no_mend(file: Path) -> None:
    write(file, {**TEXT_ROW, "rejected": ""})
    assert "No row is left" in str(error_of(file, invalid="drop"))
    report = inspect_pairs(file)
    assert (report.read, report.kept, report.statistics) == (1, 0, None)


def test_unknown_policy(file: Path) -> None:
    assert error_of(write(file, TEXT_ROW), invalid="skip").field == "invalid"


def test_structure_is_looked_at_before_sense(file: Path) -> None:
    bad = {"prompt": "", "chosen": [turn("assistant", "", name="x")], "rejected": [turn("wizard", "Hi")]}
    assert error_of(write(file, bad), invalid="drop").field == "rejected[0].role"


# Formats that do not fit


def test_unknown_columns_are_shown_with_what_the_nearest_shapes_lack(file: Path) -> None:
    error = error_of(write(file, {"prompt": "a", "rejected": "b", "winner": 1}))
    assert (error.line, error.field) == (1, "chosen")
    assert "these columns: prompt, rejected, winner" in str(error)
    assert "'explicit_prompt' lacks the field 'chosen'" in str(error)


def test_unknown_format_name_gets_the_nearest(file: Path) -> None:
    error = error_of(write(file, TEXT_ROW), format="share_gpt")
    assert "Did you mean 'sharegpt'? Known formats: auto, explicit_prompt" in str(error)


def test_text_and_messages_do_not_mix(tmp_path: Path) -> None:
    texts, messages = write(tmp_path / "t.jsonl", TEXT_ROW), write(tmp_path / "m.jsonl", MESSAGE_ROW)
    said = str(error_of([texts, messages]))
    assert f"{texts}:1 is text" in said
    assert f"{messages}:1 is messages" in said


# The account


def test_report_of_several_sources(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {**TEXT_ROW, "id": 1}, {**TEXT_ROW, "chosen": ""})
    write(tmp_path / "b.jsonl", {**HH, "lang": "en"})
    (tmp_path / "README.md").write_text("about")
    report = read_pairs(tmp_path, invalid="drop")[1]
    told = json.loads(json.dumps(report.to_dict()))
    assert [(s["file"], s["format"], s["read"], s["kept"], s["unused_columns"]) for s in told["sources"]] == [
        (str(tmp_path / "a.jsonl"), "explicit_prompt", 2, 1, ["id"]),
        (str(tmp_path / "b.jsonl"), "hh", 1, 1, ["lang"]),
    ]
    assert (told["read"], told["kept"], told["counts"]) == (3, 2, {"empty_completion": 1})
    assert told["problems"][0]["place"] == f"{tmp_path / 'a.jsonl'}:2"
    assert told["problems"][0]["mend"]
    assert told["ignored"] == [str(tmp_path / "README.md")]
    assert f"ignored files: {tmp_path / 'README.md'}" in report.summary()


def test_statistics_by_hand(file: Path) -> None:
    rows = [("p", "aaaa", "b"), ("p", "aaaa", "b"), ("p", "a", "bbb"), ("qq", "aaaaaaaaaa", "b" * 10)]
    write(file, *(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows))
    seen = inspect_pairs(file).statistics
    assert seen is not None
    assert (seen.chosen_characters.median, seen.chosen_characters.p95, seen.chosen_characters.max) == (
        4,
        10,
        10,
    )
    assert (seen.rejected_characters.median, seen.prompt_characters.max) == (2, 2)
    assert (seen.distinct_prompts, seen.duplicated_pairs) == (2, 1)
    assert seen.longer_chosen_share == pytest.approx(2 / 3)
