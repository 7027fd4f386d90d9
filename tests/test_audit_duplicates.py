"""Planted duplicates, contradictions and overlaps are found, all of them and nothing else."""

from __future__ import annotations

import random
import time
import tracemalloc
from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_rows import any_rows, example, findings, labelled, lines, of_file, pair, pairs, ranked
from hypothesis import given, settings

from dpo_kit.audit import duplicates
from dpo_kit.audit.duplicates import Duplicates
from dpo_kit.audit.faults import clipped
from dpo_kit.audit.findings import Example
from dpo_kit.audit.minhash import Compared, Signatures, likeness, near_groups, words_of
from dpo_kit.audit.preferences import on_cycles
from dpo_kit.pairs.kinds import PAIRS
from dpo_kit.pairs.statistics import Gatherer, PairStatistics

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [f"{a}{b}{c}" for a, b, c in product("bdfgklmnprst", "aeiou", "bdfgklmnprst")]


def words(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def random_pairs(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return pairs(*(tuple(" ".join(words(rng, rng.randint(2, 120))) for _ in range(3)) for _ in range(count)))


def triples(text: list[str]) -> set[tuple[str, ...]]:
    padded = [*text, "", ""]
    return {tuple(padded[i : i + 3]) for i in range(len(text))}


def test_random_texts_are_neither_equal_nor_near() -> None:
    check = Duplicates()
    assert findings(check, random_pairs(2000)) == {}
    assert check.result().figures["rows_per_prompt"] == {"1": 2000}


def test_equal_rows() -> None:
    rows = pairs(("p", "a", "b"), ("q", "a", "b"), ("p", "a", "b"), ("p", "a", "B"), ("p", "a", "b"))
    found = findings(Duplicates(), rows)
    assert lines(found["duplicate_rows"]) == [3, 5]
    assert found["duplicate_rows"].of == 5
    assert found["duplicate_rows"].examples[0]["beside"] == "rows.jsonl:1"
    # Equal but for case: near.
    assert lines(found["near_duplicate_rows"]) == [1, 4]


def test_planted_near_duplicates_are_found() -> None:
    rng = random.Random(1)
    rows = random_pairs(500, seed=2)
    near = []
    for i in range(80):
        texts = [words(rng, 100) for _ in range(3)]
        rows.append(pair(*map(" ".join, texts), len(rows) + 1))
        # One word of a hundred changed changes three triples of 97; thirty of them most.
        for text in texts:
            for place in rng.sample(range(5, 95), 1 if i % 2 else 30):
                text[place] = "something"
        rows.append(pair(*map(" ".join, texts), len(rows) + 1))
        if i % 2:
            near += [len(rows) - 1, len(rows)]
    found = findings(Duplicates(), rows)
    assert found.keys() == {"near_duplicate_rows", "near_duplicate_prompts"}
    assert lines(found["near_duplicate_rows"]) == lines(found["near_duplicate_prompts"]) == near
    assert "0.8" in found["near_duplicate_rows"].sentence
    assert [each["beside"] for each in found["near_duplicate_rows"].examples[:2]] == [
        f"rows.jsonl:{near[1]}",
        f"rows.jsonl:{near[0]}",
    ]


def test_the_estimate_is_near_the_jaccard_index() -> None:
    rng = random.Random(3)
    texts = []
    for changed in (0, 2, 5, 10, 20, 40):
        text = words(rng, 200)
        other = list(text)
        for place in rng.sample(range(200), changed):
            other[place] = "something"
        texts += [text, other]
    signatures = Signatures()
    for text in texts:
        signatures.add(words_of(" ".join(text)))
    even = np.arange(0, len(texts), 2)
    estimated = likeness(signatures.array(), even, even + 1)
    exact = [
        len(triples(a) & triples(b)) / len(triples(a) | triples(b))
        for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]
    assert np.abs(estimated - exact).max() < 4 * 0.5 / 8  # four standard errors of a share of 64


def test_things_are_grouped_however_long_the_chain() -> None:
    rng = random.Random(6)
    text, chain = words(rng, 100), []
    signatures = Signatures()
    for i in range(60):  # each one word away from the one before, the last from the first in all
        text = [*text]
        text[(37 * i) % 100] = f"new{i}"
        chain.append(text)
    order = rng.sample(range(60), 60)
    for i in order:
        signatures.add(words_of(" ".join(chain[i])))
    for _ in range(60):
        signatures.add(words_of(" ".join(words(rng, 100))))
    group = near_groups(Compared(signatures.array(), np.arange(120)))
    assert np.bincount(group[:60])[0] > 30  # near to the estimate's accuracy, most links are found
    assert (group[60:] == np.arange(60, 120)).all()
    assert (group[group] == group).all()


def test_many_alike_do_not_cost_the_square() -> None:
    signatures = Signatures()
    for _ in range(20_000):
        signatures.add([b"the", b"same"])
    started = time.process_time()
    assert (near_groups(Compared(signatures.array(), np.arange(20_000))) == 0).all()
    assert time.process_time() - started < 5  # all pairs of them would take minutes


def test_a_long_reply_does_not_hide_that_a_short_one_differs() -> None:
    long = " ".join(words(random.Random(7), 300))
    assert findings(Duplicates(), pairs((long, long, "Yes"), (long, long, "No"))).keys() == {"shared_prompts"}
    assert findings(Duplicates(), pairs((long, "Yes", long), (long, "No", long))).keys() == {"shared_prompts"}
    found = findings(Duplicates(), pairs((long, long, "Yes"), (long, "No", long), (long, long, "yes")))
    assert lines(found["near_duplicate_rows"]) == [1, 3]


def test_both_orders_whatever_case_and_space() -> None:
    rows = pairs(
        ("p", "a", "b"),
        ("q", "b", "a"),
        ("P ", "b", "A\n"),
        ("p", "a", "c"),
        ("p", "d", "e"),
        ("p", "e", "d"),
    )
    found = findings(Duplicates(), rows)
    assert found["both_orders"].severity == "error"
    assert lines(found["both_orders"]) == [1, 3, 5, 6]
    assert [each["beside"][-1] for each in found["both_orders"].examples] == ["3", "1", "6", "5"]
    assert "preference_cycles" not in found


def test_both_orders_made_of_one_row_are_meant() -> None:
    rows = [pair("p", "a", "b", 7), pair("p", "b", "a", 7), pair("q", "a", "b", 8)]
    assert "both_orders" not in findings(Duplicates(), rows)
    rows.append(pair("q", "b", "a", 9))
    assert lines(findings(Duplicates(), rows)["both_orders"]) == [8, 9]


def test_cycles_of_three_and_longer() -> None:
    rows = pairs(
        *(("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")),
        *(("q", "a", "b"), ("q", "b", "c"), ("q", "a", "c"), ("q", "c", "d")),
        *(("r", "1", "2"), ("r", "2", "3"), ("r", "3", "4"), ("r", "4", "1"), ("r", "4", "5")),
    )
    found = findings(Duplicates(), rows)
    assert lines(found["preference_cycles"]) == [1, 2, 3, 8, 9, 10, 11]
    assert found["preference_cycles"].severity == "error"
    assert "both_orders" not in found


def cycle_edges(edges: set[tuple[int, int]], nodes: int) -> set[tuple[int, int]]:
    """Edges on a cycle of three nodes or more, by trying all cycles."""
    on = set()
    for size in range(3, nodes + 1):
        for chosen in combinations(range(nodes), size):
            for order in permutations(chosen):
                around = set(zip(order, (*order[1:], order[0]), strict=True))
                if around <= edges:
                    on |= around
    return on


def test_a_cycle_is_said_to_be_there_exactly_where_there_is_one() -> None:
    rng = random.Random(4)
    for _ in range(300):
        edges = sorted({tuple(rng.sample(range(5), 2)) for _ in range(rng.randint(1, 9))})
        component = on_cycles(*np.array(edges).T)
        truth = cycle_edges(set(edges), 5)
        marked = {edge for edge, number in zip(edges, component, strict=True) if number >= 0}
        assert truth <= marked
        assert bool(truth) == bool(marked)


def test_lists_and_labels_contradict_too() -> None:
    rows = [ranked("p", ["a", "b", "c"], [3, 2, 1], 1), ranked("p", ["c", "a"], [5, 4], 2)]
    assert lines(findings(Duplicates(), rows)["preference_cycles"]) == [1, 2]
    good = [labelled("p", "a", True, 1), labelled("p", "b", False, 2), labelled("q", "a", False, 3)]
    assert "both_labels" not in findings(Duplicates(), good)
    found = findings(Duplicates(), [*good, labelled("p", "a", False, 4)])
    assert lines(found["both_labels"]) == [1, 4]


def test_both_labels_are_not_near_duplicates_too() -> None:
    text = " ".join(words(random.Random(8), 40))
    found = findings(Duplicates(), [labelled(text, text, True, 1), labelled(text, text, False, 2)])
    assert found.keys() == {"both_labels", "shared_prompts"}


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str) -> list[dict[str, Any]]:
    function = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return [message("assistant", "", tool_calls=[function])]


def test_what_a_model_would_read_belongs_to_a_row() -> None:
    said = ("A good answer", "Another answer")
    turns = [message("user", "Hi there"), message("assistant", "Hello"), message("user", "Bye")]
    rows = pairs(
        (turns, *said),
        ([message("user", "Hi thereHelloBye")], *said),
        ([message("system", "Be nice."), message("user", "Well?")], *said),
        ([message("user", "Be nice."), message("user", "Well?")], *said),
    )
    assert findings(Duplicates(), rows) == {}
    asked = [message("user", "What is the weather like?")]
    rows = pairs((asked, call("Paris"), call("Rome")), (asked, call("Oslo"), call("Bonn")))
    assert findings(Duplicates(), rows).keys() == {"shared_prompts"}
    again = findings(Duplicates(), pairs(*[(asked, call("Paris"), call("Rome"))] * 2))
    assert lines(again["duplicate_rows"]) == [2]
    turned = pairs((asked, call("Paris"), call("Rome")), (asked, call("Rome"), call("Paris")))
    assert lines(findings(Duplicates(), turned)["both_orders"]) == [1, 2]


def test_under_other_tools_rows_are_other_rows() -> None:
    row = {
        "prompt": [message("user", "What is it?")],
        "chosen": "A good answer",
        "rejected": "Another answer",
    }
    rows = [
        example(row | {"tools": f'[{{"name": "{name}"}}]'}, PAIRS, f"rows.jsonl:{line}")
        for line, name in enumerate("aba", 1)
    ]
    found = findings(Duplicates(), rows)
    assert {name: lines(each) for name, each in found.items()} == {
        "duplicate_rows": [3],
        "shared_prompts": [1, 3],
    }
    gatherer = Gatherer()
    for each in rows:
        gatherer.add(dict(each.row), PAIRS)
    statistics = gatherer.statistics(PAIRS)
    assert isinstance(statistics, PairStatistics)
    assert (statistics.duplicated_pairs, statistics.distinct_prompts) == (1, 2)


def test_duplicates_are_counted_as_the_statistics_count_them() -> None:
    asked = [message("user", "What is the weather like?")]
    rows = [*random_pairs(20), *random_pairs(20)[:5]]
    rows += pairs(*[(asked, call(city), call("Rome")) for city in ("Oslo", "Bonn", "Oslo")])
    gatherer = Gatherer()
    for row in (rows := [replace(row, place=f"rows.jsonl:{i}") for i, row in enumerate(rows)]):
        gatherer.add(dict(row.row), row.kind)
    statistics = gatherer.statistics(PAIRS)
    assert isinstance(statistics, PairStatistics)
    assert findings(Duplicates(), rows)["duplicate_rows"].count == statistics.duplicated_pairs == 6


def test_pairs_of_one_list_do_not_repeat_each_other() -> None:
    rng = random.Random(9)
    text = words(rng, 100)
    nearly = " ".join([*text[:-1], "something"])
    rows = [pair("p", " ".join(text), "A bad one", 4), pair("p", nearly, "A bad one", 4)]
    rows += [pair("q", "A good one", "A bad one", 5)] * 2
    found = findings(Duplicates(), rows)
    assert found.keys() == {"shared_prompts"}
    assert found["shared_prompts"].count == 4
    assert found["shared_prompts"].places == ("rows.jsonl:4", "rows.jsonl:5")
    found = findings(Duplicates(), [*rows, pair("p", nearly, "A bad one", 6)])
    assert lines(found["duplicate_rows"]) == [6]
    assert "near_duplicate_rows" in findings(Duplicates(), [rows[0], pair("p", nearly, "A bad one", 6)])


@pytest.mark.parametrize("form", ["system", "prefix", "template", "turn"])
def test_what_prompts_have_in_common_does_not_make_them_near(form: str) -> None:
    rng = random.Random(10)
    shared = " ".join(words(rng, 75 if form == "system" else 150))

    def prompt(question: str) -> Any:
        if form == "system":
            return [message("system", shared), message("user", question)]
        if form == "turn":
            return [message("user", f"{shared}\n\n{question}")]
        return f"{shared}\n\nQ: {question}\nA:" if form == "template" else f"{shared} {question}"

    questions = [" ".join(words(rng, rng.randint(8, 14))) for _ in range(100)]
    rows = [pair(prompt(q), f"yes {i}", f"no {i}", i + 1) for i, q in enumerate(questions[:70])]
    rows += [
        pair(prompt(q), f"yes {i}", f"no {i}", i + 1, held_out=True) for i, q in enumerate(questions[70:])
    ]
    assert findings(Duplicates(), rows) == {}
    # The same question with a word more is found all the same.
    same = pair(prompt(f"so, {questions[0]}"), "yes", "no", 99, held_out=True)
    assert lines(findings(Duplicates(), [*rows, same])["near_held_out_prompts"]) == [99]


def test_texts_of_later_rows_are_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "KEPT_TO_SHOW", 3)
    rows = random_pairs(30)
    late = replace(rows[20], place="rows.jsonl:31")
    held_out = [replace(row, held_out=True, place="other.jsonl:1") for row in (*random_pairs(9, 5), rows[25])]
    found = findings(Duplicates(), [*rows, late, *held_out])
    for name, row in (("duplicate_rows", late), ("held_out_rows", rows[25]), ("held_out_prompts", rows[25])):
        assert found[name].examples[0]["chosen"] == clipped(row.replies[0]), name


