"""Faults planted in replies and turns are found, with their places and sides; clean data has none."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from audit_rows import any_rows, findings, labelled, lines, of_file, pairs, ranked
from hypothesis import given, settings

from dpo_kit.audit.findings import Example
from dpo_kit.audit.replies import Replies

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"

GOOD = ("What is the tallest mountain?", "The tallest one is Mount Everest.", "It is K2, as far as I know.")


def test_clean_data_gives_nothing() -> None:
    assert findings(Replies(), pairs(*[GOOD] * 50)) == {}


def test_a_reply_that_is_the_start_of_the_other() -> None:
    rows = pairs(
        GOOD,
        ("p", "A whole answer", "A whole answer that goes on"),
        ("p", " A whole answer that goes on\n", "A whole answer "),
        ("p", "a whole answer", "A whole answer that goes on"),
    )
    found = findings(Replies(), rows)["prefix_replies"]
    assert lines(found) == [2, 3]
    assert (found.severity, found.of) == ("error", 4)
    assert "chosen 1, rejected 1" in found.sentence
    assert found.examples[0]["what"] == "chosen is the start of rejected"
    assert found.advice


def test_replies_with_the_same_letters() -> None:
    rows = pairs(
        ("p", "You are welcome!", "You’re welcome!"),
        ("p", "You are welcome!", "you are  welcome"),
        ("p", "You are welcome! " * 20, "You are welcome! " * 19),
        ("p", "!!!!!!!!!!", "??????????"),
    )
    assert lines(findings(Replies(), rows)["same_letters"]) == [2]


@pytest.mark.parametrize(
    "marker",
    ["\n\nHuman: And", "\nUser: And", "<|im_start|>user", "\n### Instruction:", "<|eot_id|>", "[/INST]"],
)
def test_markers_of_turns_in_a_reply(marker: str) -> None:
    rows = pairs(*[GOOD] * 20, ("p", "It is K2, as far as I know." + marker, "A plain answer, too."))
    found = findings(Replies(), rows)["role_markers"]
    assert lines(found) == [21]
    assert found.severity == "error"  # one in 21 chosen replies is a noticeable share
    assert found.examples[0]["what"].endswith(" in chosen")
    turned = pairs(*[GOOD] * 20, ("p", "A plain answer, too.", "It is K2, as far as I know." + marker))
    assert findings(Replies(), turned)["role_markers"].severity == "note"


def test_speech_about_users_is_no_marker() -> None:
    rows = pairs(("p", "The User: a short history of it.", "A [list] of <b> and humans: one, two."))
    assert "role_markers" not in findings(Replies(), rows)
    assert "role_markers" in findings(Replies(), pairs(("p", "User: and what then, then?", GOOD[1])))


def test_short_replies_and_repeated_questions() -> None:
    question = "How many legs does a spider have, and why is that so?"
    rows = pairs(
        (question, "Eight", "A spider has eight legs."),
        (question, f"{question} Eight of them.", "A spider has eight legs."),
        ("你好吗", "我很好，谢谢", "好"),
    )
    found = findings(Replies(), rows)
    assert lines(found["very_short_replies"]) == [1, 3]
    assert lines(found["prompt_repeated"]) == [2]


def test_white_space_at_the_ends_where_not_all_have_it() -> None:
    assert findings(Replies(), pairs(*[("p", " A good answer", " Another answer")] * 30)) == {}
    rows = pairs(*[("p", "A good answer\n", "Another answer")] * 30)
    found = findings(Replies(), rows)
    assert found.keys() == {"white_space_at_end"}
    assert (found["white_space_at_end"].severity, found["white_space_at_end"].count) == ("warning", 30)
    few = findings(Replies(), [*pairs(*[GOOD] * 9), *pairs(("p", " A good answer", "Another answer"))])
    assert few["white_space_at_start"].severity == "note"


def test_openings_that_go_with_the_label() -> None:
    refusal = "I'm sorry, but I cannot help with that request."
    rows = [*pairs(*[GOOD] * 60), *pairs(*[("How?", "You do it with a hammer.", refusal)] * 40)]
    check = Replies()
    found = findings(check, rows)
    assert found["opening_refusal_or_apology"].severity == "warning"
    assert "40.0%" in found["opening_refusal_or_apology"].sentence
    assert check.result().figures["openings"]["refusal or apology"] == {"chosen": 0.0, "rejected": 0.4}


def test_turns_of_messages_and_dialogues() -> None:
    def turns(*roles: str) -> list[dict[str, str]]:
        return [{"role": role.strip("-"), "content": "" if role[0] == "-" else "text"} for role in roles]

    answer = ("A good answer", "Another answer")
    rows = pairs(
        (turns("system", "user", "assistant", "user"), *answer),
        (turns("user", "user"), *answer),
        (turns("user", "assistant"), *answer),
        (turns("-system", "user"), *answer),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", *answer),
        ("\n\nHuman: a\n\nHuman: c\n\nAssistant:", *answer),
        ("\n\nHuman: a\n\nAssistant: b", *answer),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: c\n\nAssistant:", *answer),
    )
    found = findings(Replies(), rows)
    assert {name: lines(each) for name, each in found.items()} == {
        "consecutive_turns": [2, 6],
        "prompt_ends_with_assistant": [3, 7],
        "empty_turns": [4, 8],
    }
    assert {each.severity for each in found.values()} == {"warning"}


def test_labelled_replies_and_lists() -> None:
    rows = [labelled("p", "Human: and then?", True, 1), labelled("p", "Human: and then?", False, 2)]
    assert "desirable 1, undesirable 1" in findings(Replies(), rows)["role_markers"].sentence
    listed = [ranked("p", ["Abc and so on", "Abc and so on and on", "Another answer"], [1, 2, 0])]
    found = findings(Replies(), listed)["prefix_replies"]
    assert found.examples[0]["what"] == "completion 1 is the start of completion 2"
    assert "other 1" in found.sentence


def test_what_is_shown_is_cut() -> None:
    rows = pairs(("p" * 5000, "x" * 5000 + "<|im_start|>" + "y" * 5000, "A plain answer"))
    shown = findings(Replies(), rows)["role_markers"].examples[0]
    assert max(map(len, shown.values())) <= 302
    assert "<|im_start|>" in shown["chosen"]


@settings(max_examples=200, deadline=None)
@given(any_rows())
def test_nothing_raises(rows: list[Example]) -> None:
    findings(Replies(), rows)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")
def test_real_dialogues() -> None:
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    halves = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in rows]
    starts, empty, doubled, speaks = [], [], [], []
    for line, ((prompt, _, a), (other, _, b)) in enumerate(halves, 1):
        a, b = a.strip(), b.strip()
        if a != b and (a.startswith(b) or b.startswith(a)):
            starts.append(line)
        if not a or not b:
            empty.append(line)
        elif prompt == other:
            roles = re.findall(r"\n\n(Human|Assistant):", prompt + "\n\nAssistant:")
            if any(x == y for x, y in pairwise(roles)):
                doubled.append(line)
            if "\n\nHuman:" in a + b or a.startswith("Human:") or b.startswith("Human:"):
                speaks.append(line)
    # Of the five that are another's start four are empty, and are not loaded.
    assert (len(starts), set(empty) < set(starts)) == (5, True)
    found = findings(Replies(), of_file(HH))
    assert lines(found["prefix_replies"]) == sorted({*starts} - {*empty}) == [1610]
    assert lines(found["consecutive_turns"]) == doubled
    assert set(speaks) <= set(lines(found["role_markers"]))
    assert "white_space_at_start" not in found
