"""What is made of lists, votes, ties, margins and weights: numbers worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_kit.errors import InputError
from dpo_kit.pairs import LoadOptions, read_pairs
from tests.pair_files import error_of, write

# In the order of the file; b and d are tied.
SCORED = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1.0, 5.0, 2.5, 5.0]}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1, 2]}
VOTES = {"prompt": "p", "first": "a", "second": "b"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def made(file: Path, *rows: Any, **options: Any) -> list[tuple[Any, ...]]:
    """chosen, rejected, margin, weight of each pair."""
    pairs = read_pairs(write(file, *rows), **options)[0]
    return [tuple(pair.get(name) for name in ("chosen", "rejected", "margin", "weight")) for pair in pairs]


def counts(file: Path, *rows: Any, **options: Any) -> dict[str, int]:
    return read_pairs(write(file, *rows), **options)[1].counts


def voted(file: Path, share: float, **options: Any) -> list[tuple[Any, ...]]:
    mapping = {"prompt": "prompt", "first": "first", "second": "second", "preference": "share"}
    rows = [{**VOTES, "share": share}, {**VOTES, "prompt": "other", "share": 1}]
    pairs = read_pairs(write(file, *rows), mapping=mapping, **options)[0]
    return [(row["chosen"], row["rejected"], row.get("weight")) for row in pairs if row["prompt"] == "p"]


def test_all_pairs_of_a_list(file: Path) -> None:
    assert made(file, SCORED) == [
        ("b", "c", 2.5, None),
        ("b", "a", 4.0, None),
        ("d", "c", 2.5, None),
        ("d", "a", 4.0, None),
        ("c", "a", 1.5, None),
    ]
    assert counts(file, SCORED) == {"tie": 1}


def test_all_pairs_with_ties_as_halves(file: Path) -> None:
    pairs = made(file, SCORED, ties="half")
    assert len(pairs) == 7
    assert pairs[:2] == [("b", "d", 0.0, 0.5), ("d", "b", 0.0, 0.5)]
    assert str(pairs[1][2]) == "0.0"
    assert counts(file, SCORED, ties="half") == {}


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ("best_worst", [("b", "a", 4.0, None)]),
        ("adjacent", [("d", "c", 2.5, None), ("c", "a", 1.5, None)]),
    ],
)
def test_fewer_pairs_of_a_list(file: Path, pairs: str, found: list[tuple[Any, ...]]) -> None:
    assert made(file, SCORED, pairs=pairs) == found


def test_adjacent_pairs_count_the_tie(file: Path) -> None:
    assert counts(file, SCORED, pairs="adjacent") == {"tie": 1}
    assert made(file, SCORED, pairs="adjacent", ties="half")[:2] == [
        ("b", "d", 0.0, 0.5),
        ("d", "b", 0.0, 0.5),
    ]


def test_random_pairs(file: Path) -> None:
    every = made(file, SCORED)
    drawn = [made(file, SCORED, pairs="random:2", seed=seed) for seed in range(40)]
    assert all(len(set(pairs)) == 2 and set(pairs) <= set(every) for pairs in drawn)
    assert {pair for pairs in drawn for pair in pairs} == set(every)
    again = made(file, {**RANKED, "prompt": "before"}, SCORED, pairs="random:2", seed=7)
    assert again[-2:] == drawn[7]
    assert made(file, SCORED, pairs="random:99") == every
    assert len(made(file, SCORED, pairs="random:99", ties="half")) == 7


def test_ranks_are_kept_and_make_no_margin(file: Path) -> None:
    pairs = read_pairs(write(file, RANKED))[0]
    found = [(p["chosen"], p["rejected"], p["chosen_rank"], p["rejected_rank"]) for p in pairs]
    assert found == [("b", "c", 1, 2), ("b", "a", 1, 3), ("c", "a", 2, 3)]
    assert not any("margin" in pair for pair in pairs)
    tied = {**RANKED, "ranks": [2, 1, 1]}
    half = read_pairs(write(file, tied), ties="half")[0][:2]
    assert [(p["chosen"], p["chosen_rank"], p["rejected_rank"], p["weight"]) for p in half] == [
        ("b", 1, 1, 0.5),
        ("c", 1, 1, 0.5),
    ]


def test_the_pairs_of_a_list_have_one_prompt_id_and_another_list_another(file: Path) -> None:
    other = {**RANKED, "prompt": "q"}
    own = {**RANKED, "prompt": "r", "prompt_id": "mine"}
    pairs = read_pairs(write(file, SCORED, other, own))[0]
    ids = {prompt: {p["prompt_id"] for p in pairs if p["prompt"] == prompt} for prompt in "pqr"}
    assert [len(each) for each in ids.values()] == [1, 1, 1]
    assert ids["p"] != ids["q"]
    assert ids["r"] == {"mine"}


def test_min_margin_by_score_and_by_rank(file: Path) -> None:
    assert [pair[:2] for pair in made(file, SCORED, min_margin=2.5)] == [
        ("b", "c"),
        ("b", "a"),
        ("d", "c"),
        ("d", "a"),
    ]
    assert counts(file, SCORED, min_margin=2.5) == {"tie": 1, "below_min_margin": 1}
    assert [pair[:2] for pair in made(file, RANKED, min_margin=2)] == [("b", "a")]


def test_min_margin_by_votes(file: Path) -> None:
    assert voted(file, 0.75, min_margin=0.5) == [("a", "b", None)]  # 0.75 - 0.25
    assert voted(file, 0.7, min_margin=0.5) == []


def test_votes_by_majority_and_by_share(file: Path) -> None:
    assert voted(file, 0.75) == [("a", "b", None)]
    assert voted(file, 0.25) == [("b", "a", None)]
    assert voted(file, 0.75, votes="share") == [("a", "b", 0.75), ("b", "a", 0.25)]
    assert voted(file, 0.25, votes="share") == [("b", "a", 0.75), ("a", "b", 0.25)]
    assert voted(file, 1, votes="share") == [("a", "b", None)]
    assert voted(file, 0.5, votes="share") == []
    assert voted(file, 0.5, ties="half") == [("a", "b", 0.5), ("b", "a", 0.5)]


def test_weights_by_agreement(file: Path) -> None:
    assert voted(file, 0.75, weights="agreement") == [("a", "b", 0.5)]
    assert voted(file, 1, weights="agreement") == [("a", "b", None)]
    assert voted(file, 0.75, weights="agreement", votes="share") == [("a", "b", 0.375), ("b", "a", 0.125)]


def test_weights_by_margin_multiply_what_is_given(file: Path) -> None:
    weights = [pair[3] for pair in made(file, {**SCORED, "weight": 2}, weights="margin")]
    assert weights == [5.0, 8.0, 5.0, 8.0, 3.0]
    assert [pair[3] for pair in made(file, RANKED, weights="margin")] == [None, 2.0, None]
    half = made(file, {**SCORED, "weight": 3}, ties="half")
    assert [pair[3] for pair in half] == [1.5, 1.5, 3.0, 3.0, 3.0, 3.0, 3.0]


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_margins_of_plain_pairs(file: Path) -> None:
    scores = {**PAIR, "score_chosen": 4, "score_rejected": 1.5}
    assert made(file, scores, weights="margin") == [("a", "b", 2.5, 2.5)]
    assert made(file, {**scores, "margin": 1}, weights="margin") == [("a", "b", 1.0, None)]
    assert made(file, {**PAIR, "margin": -1}) == [("a", "b", -1.0, None)]
    assert counts(file, PAIR | {"margin": 1}, PAIR | {"margin": -1}, min_margin=0) == {"below_min_margin": 1}


def test_a_margin_below_nought_is_no_weight(file: Path) -> None:
    error = error_of(write(file, PAIR | {"margin": 1}, PAIR | {"margin": -0.5}), weights="margin")
    assert (error.line, error.field) == (2, "margin")
    assert "the margin is -0.5, and a weight must not be below 0" in str(error)
    rows = [PAIR | {"margin": 2}, PAIR | {"margin": -0.5}]
    assert made(file, *rows, weights="margin", min_margin=0) == [("a", "b", 2.0, 2.0)]


@pytest.mark.parametrize("options", [{"min_margin": 1}, {"weights": "margin"}, {"weights": "agreement"}])
def test_options_that_ask_for_what_plain_pairs_have_not(file: Path, options: dict[str, Any]) -> None:
    error = error_of(write(file, PAIR), **options)
    assert (error.line, error.field) == (1, "weights" if "agreement" in options.values() else "margin")


def test_lists_as_they_are(file: Path) -> None:
    all_tied = {**SCORED, "scores": [1, 1, 1, 1]}
    rows, report = read_pairs(write(file, SCORED, RANKED, all_tied), shape="lists")
    assert [row["scores"] for row in rows] == [[1.0, 5.0, 2.5, 5.0], [-3.0, -1.0, -2.0]]
    assert report.counts == {"all_tied": 1}


def test_equal_replies_of_a_list_make_no_pair(file: Path) -> None:
    row = {"prompt": "p", "completions": ["a", "a", "b"], "scores": [3, 2, 1]}
    assert [pair[:2] for pair in made(file, row)] == [("a", "b"), ("a", "b")]
    assert counts(file, row) == {"same_reply_in_list": 1}


def test_labelled_replies_become_pairs_where_prompts_repeat(file: Path) -> None:
    rows = [
        {"prompt": prompt, "completion": reply, "label": label}
        for prompt, reply, label in (
            ("p", "good", True),
            ("q", "alone", True),
            ("p", "bad", False),
            ("r", "one", False),
            ("p", "fine", True),
            ("r", "two", False),
        )
    ]
    pairs, report = read_pairs(write(file, *rows), shape="pairs")
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("good", "bad", 1.0),
        ("fine", "bad", 1.0),
    ]
    assert {p["source"] for p in pairs} == {f"{file}:1"}
    assert (report.read, report.kept, report.made) == (6, 3, 2)
    assert report.counts == {"tie": 2, "nothing_to_compare": 1}
    assert len(read_pairs(file)[0]) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ties": "halves"}, "Did you mean 'half'?"),
        ({"pairs": "best-worst"}, "Did you mean 'best_worst'?"),
        ({"pairs": "random:0"}, "Did you mean 'random:k'?"),
        ({"votes": "shares"}, "Did you mean 'share'?"),
        ({"weights": "margins"}, "Did you mean 'margin'?"),
        ({"shape": "list"}, "Did you mean 'lists'?"),
        ({"min_margins": 1}, "Did you mean 'min_margin'?"),
        ({"min_margin": "1"}, "expected a number"),
        ({"min_margin": float("nan")}, "expected a number"),
        ({"seed": 1.5}, "expected a whole number"),
        ({"ties": ["half"]}, "unknown ties"),
    ],
)
def test_options_that_are_not_known(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        LoadOptions.of(**options)
    assert words in str(caught.value)
    assert caught.value.field in {*options, "option"}
