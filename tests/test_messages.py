"""Messages: contents in parts, keys beside role and content, and the form in which Arrow holds them."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_files import error_of, write

from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.messages import has_extras, packed, readable, says_something, unpacked
from dpo_kit.pairs.schema import plain_text

CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
}
DEEP = reduce(lambda inner, _: [inner], range(300), [])
ASK = {"role": "user", "content": "How is the weather?"}
REPLY = {"role": "assistant", "content": "Sunny."}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def row(prompt: Any = ASK, chosen: Any = REPLY, **columns: Any) -> dict:
    return {"prompt": [prompt], "chosen": [chosen], "rejected": [{**REPLY, "content": "No."}], **columns}


def loaded(file: Path, *rows: dict) -> list[dict]:
    return read_pairs(write(file, *rows))[0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "How is "}, {"type": "text", "value": "the weather?"}], ASK["content"]),
        (["How is ", {"type": "input_text", "text": "the weather?"}], ASK["content"]),
        ([{"type": "text", "text": "é", "image_url": None, "annotations": []}], "é"),
    ],
)
def test_text_parts_are_one_text_with_nothing_between(file: Path, content: list, text: str) -> None:
    (pair,) = loaded(file, row({"role": "user", "content": content}))
    assert pair["prompt"] == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "part of type 'image_url'"),
        ({"type": "input_audio"}, "part of type 'input_audio'"),
        ({"type": "refusal", "refusal": "I will not."}, "part of type 'refusal'"),
        ({"type": "text", "text": "Hi", "cache_control": {"type": "x"}}, "'cache_control' beside its text"),
    ],
)
def test_parts_that_are_not_text_are_left_out_and_counted(file: Path, part: dict, said: str) -> None:
    bad = row(chosen={**REPLY, "content": ["Look: ", part]})
    pairs, report = read_pairs(write(file, row(), bad), invalid="drop")
    assert len(pairs) == 1
    (problem,) = report.problems
    assert (problem.kind, problem.field) == ("content_not_text", "chosen[0].content[1]")
    assert said in problem.message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({**ASK, "content": [{"text": "Hi"}]}, "prompt[0].content[0]"),
        ({**ASK, "content": [{"type": "text"}]}, "prompt[0].content[0].text"),
        ({**ASK, "content": [{"type": "text", "text": 3}]}, "prompt[0].content[0].text"),
        ({**ASK, "content": [["Hi"]]}, "prompt[0].content[0]"),
        ({**ASK, "content": None, "name": "Ann"}, "prompt[0].content"),
        ({**ASK, "name": 3}, "prompt[0].name"),
        ({**REPLY, "tool_calls": [{"id": 1}]}, "prompt[0].tool_calls[0]"),
        ({**REPLY, "tool_calls": {"name": "f"}}, "prompt[0].tool_calls"),
        ({**REPLY, "tool_calls": "[{"}, "prompt[0].tool_calls"),
        ({**REPLY, "tool_calls": [{"name": "f", "arguments": DEEP}]}, "prompt[0].tool_calls"),
        (
            {**REPLY, "tool_calls": f'[{{"name": "f", "arguments": {json.dumps(DEEP)}}}]'},
            "prompt[0].tool_calls",
        ),
        ({**REPLY, "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "prompt[0].tool_calls"),
        ({**REPLY, "reasoning_content": "\ud83d"}, "prompt[0].reasoning_content"),
        ({**ASK, "extras": '{"role": "system"}'}, "prompt[0].extras"),
    ],
)
def test_bad_messages_name_their_field(file: Path, message: dict, field: str) -> None:
    assert error_of(write(file, row(message)), invalid="drop").field == field


def test_what_a_message_says_beside_its_content_is_kept(file: Path) -> None:
    asked = {**ASK, "name": "Ann", "tool_calls": None}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "why"}
    (pair,) = loaded(file, row(asked, calling))
    assert pair["prompt"] == [{**ASK, "name": "Ann"}]
    assert pair["chosen"] == [calling]
    without = {key: value for key, value in calling.items() if key != "content"}
    as_text = {**without, "tool_calls": json.dumps([CALL])}
    assert loaded(file, row(asked, as_text)) == [pair]
    assert loaded(file, row(packed(asked), packed(calling))) == [pair]


def test_keys_that_no_template_reads_are_refused_by_name(file: Path) -> None:
    report = read_pairs(write(file, row(), row({**ASK, "weight": 1, "name": "Ann"})), invalid="drop")[1]
    (problem,) = report.problems
    assert problem.kind == "unsupported_message_key"
    assert problem.message == "the message carries 'weight', which would be lost"


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_tool_call_or_a_reasoning_is_a_reply(file: Path, content: str | None) -> None:
    for extras in ({"tool_calls": [CALL]}, {"reasoning": "why"}):
        message = {"role": "assistant", "content": content, **extras}
        assert loaded(file, row(chosen=message))[0]["chosen"] == [message]
        assert plain_text([message]) == (content or "")
        assert says_something([packed(message)])
    named = row(chosen={"role": "assistant", "content": content or "", "name": "Ann"})
    report = read_pairs(write(file, row(), named), invalid="drop")[1]
    assert report.counts == {"empty_completion": 1}


def test_replies_that_differ_in_their_extras_alone_are_a_pair(file: Path) -> None:
    pair = row(chosen={**REPLY, "tool_calls": [CALL]})
    pair["rejected"] = [{**REPLY, "tool_calls": [{**CALL, "function": {"name": "news", "arguments": {}}}]}]
    assert loaded(file, pair)[0]["rejected"] == pair["rejected"]
    pair["rejected"] = pair["chosen"]
    assert read_pairs(write(file, row(), pair), invalid="drop")[1].counts == {"identical": 1}


def test_chat_template_kwargs_are_json_text(file: Path) -> None:
    given_as = (
        {"enable_thinking": False, "date": None},
        '{"enable_thinking": false}',
        {},
        {"date": None},
        None,
    )
    pairs = loaded(file, *(row(chat_template_kwargs=kwargs) for kwargs in given_as))
    found = [pair.get("chat_template_kwargs") for pair in pairs]
    assert found == ['{"enable_thinking": false}'] * 2 + [None] * 3


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.builds(
    lambda content, extras: {"role": "user", "content": content, **extras},
    st.text() | st.none(),
    st.dictionaries(st.sampled_from(["name", "tool_calls", "thinking"]), JSON_VALUES, max_size=2),
)


@given(messages=st.lists(MESSAGES, max_size=4))
@settings(max_examples=100, deadline=None)
def test_arrow_holds_any_message(messages: list[dict]) -> None:
    messages = [unpacked(message) for message in messages]  # without nulls
    text = pyarrow.string()
    held = pyarrow.struct([("role", text), ("content", text), ("extras", text)])
    back = pyarrow.array([packed(message) for message in messages], held).to_pylist()
    assert [unpacked(message) for message in back] == messages
    assert [packed(message) for message in back] == back
    assert has_extras(back) == has_extras(messages) == any(len(message) > 2 for message in messages)


def test_templates_read_arguments_as_objects_and_no_null_contents() -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
    calling = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}
    assert readable([ASK, packed(calling)]) == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    assert calling["tool_calls"][0]["function"] == function  # type: ignore[index]
    odd = {**REPLY, "tool_calls": [{"name": "python", "arguments": "print(1)"}]}
    assert readable([odd]) == [odd]
