"""Rows that have the wrong structure are refused by file, line and field, whatever `invalid` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pair_files import error_of, write

from dpo_kit.audit import inspect_pairs
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs
from dpo_kit.pairs.formats import FORMATS
from dpo_kit.pairs.formats.dialogues import ASSISTANT, HUMAN
from dpo_kit.pairs.schema import BadRow, UnusablePair

TEXT_ROW = {"prompt": "Name a city.", "chosen": " Paris", "rejected": " London"}
ASK = [{"role": "user", "content": "Name a city."}]
LONDON = [{"role": "assistant", "content": "London"}]
MESSAGE_ROW = {"prompt": ASK, "chosen": [{"role": "assistant", "content": "Paris"}], "rejected": LONDON}
HH = {"chosen": f"{HUMAN} Hi{ASSISTANT} Ho", "rejected": f"{HUMAN} Hi{ASSISTANT} Hu"}


def turn(role: str, content: str | None, **extras: Any) -> dict:
    return {"role": role, "content": content, **extras}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize(
    ("good", "bad", "field", "said"),
    [
        (TEXT_ROW, {"prompt": "a", "rejected": "b"}, "chosen", "no such field, only: prompt, rejected"),
        (TEXT_ROW, {**TEXT_ROW, "chosen": None}, "chosen", "found null"),
        (TEXT_ROW, {**TEXT_ROW, "rejected": 3}, "rejected", "found a number"),
        (TEXT_ROW, {**TEXT_ROW, "rejected": True}, "rejected", "found a boolean (true)"),
        (TEXT_ROW, {**TEXT_ROW, "prompt": {"text": "a"}}, "prompt", "found an object"),
        (TEXT_ROW, {**TEXT_ROW, "chosen": "a\ud83d"}, "chosen", "half of a surrogate pair"),
        (TEXT_ROW, {**TEXT_ROW, "rejected": LONDON}, "rejected", "one reply is text"),
        (MESSAGE_ROW, {**MESSAGE_ROW, "chosen": ["Paris"]}, "chosen[0]", "found text"),
        (MESSAGE_ROW, {**MESSAGE_ROW, "chosen": [{"role": "assistant"}]}, "chosen[0].content", "no such key"),
        (MESSAGE_ROW, {**MESSAGE_ROW, "chosen": [turn("assistant", None)]}, "chosen[0].content", "null"),
        (MESSAGE_ROW, {**MESSAGE_ROW, "prompt": [*ASK, turn("bot", "x")]}, "prompt[1].role", "'bot'"),
        (MESSAGE_ROW, {**MESSAGE_ROW, "prompt": [turn(["user"], "x")]}, "prompt[0].role", "a list"),
        (HH, {**HH, "chosen": "Hello"}, "chosen", "no '\\n\\nAssistant:' turn"),
        (HH, {**HH, "rejected": f"{HUMAN} Ho{ASSISTANT} Hu", "margin": "1"}, "margin", "expected a number"),
        (TEXT_ROW, {**TEXT_ROW, "margin": "1"}, "margin", "expected a number"),
        (TEXT_ROW, {**TEXT_ROW, "margin": True}, "margin", "boolean"),
        (TEXT_ROW, {**TEXT_ROW, "margin": float("nan")}, "margin", "finite"),
        (TEXT_ROW, {**TEXT_ROW, "score_chosen": 10**400}, "score_chosen", "finite"),
        (TEXT_ROW, {**TEXT_ROW, "weight": -0.5}, "weight", "below 0"),
        (TEXT_ROW, {**TEXT_ROW, "tools": "not json"}, "tools", "list of tool"),
        (TEXT_ROW, {**TEXT_ROW, "prompt_id": 1.5}, "prompt_id", "expected text"),
        (TEXT_ROW, {**TEXT_ROW, "chat_template_kwargs": "[1]"}, "chat_template_kwargs", "an object"),
        (
            TEXT_ROW,
            {**TEXT_ROW, "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs.tokenize",
            "no variable",
        ),
    ],
)
@pytest.mark.parametrize("invalid", ["error", "drop"])
def test_a_bad_row_names_file_line_and_field(
    file: Path, invalid: str, good: dict, bad: dict, field: str, said: str
) -> None:
    error = error_of(write(file, good, good, bad, good), invalid=invalid)
    assert (error.file, error.line, error.field) == (str(file), 3, field)
    assert said in str(error)


SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"conversations": [{"from": "narrator", "value": "Hi"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": 1}]}, "conversations[0].value"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value"),
        ({"conversations": "Hi"}, "conversations"),
        ({"conversations": [{"from": "human", "value": "Hi", "role": "user"}]}, "conversations[0]"),
        ({"chosen": {"from": "gpt", "value": None}}, "chosen.value"),
        ({"rejected": 0}, "rejected"),
        ({"system": 1}, "system"),
    ],
)
def test_bad_sharegpt_rows(file: Path, change: dict, field: str) -> None:
    assert error_of(write(file, {**SHAREGPT, **change})).field == field


def test_unusable_sharegpt_rows_name_their_own_fields(file: Path) -> None:
    weighted = {"conversations": [{"from": "human", "value": "Hi", "weight": 0}]}
    two = {"chosen": [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]}
    human = {"chosen": {"from": "human", "value": "a"}}
    rows = [SHAREGPT, *({**SHAREGPT, **change} for change in (weighted, two, human, {"conversations": []}))]
    problems = read_pairs(write(file, *rows), invalid="drop")[1].problems
    assert [(problem.kind, problem.field) for problem in problems] == [
        ("unsupported_message_key", "conversations[0]"),
        ("reply_not_one_assistant_message", "chosen"),
        ("reply_not_one_assistant_message", "chosen"),
        ("empty_prompt", "conversations"),
    ]


def test_an_audit_goes_on_behind_bad_rows_and_broken_lines(file: Path) -> None:
    good = json.dumps(TEXT_ROW)
    broken = [
        '{"prompt": "a", "chosen": ',
        json.dumps({**TEXT_ROW, "chosen": 3}),
        "[1]",
        '{"prompt": 1, "prompt": 2}',
    ]
    file.write_text("\n".join([good, *broken, good]) + "\n")
    report = inspect_pairs(file)
    assert (report.read, report.kept, report.counts) == (6, 2, {"bad_row": 4})
    assert [(p.place.line, p.field) for p in report.problems] == [
        (2, None),
        (3, "chosen"),
        (4, None),
        (5, "prompt"),
    ]
    assert "found a number" in report.problems[1].message
    with pytest.raises(InputError) as caught:
        load_pairs(file, invalid="drop")
    assert caught.value.line == 2


GOOD_ROWS = {
    "explicit_prompt": [TEXT_ROW, MESSAGE_ROW, {**MESSAGE_ROW, "prompt": ASK[0]["content"], "tools": [{}]}],
    "implicit_prompt": [{side: ASK + MESSAGE_ROW[side] for side in ("chosen", "rejected")}],
    "hh": [HH],
    "sharegpt": [SHAREGPT, {**SHAREGPT, "chosen": {"from": "gpt", "value": "a"}, "system": "Be brief."}],
    "unpaired": [
        {"prompt": "Name a city.", "completion": " Paris", "label": True},
        {"prompt": ASK, "completion": ASK + MESSAGE_ROW["chosen"], "label": 0},
    ],
    "unpaired_messages": [{"messages": ASK + MESSAGE_ROW["chosen"], "label": False}],
    "ranked": [
        {"prompt": "Name a city.", "completions": [" Paris", " London", " Paris"], "scores": [1, 0.5, -1]},
        {"prompt": ASK, "completions": [MESSAGE_ROW["chosen"], LONDON], "ranks": [2, 1]},
    ],
}
JSON_VALUES = st.sampled_from([None, True, 0, 1.5, "", " ", "a", [], {}, "user", "assistant", "gpt", "human"])
JSON_VALUES = st.text(max_size=3) | st.lists(JSON_VALUES, max_size=2) | JSON_VALUES


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, inner in inside for spot in [(value, key), *spots(inner)]]


@st.composite
def damaged_rows(draw: st.DrawFn) -> tuple[str, dict]:
    """A good row of one shape, with up to two of its parts taken out, doubled or replaced."""
    name = draw(st.sampled_from(sorted(GOOD_ROWS)))
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD_ROWS[name]))))
    for _ in range(draw(st.integers(0, 2))):
        if not spots(row):
            break
        container, key = draw(st.sampled_from(spots(row)))
        damage = draw(st.sampled_from(["out", "again", "replaced"]))
        if damage == "out":
            del container[key]
        elif damage == "again" and isinstance(container, list):
            container.append(container[key])
        else:
            container[key] = draw(JSON_VALUES)
    return name, row


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(damaged=damaged_rows())
def test_damaged_rows_are_loaded_right_or_refused(damaged: tuple[str, dict]) -> None:
    name, row = damaged
    try:
        (loaded,) = FORMATS[name].canonical(row, FORMATS[name].convert)
    except BadRow:
        return
    if isinstance(loaded, UnusablePair):
        return
    event(f"loaded {name}")
    replies = FORMATS[name].kind.parts(loaded)
    assert len({type(part) for part in (loaded["prompt"], *replies.values())}) == 1
    check_judgement(FORMATS[name].kind.name, loaded, row)
    for place, reply in replies.items():
        told = told_reply(name, row, place)
        text = reply if isinstance(reply, str) else reply[0]["content"]
        assert text.strip()
        if isinstance(reply, list):
            assert reply == [{"role": "assistant", "content": text}]
        if isinstance(told, list):  # the reply is what the row itself ends with
            told = told[-1]
        if isinstance(told, dict):
            told = told["value"] if "value" in told else told["content"]
            told = "".join(told) if isinstance(told, list) else told  # a content in parts
        assert told == (loaded["prompt"] + text if name == "hh" else text)


def told_reply(name: str, row: dict, place: str) -> Any:
    """What the row itself has where the loaded one has this reply."""
    if name == "unpaired_messages":
        return row["messages"]
    return row["completions"][int(place[12:-1])] if name == "ranked" else row[place]


def check_judgement(kind: str, loaded: dict, row: dict) -> None:
    if kind == "pairs":
        assert loaded["chosen"] != loaded["rejected"]
    elif kind == "unpaired":
        assert type(loaded["label"]) is bool
        assert loaded["label"] == {"0": False, "1": True}.get(row["label"], row["label"])
    else:
        scores = row.get("scores") or [-rank for rank in row["ranks"]]
        assert loaded["scores"] == scores
        assert len(scores) == len(loaded["completions"]) >= 2
        assert len({str(reply) for reply in loaded["completions"]}) > 1
