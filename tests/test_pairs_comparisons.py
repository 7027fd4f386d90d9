"""One row of each shape that says which of two replies is better, as public sets have it; odd labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair_files import error_of, write

from dpo_kit.pairs import read_pairs


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(prompt: Any, chosen: str, rejected: str, **extras: Any) -> dict[str, Any]:
    """What should be loaded; the replies are messages where the prompt is."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extras}
    replies = {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)]}
    return {"prompt": prompt, **replies, **extras}


def dialogue(*texts: Any) -> list[dict[str, Any]]:
    return [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


SAFE = {
    "prompt": "How?",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
SHP = {
    "post_id": "qt3nxl",
    "history": "Why?",
    "score_A": 340,
    "score_B": 350,
    "human_ref_A": "a",
    "human_ref_B": "b",
    "labels": 0,
    "score_ratio": 1.03,
}
POST = {
    "id": "t3_1",
    "post": "It broke.",
    "title": "Help",
    "subreddit": "tifu",
    "site": None,
    "article": None,
}
NEWS = {"id": "c1", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": "It rained."}
SUMMARIES = {
    "info": POST,
    "summaries": [{"text": " Broken.", "policy": "sup1", "note": ""}, {"text": " Help.", "policy": "ref"}],
    "choice": 0,
    "worker": "w",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": None},
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Why is the sky blue?"},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": "Dust [1].",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "answer_1": "Rayleigh [1].",
    "score_1": 0.5,
}
PANDALM = {
    "idx": 0,
    "cmp_key": "bloom-7b_llama-7b",
    "instruction": "Shorten.",
    "input": "Very long.",
    "response1": "Long.",
    "response2": "L",
    "annotator1": 1,
    "annotator2": 2,
    "annotator3": 1,
}
ALPACA_FARM = {"instruction": "Hi", "input": "", "output_1": "a", "output_2": "b", "preference": 2}
HELPSTEER2 = {
    "split": "train",
    "prompt": "One?\n<extra_id_1>Assistant\n1\n\n<extra_id_1>User\nTwo?",
    "response_1": "2",
    "response_2": "II",
    "preference_strength": -2,
    "preference_statement": "1 is better",
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": dialogue("One?", "1", "Two?"),
    "response1": "II",
    "response2": "2",
    "overall_preference": 1,
    "individual_preference": [{"score": 1}],
}
PROMETHEUS = {
    "orig_criteria": "c",
    "orig_instruction": "Hi",
    "orig_response_A": "a",
    "orig_response_B": "b",
    "orig_preference": "B",
    "instruction": "###Task Description: ...",
    "output": "Feedback: ... [RESULT] B",
    "input": "",
}
ARENA = {
    "question_id": "58",
    "model_a": "chatglm-6b",
    "model_b": "koala-13b",
    "winner": "model_b",
    "conversation_a": dialogue("Hi", "a"),
    "conversation_b": dialogue("Hi", "b"),
    "turn": 1,
    "anony": True,
}
KAGGLE = {
    "id": 30192,
    "model_a": "gpt-4-1106-preview",
    "model_b": "gpt-4-0613",
    "prompt": '["Hi"]',
    "response_a": '["a\\/1"]',
    "response_b": '["b"]',
    "winner_model_a": 1,
    "winner_model_b": 0,
    "winner_tie": 0,
}
TEXT_PART = {"type": "text", "image": None, "mimeType": None}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("safe_rlhf", SAFE, pair("How?", "one", "zero")),
    ("shp", SHP, pair("Why?", "b", "a", margin=10.0)),
    ("shp", {**SHP, "labels": 1}, pair("Why?", "a", "b", margin=-10.0)),
    ("shp", {**SHP, "score_A": "340", "score_B": "", "labels": "1"}, pair("Why?", "a", "b")),
    (
        "align_anything",
        {"question": "How?", "response_1": "a", "response_2": "b", "overall_response": 2},
        pair("How?", "b", "a"),
    ),
    (
        "summarize_from_feedback",
        SUMMARIES,
        pair("SUBREDDIT: r/tifu\n\nTITLE: Help\n\nPOST: It broke.\n\nTL;DR:", " Broken.", " Help."),
    ),
    (
        "summarize_from_feedback",
        {**SUMMARIES, "info": NEWS, "choice": 1},
        pair("Article:\nIt rained.\n\nTL;DR:\n", " Help.", " Broken."),
    ),
    ("webgpt", WEBGPT, pair("Why is the sky blue?", "Rayleigh [1].", "Dust [1].", margin=1.0)),
    ("pandalm", PANDALM, pair("Shorten.\nVery long.", "Long.", "L")),
    ("alpaca_farm", ALPACA_FARM, pair("Hi", "b", "a")),
    ("alpaca_farm", {**ALPACA_FARM, "preference": 1.25}, pair("Hi", "a", "b")),
    ("helpsteer2_preference", HELPSTEER2, pair(dialogue("One?", "1\n", "Two?"), "2", "II", margin=2.0)),
    ("helpsteer3_preference", HELPSTEER3, pair(dialogue("One?", "1", "Two?"), "2", "II", margin=1.0)),
    ("prometheus_preference", PROMETHEUS, pair("Hi", "b", "a")),
    ("chatbot_arena", ARENA, pair(dialogue("Hi"), "b", "a")),
    (  # arena-human-preference-140k
        "chatbot_arena",
        {
            "winner": "model_a",
            "conversation_a": dialogue([{**TEXT_PART, "text": "Hi"}], [{**TEXT_PART, "text": "a"}]),
            "conversation_b": dialogue([{**TEXT_PART, "text": "Hi"}], [{**TEXT_PART, "text": "b"}]),
            "evaluation_order": 1,
        },
        pair(dialogue("Hi"), "a", "b"),
    ),
    (  # arena-human-preference-100k
        "chatbot_arena",
        {
            **ARENA,
            "conversation_a": json.dumps([{**each, "num_tokens": 3} for each in dialogue("Hi", "a")]),
            "conversation_b": json.dumps([{**each, "num_tokens": 4} for each in dialogue("Hi", "b")]),
        },
        pair(dialogue("Hi"), "b", "a"),
    ),
    (  # mt_bench_human_judgments: both turns are there, the first was judged
        "chatbot_arena",
        {
            **ARENA,
            "judge": "expert_0",
            "conversation_a": dialogue("Hi", "a", "More", "c"),
            "conversation_b": dialogue("Hi", "b", "More", "d"),
        },
        pair(dialogue("Hi"), "b", "a"),
    ),
    ("chatbot_arena_kaggle", KAGGLE, pair(dialogue("Hi"), "a/1", "b")),
    (
        "chatbot_arena_kaggle",
        {
            **KAGGLE,
            "prompt": "[draft] Hi",
            "response_a": "a",
            "winner_model_a": False,
            "winner_model_b": True,
        },
        pair(dialogue("[draft] Hi"), '["b"]', "a"),
    ),
]


@pytest.mark.parametrize(("name", "row", "canonical"), CASES)
def test_a_row_of_each_shape(tmp_path: Path, name: str, row: dict, canonical: dict) -> None:
    file = write(tmp_path / "a.jsonl", row)
    (loaded,), report = read_pairs(file)
    assert report.sources[0].format == name
    assert loaded == {**canonical, "source": f"{file}:1"}


def test_each_judgement_has_its_own_pair(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", SAFE)
    (better,), _ = read_pairs(file, judgement="better")
    (safer,), _ = read_pairs(file, judgement="safer")
    assert (better["chosen"], safer["chosen"]) == ("one", "zero")
    one = {name: value for name, value in SAFE.items() if name != "safer_response_id"}
    file = write(tmp_path / "b.jsonl", one)
    assert read_pairs(file)[0][0]["chosen"] == "one"
    assert error_of(file, judgement="safer").field == "safer_response_id"


TIES = [
    {**WEBGPT, "score_0": 0.0, "score_1": -0.0},
    {**PANDALM, "annotator1": 0, "annotator2": 1, "annotator3": 2},
    {**PANDALM, "annotator1": 0, "annotator2": 1, "annotator3": 0},
    {**ALPACA_FARM, "preference": 0},
    {**ALPACA_FARM, "preference": 1.5},
    {**HELPSTEER2, "preference_strength": 0},
    {**HELPSTEER3, "overall_preference": 0},
    *({**ARENA, "winner": winner} for winner in ("tie", "tie (bothbad)", "both_bad")),
    {**KAGGLE, "winner_model_a": 0, "winner_tie": 1},
]


@pytest.mark.parametrize("row", TIES)
def test_ties(tmp_path: Path, row: dict) -> None:
    file = write(tmp_path / "a.jsonl", row)
    assert "tie 1" in str(error_of(file))
    pairs, _ = read_pairs(file, ties="half")
    assert [pair["weight"] for pair in pairs] == [0.5, 0.5]
    assert pairs[0]["chosen"] == pairs[1]["rejected"] != pairs[0]["rejected"]
    assert all(pair.get("margin", 0) == 0 for pair in pairs)


@pytest.mark.parametrize(
    ("row", "chosen", "share"),
    [
        ({**PANDALM, "annotator2": 1}, "Long.", 1.0),
        (PANDALM, "Long.", 2 / 3),
        ({**PANDALM, "annotator1": 0}, "Long.", 0.5),
        ({**PANDALM, "annotator2": 0}, "Long.", 5 / 6),
        ({**PANDALM, "annotator1": 2, "annotator3": None}, "L", 1.0),
        ({**PANDALM, "annotator1": 2, "annotator4": 2}, "L", 3 / 4),
        ({**ALPACA_FARM, "preference": 1.75}, "b", 0.75),
    ],
)
def test_shares_of_votes(tmp_path: Path, row: dict, chosen: str, share: float) -> None:
    pairs, _ = read_pairs(write(tmp_path / "a.jsonl", row), votes="share", ties="half")
    weights = {pair["chosen"]: pair.get("weight", 1.0) for pair in pairs}
    assert weights[chosen] == pytest.approx(share)
    assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("row", "field", "found", "known"),
    [
        ({**SAFE, "better_response_id": True}, "better_response_id", "a boolean (true)", "0, 1"),
        ({**SAFE, "better_response_id": -1}, "better_response_id", "-1", "0, 1"),
        ({**SAFE, "better_response_id": None}, "better_response_id", "null", "0, 1"),
        ({**SHP, "labels": 2}, "labels", "2", "1, 0"),
        ({**SHP, "labels": 0.5}, "labels", "0.5", "1, 0"),
        ({**SUMMARIES, "choice": "first"}, "choice", "'first'", "0, 1"),
        ({**PANDALM, "annotator2": 3}, "annotator2", "3", "0, 1, 2"),
        ({**PANDALM, "annotator3": False}, "annotator3", "a boolean (false)", "0, 1, 2"),
        ({**ALPACA_FARM, "preference": 0.5}, "preference", "0.5", "1 (the first is better)"),
        ({**ALPACA_FARM, "preference": 3}, "preference", "3", "from 0 to 2"),
        ({**ALPACA_FARM, "preference": True}, "preference", "a boolean (true)", "a number"),
        ({**HELPSTEER2, "preference_strength": 4}, "preference_strength", "4", "from -3 to 3"),
        ({**HELPSTEER3, "overall_preference": "better"}, "overall_preference", "'better'", "a number"),
        ({**WEBGPT, "score_1": None}, "score_1", "null", "a number"),
        ({**PROMETHEUS, "orig_preference": "C"}, "orig_preference", "'C'", "'A', 'B'"),
        ({**ARENA, "winner": "chatglm-6b"}, "winner", "'chatglm-6b'", "'model_a', 'model_b', 'tie'"),
        ({**KAGGLE, "winner_tie": 1}, "winner_model_a", "2 of them are 1", "winner_tie"),
        ({**KAGGLE, "winner_tie": 2}, "winner_tie", "2", "Known values: 0, 1"),
        ({**KAGGLE, "winner_model_a": 0}, "winner_model_a", "0 of them are 1", "winner_tie"),
    ],
)
def test_odd_labels_are_refused_with_the_known_ones(
    tmp_path: Path, row: dict, field: str, found: str, known: str
) -> None:
    error = error_of(write(tmp_path / "a.jsonl", row), invalid="drop")
    assert (error.line, error.field) == (1, field)
    assert found in str(error)
    assert known in str(error)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**SAFE, "response_1": False}, "response_1"),
        ({**SHP, "history": 1}, "history"),
        ({**SHP, "score_A": "many"}, "score_A"),
        ({**SUMMARIES, "summaries": SUMMARIES["summaries"][:1]}, "summaries"),
        ({**SUMMARIES, "summaries": ["a", "b"]}, "summaries[0]"),
        ({**SUMMARIES, "summaries": [{"text": "a"}, {"text": 1}]}, "summaries[1].text"),
        ({**SUMMARIES, "info": {"post": "a", "title": None, "subreddit": "b"}}, "info.title"),
        ({**SUMMARIES, "info": "a"}, "info"),
        ({**WEBGPT, "question": "Why?"}, "question"),
        ({**WEBGPT, "question": {"full_text": None}}, "question.full_text"),
        ({**WEBGPT, "answer_1": None}, "answer_1"),
        ({**PANDALM, "instruction": None}, "instruction"),
        ({**HELPSTEER2, "prompt": "One?\n<extra_id_1>Assistant\n1"}, "prompt"),
        ({**HELPSTEER3, "context": [{"role": "user"}]}, "context[0].content"),
        ({**ARENA, "conversation_b": "not json"}, "conversation_b"),
        ({**ARENA, "conversation_b": {}}, "conversation_b"),
        ({**ARENA, "turn": 0}, "turn"),
        ({**KAGGLE, "response_b": '["b", "c"]'}, "response_b"),
        ({**KAGGLE, "response_b": "b"}, "response_b"),
        ({**KAGGLE, "response_b": "[1]"}, "response_b[0]"),
    ],
)
def test_bad_rows_are_named_by_what_stands_on_disk(tmp_path: Path, row: dict, field: str) -> None:
    error = error_of(write(tmp_path / "a.jsonl", row), invalid="drop")
    assert (error.line, error.field) == (1, field)


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        ({**SAFE, "response_1": "zero"}, "identical", "response_1"),
        ({**SHP, "human_ref_A": " "}, "empty_completion", "human_ref_A"),
        ({**PANDALM, "response2": True}, "reply_not_text", "response2"),
        ({**PANDALM, "response1": None}, "reply_not_text", "response1"),
        ({**ALPACA_FARM, "preference": None}, "nothing_to_compare", "preference"),
        ({**ARENA, "turn": 2, "conversation_a": dialogue("Hi", "a", "More", "c")}, "prompts_differ", None),
        (
            {**KAGGLE, "prompt": '["Hi", "More"]', "response_a": '["a", "c"]', "response_b": '["b", "d"]'},
            "prompts_differ",
            "response_b",
        ),
        ({**KAGGLE, "response_a": "[null]"}, "reply_not_text", "response_a[0]"),
        ({**KAGGLE, "prompt": "[null]"}, "empty_prompt", "prompt[0]"),
        ({**KAGGLE, "response_b": '["\\ud83d"]'}, "content_not_text", "response_b[0]"),
        (
            {**ARENA, "conversation_a": dialogue([{"type": "image", "image": "x.png"}], "a")},
            "content_not_text",
            "conversation_a[0].content[0]",
        ),
    ],
)
def test_unusable_rows_are_counted(tmp_path: Path, row: dict, kind: str, field: str | None) -> None:
    _, report = read_pairs(write(tmp_path / "a.jsonl", CASE_OF[frozenset(row)], row), invalid="drop")
    assert [problem.kind for problem in report.problems] == [kind]
    if field is not None:
        assert report.problems[0].field == field


CASE_OF = {frozenset(row): row for row in (SAFE, SHP, PANDALM, ALPACA_FARM, ARENA, KAGGLE)}


def test_labels_in_csv(tmp_path: Path) -> None:
    """Its cells are text: a number is read as one where a label belongs."""
    file = tmp_path / "a.csv"
    names = ",".join(KAGGLE)
    file.write_text(f'{names}\n1,x,y,"[""Hi""]","[""a""]","[""b""]",0,1,0\n')
    assert read_pairs(file)[0][0]["chosen"] == [said("assistant", "b")]
    file.write_text("prompt,response_0,response_1,better_response_id\nHi,a,b,1\n")
    assert read_pairs(file)[0][0]["chosen"] == "b"
    file.write_text("prompt,response_0,response_1,better_response_id\nHi,a,b,\n")
    assert error_of(file).field == "better_response_id"
