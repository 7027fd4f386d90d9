"""Faults planted in replies and turns are found, with their places and sides; clean data has none."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from audit_rows import any_rows, findings, labelled, lines, of_file, pair, pairs, ranked
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
        # Whole as they are, with more behind them.
        ("p", "Yes.", "Yes. It is so because of many things."),
        ("p", "It is (so I think so.)", "It is (so I think so.) And more."),
        ("p", "Yes", "Yes and no"),
        ("p", "Table: games in 2011\nColumns: season", "Table: games in 2011"),
        ("p", "是的，确实如此。", "是的，确实如此。因为这样更好。"),
    )
    found = findings(Replies(), rows)
    cut = found["cut_off_replies"]
    assert lines(cut) == [2, 3]
    assert (cut.severity, cut.of) == ("error", 9)
    assert "in 1 chosen and 1 rejected replies" in cut.sentence
    assert cut.examples[0]["what"] == "chosen is the start of rejected"
    assert lines(found["prefix_replies"]) == [5, 6, 7, 8, 9]
    assert found["prefix_replies"].severity == "note"
    assert all(each.advice.endswith(".") for each in found.values())


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


@pytest.mark.parametrize(
    "honest",
    [
        "The User: a short history of it.",
        "A [list] of <b> and humans: one, two.",
        "In Llama 2 the prompt is wrapped as `[INST] ... [/INST]` and ends in `</s>`.",
        "Write it like this:\n```\nHuman: hello\nAssistant: hi\n```\nand it goes on.",
    ],
)
def test_speech_about_users_is_no_marker(honest: str) -> None:
    assert findings(Replies(), pairs(("p", honest, GOOD[1]))).keys() <= {"white_space_at_end"}


def test_a_name_at_the_start_is_no_other_turn() -> None:
    rows = pairs(
        *[GOOD] * 20,
        ("p", "Human: and what then, then?", " Assistant: It is K2, as far as I know."),
        ("p", "<|im_start|>assistant\nIt is K2, as far as I know.", GOOD[1]),
        ("p", "User: what of it?\nAssistant: It is K2.", "It is K2, I think.\n\nHuman: And then?"),
    )
    found = findings(Replies(), rows)
    names, turns = found["speaker_names"], found["role_markers"]
    assert (lines(names), lines(turns)) == ([21, 22, 23], [23])
    assert names.examples[0]["what"] == "Human: in chosen; Assistant: in rejected"
    assert turns.examples[0]["what"] == "Assistant: in chosen; Human: in rejected"
    assert ("Take the name off" in names.advice, "Cut" in turns.advice) == (True, True)
    assert "in 3 chosen and 1 rejected replies" in names.sentence


def test_a_reply_counts_once_however_many_pairs_a_list_gave() -> None:
    bad = "It is K2, I think.\n\nHuman: And then?"
    rows = [pair("p", bad, f"A plain answer, number {i}.", 7) for i in range(6)]
    rows += [pair("p", f"A plain answer, number {i}.", "A worse one, that is.", 8) for i in range(3)]
    found = findings(Replies(), rows)["role_markers"]
    assert found.sentence.startswith("6 of 9 pairs (66.7%) have a reply that runs on into another turn")
    assert "in 1 chosen reply" in found.sentence
    assert found.places == ("rows.jsonl:7",)


def test_short_replies_and_repeated_questions() -> None:
    question = "How many legs does a spider have, and why is that so?"
    rows = pairs(
        *[GOOD] * 10,
        (question, "Eight", "A spider has eight legs."),
        (question, f"{question} Eight of them.", "A spider has eight legs."),
        ("你好吗", "我很好，谢谢", "好"),
    )
    found = findings(Replies(), rows)
    assert lines(found["very_short_replies"]) == [11, 13]
    assert "2 of 13 pairs (15.4%) have a reply of fewer than 10 characters" in (
        found["very_short_replies"].sentence
    )
    assert lines(found["prompt_repeated"]) == [12]
    assert "1 of 13 pairs (7.7%) has a reply" in found["prompt_repeated"].sentence


def test_short_replies_that_are_short_by_nature() -> None:
    sums = pairs(*((f"What is {i} and {i}?", str(2 * i), str(2 * i + 1)) for i in range(50)))
    assert "very_short_replies" not in findings(Replies(), sums)
    one_sided = pairs(*((f"What is {i} and {i}?", f"It makes {2 * i} in all.", "?") for i in range(50)))
    assert findings(Replies(), one_sided)["very_short_replies"].count == 50
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    reply = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert "very_short_replies" not in findings(Replies(), pairs(*[GOOD] * 9, ("p", reply, GOOD[1])))


def test_turns_of_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    prompt = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert findings(Replies(), pairs((prompt, *GOOD[1:]))) == {}
    said_nothing = [*prompt[:1], {"role": "assistant", "content": None}, *prompt[:1]]
    assert findings(Replies(), pairs((said_nothing, *GOOD[1:]))).keys() == {"empty_turns"}


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
    assert lines(found["opening_refusal_or_apology"]) == [*range(1, 41)]
    assert found["opening_refusal_or_apology"].examples[0]["rejected"] == refusal
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
    assert "1 desirable and 1 undesirable replies" in findings(Replies(), rows)["speaker_names"].sentence
    listed = [ranked("p", ["Abc and so on", "Abc and so on and on", "Another answer"], [1, 2, 0])]
    found = findings(Replies(), listed)["cut_off_replies"]
    assert found.examples[0]["what"] == "completion 1 is the start of completion 2"
    assert "in 1 other reply" in found.sentence


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
    starts, empty, doubled, named, runs_on = [], [], [], [], []
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
            if a.startswith("Human:") or b.startswith("Human:"):
                named.append(line)
            if "\n\nHuman:" in a + b:
                runs_on.append(line)
    # Of the five that are another's start four are empty, and are not loaded.
    assert (len(starts), set(empty) < set(starts)) == (5, True)
    found = findings(Replies(), of_file(HH))
    assert lines(found["prefix_replies"]) == sorted({*starts} - {*empty}) == [1610]
    assert lines(found["consecutive_turns"]) == doubled
    assert set(named) <= set(lines(found["speaker_names"]))
    assert "in 16 chosen and 16 rejected replies" in found["speaker_names"].sentence
    assert set(runs_on) <= set(lines(found["role_markers"])) == {1561}
    assert "white_space_at_start" not in found