def test_rows_that_share_a_prompt() -> None:
    rows = pairs(*((prompt, f"a{i}", f"b{i}") for i, prompt in enumerate("ppp qqqqqq r".replace(" ", ""))))
    check = Duplicates()
    found = findings(check, rows)
    assert lines(found["shared_prompts"]) == list(range(1, 10))
    assert check.result().figures["rows_per_prompt"] == {"1": 1, "3": 1, "5-9": 1}


def test_overlap_of_training_and_held_out() -> None:
    rng = random.Random(5)
    long = words(rng, 100)
    nearly = " ".join([*long[:-1], "something"])
    training = [pair("one prompt", "a", "b", 1), pair(" ".join(long), "a", "b", 2), pair("x", "y", "z", 3)]
    held_out = [
        pair("another", "a", "b", 1, held_out=True),
        pair("One  prompt\n", "c", "d", 2, held_out=True),
        pair(nearly, "e", "f", 3, held_out=True),
        pair("x", "y", "z", 4, held_out=True),
        pair("another", "a", "b", 5, held_out=True),
    ]
    found = findings(Duplicates(), [*training, *held_out])
    assert {name: lines(each) for name, each in found.items()} == {
        "held_out_rows": [4],
        "held_out_prompts": [2, 4],
        "near_held_out_prompts": [3],
    }
    assert all(place.startswith("other.jsonl") for each in found.values() for place in each.places)
    assert found["held_out_prompts"].of == 5
    assert [each["beside"] for each in found["held_out_prompts"].examples] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert found["near_held_out_prompts"].examples[0]["beside"] == "rows.jsonl:2"


def test_no_text_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "KEPT_TO_SHOW", 0)
    check, text = duplicates.Duplicates(), "several words " * 100
    tracemalloc.start()
    for line in range(1000):
        check.add(pair(f"{line} {text}", text, f"{text} {line}", line))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 1000 < 1500  # of 4200 characters; the last ones' words wait to be hashed together


@settings(max_examples=150, deadline=None)
@given(any_rows())
def test_nothing_raises(rows: list[Example]) -> None:
    findings(Duplicates(), rows)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")
def test_real_dialogues() -> None:
    rows = of_file(DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz")
    found = findings(Duplicates(), rows)
    prompts = [" ".join(row.prompt.lower().split()) for row in rows]
    shared = [row.place for row, prompt in zip(rows, prompts, strict=True) if prompts.count(prompt) > 1]
    assert list(found["shared_prompts"].places) == shared
    assert len(shared) == 4
    # Dialogues with a long history in common end in other questions.
    assert found.keys() == {"shared_prompts"}
