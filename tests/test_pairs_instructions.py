"""One row of each shape of instructions and conversations as its public set has it; what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_rows import ANN, CONVERSATIONS, WEATHER, reply, said
from pair_files import error_of, write

from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.formats import detected_format
from dpo_kit.pairs.schema import Place

ROWS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    **CONVERSATIONS,
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
        ),
        (
            {
                "system": "You are Ann.",
                "instruction": "Who are you?",
                "chosen_response": "Ann.",
                "rejected_response": "Bob.",
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        ),
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
    "query_responses": [
        (
            {"query": "Who are you?", "response": "Ann.", "rejected_response": "Bob."},
            {"prompt": "Who are you?", "chosen": "Ann.", "rejected": "Bob."},
        ),
        (
            {
                "query": "And now?",
                "response": "Ann.",
                "rejected_response": "Bob.",
                "system": "You are Ann.",
                "history": [["Who are you?", "Ann."]],
            },
            {
                "prompt": [*ANN, *reply("Ann."), said("user", "And now?")],
                "chosen": reply("Ann."),
                "rejected": reply("Bob."),
            },
        ),
    ],
    "nemo_aligner": [
        (
            {
                "prompt": "<s>User\nHi<s>Assistant\n",
                "chosen_response": "Hello",
                "rejected_response": "Bye",
                "chosen_reward": 4.5,
                "rejected_reward": "5",
            },
            {
                "prompt": "<s>User\nHi<s>Assistant\n",
                "chosen": "Hello",
                "rejected": "Bye",
                "margin": -0.5,
            },
        )
    ],
    "safety_labels": [
        (
            {"prompt": "How?", "response": "So.", "category": {"violence": False}, "is_safe": True},
            {"prompt": "How?", "completion": "So.", "label": True},
        )
    ],
    "unpaired": [
        (
            {"prompt": "Hi", "completion": "Hello", "label": label},
            {"prompt": "Hi", "completion": "Hello", "label": is_good},
        )
        for label, is_good in (("true", True), ("False", False), ("1", True), (0.0, False), (1.0, True))
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


def test_a_system_text_is_there_once(tmp_path: Path) -> None:
    """Of one rule for all shapes: equal texts are one, blank ones none, and different ones no row."""
    turns = [said("system", "You are Ann."), {"from": "human", "value": "Who are you?"}]
    shapes = [
        {"prompt": ANN, "chosen": "Ann.", "rejected": "Bob."},
        {"chosen": [*ANN, *reply("Ann.")], "rejected": [*ANN, *reply("Bob.")]},
        {"conversations": turns, "chosen": "Ann.", "rejected": "Bob."},
        {"messages": ANN, "chosen": "Ann.", "rejected": "Bob."},
        {"messages": [*ANN, *reply("Ann.")], "rejected_response": "Bob."},
    ]
    for i, shape in enumerate(shapes):
        for column, text in (("system", "You are Ann."), ("system_prompt", " "), ("system", None)):
            (pair,) = read_pairs(write(tmp_path / "a.jsonl", {**shape, column: text}))[0]
            assert pair["prompt"] == ANN, (i, column)
        error = error_of(write(tmp_path / "a.jsonl", {**shape, "system": "You are Bob."}), invalid="drop")
        assert (error.field, "another system text" in str(error)) == ("system", True)


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
        ("unpaired", {"label": "good"}, "label"),
        ("unpaired", {"label": 0.5}, "label"),
        ("safety_labels", {"is_safe": None}, "is_safe"),
        ("nemo_aligner", {"chosen_reward": "high"}, "chosen_reward"),
        ("swift", {"rejected_response": None}, "rejected_response"),
        ("swift_conversations", {"rejected_messages": "a"}, "rejected_messages"),
        ("alpaca", {"system": 1}, "system"),
        # another system text in the turns already
        ("messages_and_replies", {"system": "Be long."}, "system"),
        ("swift", {"system": "Be Bob."}, "system"),
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
        ("orca_dpo", {"question": ""}, "empty_prompt", "question"),
        ("messages_and_replies", {"messages": [], "system": "Be brief."}, "empty_prompt", "messages"),
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
