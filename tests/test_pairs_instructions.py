"""One row of each shape of instruction data as its public set has it, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair_files import error_of, write

from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.formats import detected_format
from dpo_kit.pairs.schema import Place


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def reply(content: str) -> list[dict[str, str]]:
    return [said("assistant", content)]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROWS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "alpaca": [
        (
            {"instruction": "Translate.", "input": " Guten Tag\n", "chosen": " Hello", "rejected": "Bye"},
            {"prompt": "Translate.\n Guten Tag\n", "chosen": " Hello", "rejected": "Bye"},
        ),
        (
            {"instruction": "Say hello. ", "input": "", "chosen": "Hello", "rejected": "Bye"},
            {"prompt": "Say hello. ", "chosen": "Hello", "rejected": "Bye"},
        ),
        (
            {
                "instruction": "And 2?",
                "input": None,
                "system": "Count.",
                "history": [["1?", "1"]],
                "chosen": "2",
                "rejected": "3",
            },
            {
                "prompt": [
                    said("system", "Count."),
                    said("user", "1?"),
                    *reply("1"),
                    said("user", "And 2?"),
                ],
                "chosen": reply("2"),
                "rejected": reply("3"),
            },
        ),
        (
            {"instruction": "Hi", "system": "", "chosen": "Hello", "rejected": "Bye"},
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        ),
    ],
    "alpaca_kto": [
        (
            {"instruction": "Translate.", "input": "ja", "output": "yes", "kto_tag": False},
            {"prompt": "Translate.\nja", "completion": "yes", "label": False},
        )
    ],
    "rated_responses": [
        (
            {
                "source": "sharegpt",
                "instruction": "Name a city.",
                "chosen_response": "Paris",
                "rejected_response": "London",
                "chosen_avg_rating": 4.75,
                "rejected_avg_rating": 4.0,
                "chosen_model": "gpt-4",
            },
            {"prompt": "Name a city.", "chosen": "Paris", "rejected": "London", "margin": 0.75},
        )
    ],
    "orca_dpo": [
        (
            {"system": "Be brief.", "question": "Name a city.", "chosen": "Paris\n", "rejected": "London"},
            {
                "prompt": [said("system", "Be brief."), said("user", "Name a city.")],
                "chosen": reply("Paris\n"),
                "rejected": reply("London"),
            },
        ),
        (
            {"system": "", "question": "Name a city.", "chosen": "Paris", "rejected": "London"},
            {"prompt": [said("user", "Name a city.")], "chosen": reply("Paris"), "rejected": reply("London")},
        ),
    ],
    "orca_dpo_input": [
        (
            {
                "system": "Be brief.",
                "input": "Name a city.",
                "chosen": "Paris",
                "rejected": "London",
                "generations": ["Paris", "London"],
                "rating": [9.0, 8.0],
                "status": "unchanged",
            },
            {
                "prompt": [said("system", "Be brief."), said("user", "Name a city.")],
                "chosen": reply("Paris"),
                "rejected": reply("London"),
            },
        )
    ],
    "system_prompt": [
        (
            {
                "id": "1",
                "source": "truthy_dpo",
                "system": "You are Ann.",
                "prompt": "Who are you?",
                "chosen": "Ann.",
                "rejected": "Bob.",
            },
            {
                "prompt": [said("system", "You are Ann."), said("user", "Who are you?")],
                "chosen": reply("Ann."),
                "rejected": reply("Bob."),
            },
        )
    ],
    "question": [
        (
            {"question": "Name a city.", "chosen": "Paris", "rejected": "London"},
            {"prompt": "Name a city.", "chosen": "Paris", "rejected": "London"},
        )
    ],
    "question_responses": [
        (
            {"question": "Name a city.", "response_chosen": "Paris", "response_rejected": "London"},
            {"prompt": "Name a city.", "chosen": "Paris", "rejected": "London"},
        ),
        (
            {
                "system": "",
                "history": [],
                "question": "Name a city.",
                "response_chosen": "Paris",
                "response_rejected": "London",
            },
            {"prompt": [said("user", "Name a city.")], "chosen": reply("Paris"), "rejected": reply("London")},
        ),
    ],
    "stack_exchange_paired": [
        (
            {
                "qid": 4,
                "question": "How to sort?",
                "date": "2010/10/19",
                "metadata": ["https://stackoverflow.com"],
                "response_j": "sorted(x)",
                "response_k": "x.sort",
            },
            {"prompt": "How to sort?", "chosen": "sorted(x)", "rejected": "x.sort"},
        )
    ],
    "step_dpo": [
        (
            {
                "dataset": "MATH",
                "prompt": "1 + 2 + 3?",
                "initial_reason_steps": "Step 1: 1 + 2 = 3.\nStep 2: ",
                "chosen": "3 + 3 = 6.",
                "rejected": "3 + 3 = 7.",
                "full_chosen": "3 + 3 = 6. Done.",
                "full_rejected": "3 + 3 = 7. Done.",
                "answer": "6",
            },
            {
                "prompt": "1 + 2 + 3?",
                "chosen": "Step 1: 1 + 2 = 3.\nStep 2: 3 + 3 = 6.",
                "rejected": "Step 1: 1 + 2 = 3.\nStep 2: 3 + 3 = 7.",
            },
        )
    ],
    "openai_preference": [
        (
            {
                "input": {
                    "messages": [said("user", "How cold is it?")],
                    "tools": [WEATHER],
                    "parallel_tool_calls": True,
                },
                "preferred_output": reply("Ten degrees."),
                "non_preferred_output": reply("It is not very cold."),
            },
            {
                "prompt": [said("user", "How cold is it?")],
                "chosen": reply("Ten degrees."),
                "rejected": reply("It is not very cold."),
                "tools": json.dumps([WEATHER]),
            },
        ),
        (
            {
                "input": {"messages": [said("user", "Hi")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": reply("Hello"),
                "non_preferred_output": reply("Bye"),
            },
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        ),
    ],
    "explicit_prompt": [
        (  # Dahoas/full-hh-rlhf: HH's turns in a prompt of its own stay as they are
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant:",
                "response": " Hello",
                "chosen": " Hello",
                "rejected": " Bye",
            },
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Bye"},
        ),
        (  # HuggingFaceH4/ultrafeedback_binarized: 'messages' is a copy of the chosen side
            {
                "prompt": "Hi",
                "messages": [said("user", "Hi"), *reply("Hello")],
                "chosen": [said("user", "Hi"), *reply("Hello")],
                "rejected": [said("user", "Hi"), *reply("Bye")],
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            },
            {
                "prompt": [said("user", "Hi")],
                "chosen": reply("Hello"),
                "rejected": reply("Bye"),
                "margin": 2.5,
            },
        ),
    ],
    "implicit_prompt": [
        (
            {
                "messages": [said("user", "Hi"), *reply("Hello")],
                "chosen": [said("user", "Hi"), *reply("Hello")],
                "rejected": [said("user", "Hi"), *reply("Bye")],
            },
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        )
    ],
    "sharegpt": [
        (
            {
                "conversations": [
                    {"from": "human", "value": "How cold is it?"},
                    {"from": "function_call", "value": '{"name": "weather"}'},
                    {"from": "observation", "value": "10"},
                ],
                "tools": json.dumps([WEATHER]),
                "chosen": {"from": "gpt", "value": "Ten degrees."},
                "rejected": [{"from": "gpt", "value": "Cold."}],
            },
            {
                "prompt": [
                    said("user", "How cold is it?"),
                    said("assistant", '{"name": "weather"}'),
                    said("tool", "10"),
                ],
                "tools": json.dumps([WEATHER]),
                "chosen": reply("Ten degrees."),
                "rejected": reply("Cold."),
            },
        ),
        (
            {
                "conversations": [{"from": "human", "value": "How cold is it?"}],
                "tools": "",
                "chosen": {"from": "function_call", "value": '{"name": "weather"}'},
                "rejected": "Cold.",
            },
            {
                "prompt": [said("user", "How cold is it?")],
                "chosen": reply('{"name": "weather"}'),
                "rejected": reply("Cold."),
            },
        ),
    ],
    "messages_and_replies": [
        (
            {
                "messages": [said("system", "Be brief."), said("user", "Hi")],
                "chosen": said("assistant", "Hello"),
                "rejected": said("assistant", "Bye"),
            },
            {
                "prompt": [said("system", "Be brief."), said("user", "Hi")],
                "chosen": reply("Hello"),
                "rejected": reply("Bye"),
            },
        )
    ],
    "ultrainteract": [
        (
            {
                "task": "Coding",
                "dataset": "codecontest",
                "trajectory": [{"from": "user", "value": "Solve it."}],
                "chosen": "Step 1",
                "rejected": "Step 0",
                "id": "a",
                "parent_id": "b",
            },
            {"prompt": [said("user", "Solve it.")], "chosen": reply("Step 1"), "rejected": reply("Step 0")},
        )
    ],
    "sharegpt_kto": [
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "kto_tag": True,
            },
            {"prompt": [said("user", "Hi")], "completion": reply("Hello"), "label": True},
        )
    ],
}
CASES = [(name, *case) for name, cases in ROWS.items() for case in cases]
GOOD = {name: cases[0][0] for name, cases in ROWS.items()}


@pytest.mark.parametrize(("name", "row", "canonical"), CASES)
def test_a_row_of_each_shape(tmp_path: Path, name: str, row: dict, canonical: dict) -> None:
    file = write(tmp_path / "a.jsonl", row)
    (loaded,), report = read_pairs(file)
    assert report.sources[0].format == name
    assert loaded == {**canonical, "source": f"{file}:1"}


def test_a_shape_is_not_taken_for_another_where_columns_are_in_both() -> None:
    alpaca = {**GOOD["alpaca"], "system": "Be brief.", "question": "?"}
    assert detected_format(alpaca, Place("a", 1)).name == "alpaca"
    paired = {**GOOD["explicit_prompt"], "question": "?", "instruction": "?", "conversations": None}
    assert detected_format({**paired, "conversations": []}, Place("a", 1)).name == "explicit_prompt"
    whole = ROWS["explicit_prompt"][1][0]
    assert detected_format({**whole, "system": "Be brief."}, Place("a", 1)).name == "explicit_prompt"


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("alpaca", {"instruction": 1}, "instruction"),
        ("alpaca", {"input": ["a"]}, "input"),
        ("alpaca", {"chosen": True}, "chosen"),
        ("alpaca", {"history": ["a", "b"]}, "history[0]"),
        ("alpaca", {"history": [["a", None]]}, "history[0][1]"),
        ("alpaca_kto", {"kto_tag": "yes"}, "kto_tag"),
        ("alpaca_kto", {"output": None}, "output"),
        ("rated_responses", {"chosen_response": None}, "chosen_response"),
        ("rated_responses", {"chosen_avg_rating": "high"}, "chosen_avg_rating"),
        ("orca_dpo", {"system": False}, "system"),
        ("orca_dpo", {"question": None}, "question"),
        ("question_responses", {"response_rejected": 2}, "response_rejected"),
        ("stack_exchange_paired", {"response_j": None}, "response_j"),
        ("stack_exchange_paired", {"question": {}}, "question"),
        ("step_dpo", {"initial_reason_steps": None}, "initial_reason_steps"),
        ("openai_preference", {"input": {"messages": "Hi"}}, "input.messages"),
        ("openai_preference", {"input": {"messages": [{"role": "user"}]}}, "input.messages[0].content"),
        ("openai_preference", {"input": {"messages": [], "tools": {"a": 1}}}, "input.tools"),
        ("openai_preference", {"preferred_output": "Hi"}, "preferred_output"),
        ("openai_preference", {"input": []}, "input"),
        ("ultrainteract", {"trajectory": [{"from": "narrator", "value": "a"}]}, "trajectory[0].from"),
        ("messages_and_replies", {"chosen": {"content": "a"}}, "chosen.role"),
        ("sharegpt_kto", {"kto_tag": 2}, "kto_tag"),
    ],
)
def test_bad_rows_are_named_by_what_stands_on_disk(
    tmp_path: Path, name: str, change: dict, field: str
) -> None:
    good = GOOD[name]
    error = error_of(write(tmp_path / "a.jsonl", good, {**good, **change}), format=name, invalid="drop")
    assert (error.line, error.field) == (2, field)


@pytest.mark.parametrize(
    ("name", "change", "kind", "field"),
    [
        ("alpaca", {"instruction": " ", "input": ""}, "empty_prompt", "instruction"),
        ("stack_exchange_paired", {"response_k": "sorted(x)"}, "identical", "response_k"),
        ("question_responses", {"response_chosen": ""}, "empty_completion", "response_chosen"),
        (
            "openai_preference",
            {"preferred_output": []},
            "reply_not_one_assistant_message",
            "preferred_output",
        ),
    ],
)
def test_unusable_rows_are_named_by_what_stands_on_disk(
    tmp_path: Path, name: str, change: dict, kind: str, field: str
) -> None:
    good = GOOD[name]
    _, report = read_pairs(write(tmp_path / "a.jsonl", good, {**good, **change}), invalid="drop")
    assert [(problem.kind, problem.field) for problem in report.problems] == [(kind, field)]
