"""Lists of judged replies: rows as the public sets have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_kit.pairs import read_pairs
from tests.pair_files import error_of, write

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def lists(file: Path, *rows: Any, **options: Any) -> list[dict[str, Any]]:
    return read_pairs(write(file, *rows), shape="lists", **options)[0]


def rated(response: str, overall: Any, fine: Any, ratings: str) -> dict[str, Any]:
    notes = {
        aspect: {"Rating": rating, "Rationale": "..."}
        for aspect, rating in zip(ASPECTS, ratings, strict=True)
    }
    return {
        "model": "m",
        "principle": "honesty",
        "response": response,
        "overall_score": overall,
        "fine-grained_score": fine,
        "annotations": notes,
        "critique": "...",
    }


ULTRAFEEDBACK = {
    "source": "flan_v2_niv2",
    "instruction": "Name a river.",
    "models": ["m", "m"],
    "completions": [rated("Rhine.", "7.5", 4.5, "5445"), rated("Paris.", 10, 1.25, "1121")],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}


@pytest.mark.parametrize(
    ("judgement", "scores"),
    [
        (None, [7.5, 10.0]),
        ("overall_score", [7.5, 10.0]),
        ("fine-grained_score", [4.5, 1.25]),
        ("instruction_following", [5.0, 1.0]),
        ("honesty", [4.0, 1.0]),
        ("truthfulness", [4.0, 2.0]),
        ("helpfulness", [5.0, 1.0]),
    ],
)
def test_ultrafeedback_by_each_judgement(file: Path, judgement: str | None, scores: list[float]) -> None:
    (row,) = lists(file, ULTRAFEEDBACK, judgement=judgement)
    assert (row["prompt"], row["completions"]) == ("Name a river.", ["Rhine.", "Paris."])
    assert row["scores"] == scores


def test_ultrafeedback_as_pairs(file: Path) -> None:
    ((pair,), report) = read_pairs(write(file, ULTRAFEEDBACK), judgement="fine-grained_score")
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("Rhine.", "Paris.", 3.25)
    assert report.sources[0].format == "ultrafeedback"


@pytest.mark.parametrize("nothing", [None, "N/A", float("nan"), ""])
def test_replies_that_were_not_judged_are_left_out_and_counted(file: Path, nothing: Any) -> None:
    extra = rated("Seine.", nothing, 2, "1111")
    row = {**ULTRAFEEDBACK, "completions": [*ULTRAFEEDBACK["completions"], extra]}
    made, report = read_pairs(write(file, row), shape="lists")
    assert made[0]["completions"] == ["Rhine.", "Paris."]
    assert [(p.kind, p.field) for p in report.problems] == [("unjudged", "completions[2].overall_score")]
    alone = {**ULTRAFEEDBACK, "completions": [rated("Rhine.", 1, 1, "1111"), extra]}
    _, report = read_pairs(write(file, ULTRAFEEDBACK, alone))
    assert report.counts == {"nothing_to_compare": 1}


def test_a_first_row_without_replies_is_of_the_shape_all_the_same(file: Path) -> None:
    pairs, report = read_pairs(write(file, {**ULTRAFEEDBACK, "completions": []}, ULTRAFEEDBACK))
    assert (len(pairs), report.sources[0].format) == (1, "ultrafeedback")
    assert report.counts == {"nothing_to_compare": 1}


@pytest.mark.parametrize("score", ["seven", "1e3", "0x7", "١", [7], True, "7,5"])
def test_scores_are_read_strictly(file: Path, score: Any) -> None:
    row = {**ULTRAFEEDBACK, "completions": [rated("a", score, 1, "1111"), rated("b", 1, 1, "1111")]}
    assert error_of(write(file, row)).field == "completions[0].overall_score"


def test_a_rating_that_is_not_there_is_named(file: Path) -> None:
    row = json.loads(json.dumps(ULTRAFEEDBACK))
    del row["completions"][1]["annotations"]["honesty"]["Rating"]
    error = error_of(write(file, row), judgement="honesty")
    assert error.field == "completions[1].annotations.honesty"
    assert error_of(write(file, ULTRAFEEDBACK), judgement="beauty").field == "judgement"


def helpsteer(prompt: str, response: str, *scores: Any) -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, scores, strict=True))}


HELPSTEER = [
    helpsteer("c#", "A language.", 3, 4, 4, 2, 1),
    helpsteer("Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nBye", "Bye!", 2, 2, 4, 1, 1),
    helpsteer("c#", "A note.", 1, 4, 4, 2, 0),
    helpsteer("Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nBye", "What?", 4, 1, 4, 1, 2),
]


def test_helpsteer_replies_meet_by_their_prompt(file: Path) -> None:
    one, two = read_pairs(write(file, *HELPSTEER))[0]
    assert one["prompt"] == [{"role": "user", "content": "c#"}]
    assert (one["chosen"][0]["content"], one["margin"]) == ("A language.", 2.0)
    assert [(turn["role"], turn["content"]) for turn in two["prompt"]] == [
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Bye"),
    ]
    assert (two["chosen"][0]["content"], two["rejected"][0]["content"]) == ("What?", "Bye!")
    (by_correctness,) = read_pairs(write(file, *HELPSTEER[1::2]), judgement="correctness")[0]
    assert by_correctness["chosen"][0]["content"] == "Bye!"


@pytest.mark.parametrize(
    "prompt", ["Hi<extra_id_1>User", "Hi\n<extra_id_1>User\nHo", "Hi\n<extra_id_1>Assistant\nHo"]
)
def test_helpsteer_turns_that_do_not_alternate(file: Path, prompt: str) -> None:
    assert error_of(write(file, helpsteer(prompt, "a", 1, 1, 1, 1, 1))).field == "prompt"


def test_nectar(file: Path) -> None:
    prompt = "\n\nHuman: Name a river.\n\nAssistant: "
    answers = [{"answer": f"{i}", "model": "m", "rank": float(rank)} for i, rank in enumerate((2, 1, 3))]
    row = {"prompt": prompt, "answers": answers, "turns": 1, "num_responses": 3, "source": ["x"]}
    pairs = read_pairs(write(file, row))[0]
    found = [(p["chosen"], p["rejected"], p["chosen_rank"], p["rejected_rank"]) for p in pairs]
    assert found == [("1", "0", 1, 2), ("1", "2", 1, 3), ("0", "2", 2, 3)]
    assert {pair["prompt"] for pair in pairs} == {prompt}
    assert "margin" not in pairs[0]


@pytest.mark.parametrize("rank", [0, 1.5, "1", None, True, float("inf")])
def test_ranks_are_read_strictly(file: Path, rank: Any) -> None:
    answers = [{"answer": "a", "rank": 1}, {"answer": "b", "rank": rank}]
    assert error_of(write(file, {"prompt": "p", "answers": answers})).field == "answers[1].rank"


def test_nemo_counts_ranks_from_nought(file: Path) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("worse", "better")]
    row = {
        "context": [{"role": "user", "content": "Hi"}],
        "completions": [{"rank": 1, "completion": said[0]}, {"rank": 0, "completion": said[1]}],
    }
    (pair,) = read_pairs(write(file, row))[0]
    assert (pair["chosen"], pair["rejected"]) == (said[1], said[0])
    assert (pair["chosen_rank"], pair["rejected_rank"]) == (1, 2)
    row["completions"][0]["rank"] = -1
    assert error_of(write(file, row)).field == "completions[0].rank"


def test_lists_of_chosen_and_rejected_texts(file: Path) -> None:
    row = {"id": "1", "prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"], "num_correct": 2}
    pairs, report = read_pairs(write(file, row))
    found = [(p["chosen"], p["rejected"], p["chosen_rank"], p["rejected_rank"]) for p in pairs]
    assert found == [(good, bad, 1, 2) for good in "ab" for bad in "cd"]
    assert (report.sources[0].format, report.counts) == ("several_chosen", {"tie": 2})
    assert "margin" not in pairs[0]
    assert error_of(write(file, {**row, "chosen": ["a", None]})).field == "chosen[1]"
    assert error_of(write(file, row, {**row, "chosen": "a"})).field == "chosen"


@pytest.mark.parametrize("reply", ["response", "completion"])
def test_one_scored_reply_a_row(tmp_path: Path, reply: str) -> None:
    rows = [{"prompt": "p", reply: "a", "score": 0.5}, {"prompt": "p", reply: "b", "score": 2}]
    csv = tmp_path / "rows.csv"
    csv.write_text(f"prompt,{reply},score\np,a,0.5\np,b,2\n")
    for source in (write(tmp_path / "rows.jsonl", *rows), csv):
        (pair,), report = read_pairs(source)
        assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("b", "a", 1.5)
        assert report.sources[0].format == f"scored_{reply}"
    _, report = read_pairs(write(tmp_path / "rows.jsonl", *rows, {**rows[0], "score": None}))
    assert report.counts == {"unjudged": 1}
    assert error_of(write(tmp_path / "rows.jsonl", {**rows[0], "score": "good"})).field == "score"


def test_numbers_of_csv_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("history,human_ref_A,human_ref_B,labels,score_A,score_B\np,a,b,0,4,10\n")
    (pair,) = read_pairs(file)[0]
    assert (pair["chosen"], pair["margin"]) == ("b", 6.0)
    names = ",".join(HELPSTEER[0])
    file.write_text(f"{names}\np,a,3,4,4,2,1\np,b,4,4,4,2,1\n")
    (pair,) = read_pairs(file)[0]
    assert (pair["chosen"][0]["content"], pair["margin"]) == ("b", 1.0)
    file.write_text(
        "instruction,chosen_response,rejected_response,chosen_rating,rejected_rating\np,a,b,4.5,N/A\n"
    )
    (pair,) = read_pairs(file)[0]
    assert (pair["chosen"], "margin" in pair) == ("a", False)
    file.write_text("prompt,response,is_safe\np,a,True\n")
    assert [row["label"] for row in read_pairs(file)[0]] == [True]
    file.write_text("prompt,response,score\np,a,1e3\n")
    assert error_of(file).field == "score"


def test_stack_exchange_preferences(file: Path) -> None:
    answers = [{"answer_id": i, "pm_score": score, "text": f"<p>{i}</p>"} for i, score in enumerate((1, 4))]
    (pair,) = read_pairs(write(file, {"qid": 1, "question": "<p>Why?</p>", "answers": answers}))[0]
    assert (pair["chosen"], pair["margin"]) == ("<p>1</p>", 3.0)


def test_scored_texts_of_lmflow(file: Path) -> None:
    row = {"input": "Who?", "output": [{"score": -0.8, "text": "I."}, {"score": 1.0, "text": "John."}]}
    (pair,) = read_pairs(write(file, row))[0]
    assert (pair["prompt"], pair["chosen"], pair["margin"]) == ("Who?", "John.", 1.8)


def test_comparison_of_old_llama_factory(file: Path) -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": ["2", "3"]}
    (pair,) = read_pairs(write(file, row))[0]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Add.\n1 + 1", "2", "3")
    error = error_of(write(file, {**row, "output": ["2", "3", "4"]}), format="comparison")
    assert (error.field, "a list of 3" in str(error)) == ("output", True)


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ({"instruction": "p", "generations": ["a", "b"], "ratings": [4, 5], "rationales": ["", ""]}, [4, 5]),
        ({"query": "p", "responses": ["a", "b"], "scores": [0.5, -1]}, [0.5, -1]),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": ["1.5", "2"]}, [1.5, 2]),
        ({"question": "p", "answers": ["a", "b"], "rank": [2, 1]}, [-2, -1]),
    ],
)
def test_lists_side_by_side_under_many_names(file: Path, row: dict[str, Any], scores: list[float]) -> None:
    (made,) = lists(file, row)
    assert (made["prompt"], made["completions"], made["scores"]) == ("p", ["a", "b"], scores)


def test_lists_side_by_side_behind_a_system_text(file: Path) -> None:
    row = {"system_prompt": "s", "instruction": "p", "generations": ["a", "b"], "ratings": [1, 5]}
    (pair,) = read_pairs(write(file, row))[0]
    assert [(turn["role"], turn["content"]) for turn in pair["prompt"]] == [("system", "s"), ("user", "p")]
    assert (pair["chosen"], pair["margin"]) == ([{"role": "assistant", "content": "b"}], 4.0)


def test_lists_side_by_side_that_are_unclear(file: Path) -> None:
    row = {"query": "p", "responses": ["a", "b"], "scores": [1, 2], "ratings": [2, 1]}
    assert "scores or ranks in one column, not in 'scores' and 'ratings'" in str(error_of(write(file, row)))
    short = {"query": "p", "responses": ["a", "b", "c"], "scores": [1, 2]}
    assert error_of(write(file, short)).field == "scores"
