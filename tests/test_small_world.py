"""The small world of data/: the files are what the script makes, and have the properties it promises."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
WORLD = DATA / "small_world"


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(DATA))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DATA))


reward = _module("reward").reward
world = _module("make_small_world")


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (WORLD / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return (WORLD / "corpus.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return _rows("train.jsonl")


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, Any]]:
    return _rows("heldout.jsonl")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [row["prompt"] for row in _rows("prompts.jsonl")]


@pytest.fixture(scope="module")
def grammar() -> Any:
    return world.Grammar((DATA / "small_world_grammar.txt").read_text(encoding="utf-8"))


# With u the sum over a clause's words: c = 3 tanh(u/3), M = sum(w c) / (2 + sum(w)), R = 4 tanh(5 M / 4).
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("It runs for ninety minutes, and zxqv was in it.", 0.0),
        ("The film is great.", 2.4885),  # u 2, c 1.7483, M 0.5828
        ("the FILM is great", 2.4885),
        ("The film is very great.", 2.9627),  # u 3, c 2.2848, M 0.7616
        ("The film is slightly great.", 1.7687),  # u 1.2, c 1.1398, M 0.3799
        ("The film is awful.", -2.9627),  # u -3
        ("The film is not awful.", 2.3434),  # u 1.8, c 1.6111, M 0.5370
        ("The film isn\u2019t awful.", 2.3434),
        ("It is never great.", -1.7687),  # u -1.2
        ("It is not without charm.", 0.5927),  # u 0.36, c 0.3583, M 0.1194
        ("It is not awful and great.", 3.1520),  # "and" ends the scope: u 3.8, c 2.5587, M 0.8529
        ("It is not awful or bad.", 2.9627),  # "or" does not: u 3
        ("It is never awful, always bad.", -0.1714),  # nor a comma's other side: c 1.6111 - 1.7483, M -0.0343
        ("Although it is great, it is awful.", -1.8604),  # c 1.7483 at 1/2, -2.2848 at 1: M -0.4030
        ("It is awful although it is great.", -1.8604),
        ("It is great, but it is awful.", -1.8604),
        ("It is great. It is awful.", -0.6643),  # no concession: M -0.1341
    ],
)
def test_reward_on_hand_worked_texts(text: str, expected: float) -> None:
    assert reward(text) == pytest.approx(expected, abs=5e-5)


def test_repeating_a_text_or_its_words_gains_nothing() -> None:
    assert reward("great great great great") == reward("great")
    assert reward("great. great, great! " * 9) == reward("great")
    review = "The plot is gripping, but the music is never subtle. I loved it."
    assert reward(f"{review} {review}") == reward(review)


def test_reward_is_bounded_and_takes_any_text(grammar: Any) -> None:
    every_word = " ".join(
        "".join(parts[::2]) for rule in grammar.rules.values() for parts in rule.alternatives
    )
    for text in (every_word, ". ".join(every_word.split()), "not not but, but; (", "\n\t\0 ÿ 漢字 but"):
        assert -4.0 < reward(text) < 4.0


def test_polar_words_carry_the_sign_of_their_list_and_all_others_none(grammar: Any) -> None:
    for name, rule in grammar.rules.items():
        for parts in rule.alternatives:
            if name[-1] not in "+-":
                assert all(reward(words) == 0.0 for words in parts[::2]), (name, parts)
            elif len(parts) == 1:
                assert reward(parts[0]) * (1 if name[-1] == "+" else -1) > 0, (name, parts)


@pytest.mark.slow
def test_the_script_makes_the_shipped_files(tmp_path: Path) -> None:
    command = [sys.executable, str(DATA / "make_small_world.py"), "--out", str(tmp_path / "again")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert made == {path.name: path.read_bytes() for path in WORLD.iterdir()}


def test_sizes(corpus: list[str], train: list[dict], heldout: list[dict], prompts: list[str]) -> None:
    assert (len(corpus), len(train), len(heldout), len(prompts)) == (10_000, 8_000, 500, 200)
    assert len(set(corpus)) == 10_000
    assert len(set(prompts)) == 200
    assert (WORLD / "corpus.txt").stat().st_size <= 3_000_000
    for shown in ([row["prompt"] for row in train], [row["prompt"] for row in heldout], prompts):
        lengths = [len(prompt.split(" ")) for prompt in shown]
        shares = [lengths.count(n) / len(lengths) for n in range(2, 9)]
        assert sum(shares) == pytest.approx(1.0)
        assert max(shares) - min(shares) < 0.01


def test_nothing_held_out_is_trained_on(
    corpus: list[str], train: list[dict], heldout: list[dict], prompts: list[str]
) -> None:
    trained_prompts = {row["prompt"] for row in train}
    assert not trained_prompts & {row["prompt"] for row in heldout}
    assert not trained_prompts & set(prompts)
    trained, kept = (
        [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
        for rows in (train, heldout)
    )
    assert len(set(trained + kept)) == len(trained + kept)
    assert not set(corpus) & set(trained + kept)


def test_labels_follow_bradley_terry(train: list[dict], heldout: list[dict]) -> None:
    for rows in (train, heldout):
        for row in rows:
            margin = reward(row["prompt"] + row["chosen"]) - reward(row["prompt"] + row["rejected"])
            assert row["margin"] == pytest.approx(margin, abs=5e-5)
        right = [1.0 / (1.0 + math.exp(-abs(row["margin"]))) for row in rows]
        standard_error = math.sqrt(sum(p * (1.0 - p) for p in right)) / len(rows)
        agreeing = statistics.mean(row["margin"] > 0 for row in rows)
        assert abs(agreeing - statistics.mean(right)) < 3.0 * standard_error
        assert 0.03 < 1.0 - statistics.mean(right) < 0.10


def test_prompts_are_mostly_neutral(train: list[dict], heldout: list[dict], prompts: list[str]) -> None:
    shown = [row["prompt"] for row in train + heldout] + prompts
    assert statistics.mean(reward(prompt) == 0.0 for prompt in shown) > 0.95


def test_the_longer_reply_is_not_the_better_one(corpus: list[str], train: list[dict]) -> None:
    lengths = [len(text.split()) for text in corpus]
    assert abs(statistics.correlation(lengths, [reward(text) for text in corpus])) < 0.1
    longer = [
        len(row["chosen"]) > len(row["rejected"])
        for row in train
        if len(row["chosen"]) != len(row["rejected"])
    ]
    assert 0.45 < statistics.mean(longer) < 0.55


def test_reward_tells_the_latent_positivity(grammar: Any) -> None:
    rng = random.Random(1)
    texts, positivity = zip(*(grammar.review(rng) for _ in range(2_000)), strict=True)
    rewards = [reward(text) for text in texts]
    assert statistics.correlation(rewards, positivity) > 0.7
    assert abs(statistics.mean(rewards)) < 0.3
    for low, high in ((-4, -2), (-1, 1), (2, 4)):
        assert statistics.mean(low <= r <= high for r in rewards) > 0.08


def test_the_language_is_rich_and_clean(corpus: list[str]) -> None:
    text = "\n".join(corpus)
    assert len(set(re.findall(r"[a-z][a-z'-]*", text.lower()))) > 800
    negated = r"\b(?:not|never|no|hardly|rarely|seldom|without|nothing|lacks|little|less)\b"
    conceding = r"\b(?:although|but|yet|despite|even though|even if|while|for all its)\b"
    assert sum(bool(re.search(negated, review.lower())) for review in corpus) > 2_000
    assert sum(bool(re.search(conceding, review.lower())) for review in corpus) > 2_000
    assert not re.search(r"\d", text)
    assert not re.findall(r"  | [.,;]|[{}|]|\.\.|[.] [a-z]|^[a-z]| $", text, flags=re.MULTILINE)
    assert not re.findall(r"\b[Aa] (?:[aei]|o(?!ne)|u(?!ni|se)|honest|hour)\w*", text)
    assert not re.findall(r"\b[Aa]n (?!honest|hour)[^aeiou]\w*", text)
    assert all(18 <= len(review.split()) <= 45 and 2 <= review.count(".") <= 5 for review in corpus)
