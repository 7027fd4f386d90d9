"""OASST's trees, whole and message by message: rows as the public sets have them, and the real trees."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dpo_kit.pairs import read_pairs
from tests.pair_files import error_of, write

OASST = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasst" / "en_100_tree.jsonl"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def lists(file: Path, *rows: Any, **options: Any) -> list[dict[str, Any]]:
    return read_pairs(write(file, *rows), shape="lists", **options)[0]


def oasst_levels() -> Iterator[tuple[list[str], list[tuple[str, int]]]]:
    """Each prompter's message by a walk of its own: the texts up to it, and its ranked replies."""

    def walk(node: dict[str, Any], path: list[str]) -> Iterator[tuple[list[str], list[tuple[str, int]]]]:
        path = [*path, node["text"]]
        ranked = [
            (reply["text"], reply["rank"]) for reply in node["replies"] if reply.get("rank") is not None
        ]
        if node["role"] == "prompter" and len(ranked) > 1:
            yield path, ranked
        for reply in node["replies"]:
            yield from walk(reply, path)

    for line in OASST.read_text(encoding="utf-8").split("\n"):
        if line:
            yield from walk(json.loads(line)["prompt"], [])


@pytest.mark.skipif(not OASST.is_file(), reason="the real data of ../shared/data is not here")
def test_the_real_trees() -> None:
    levels = list(oasst_levels())
    sizes = {n: sum(len(ranked) == n for _, ranked in levels) for n in range(2, 10)}
    assert sizes == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 7: 0, 8: 1, 9: 1}
    # 57 * 1 + 117 * 3 + 27 * 6 + 3 * 10 + 6 * 15 + 28 + 36
    assert sum(n * (n - 1) // 2 * count for n, count in sizes.items()) == 754

    pairs, report = read_pairs(OASST)
    assert (report.read, report.kept, report.made) == (100, 100, 754)
    assert report.sources[0].unused_columns == []
    # One list of three has a fourth reply that nobody ranked.
    assert [(p.kind, p.place.line) for p in report.problems] == [("unjudged", 59)]
    wanted = set()
    for path, ranked in levels:
        for (one, at), (other, below) in combinations(sorted(ranked, key=lambda pair: pair[1]), 2):
            wanted.add((tuple(path), one, at + 1, other, below + 1))
    found = {
        (
            tuple(turn["content"] for turn in pair["prompt"]),
            pair["chosen"][0]["content"],
            pair["chosen_rank"],
            pair["rejected"][0]["content"],
            pair["rejected_rank"],
        )
        for pair in pairs
    }
    assert found == wanted
    assert {turn["role"] for pair in pairs for turn in pair["prompt"][::2]} == {"user"}
    assert {turn["role"] for pair in pairs for turn in pair["prompt"][1::2]} == {"assistant"}
    assert len(read_pairs(OASST, shape="lists")[0]) == len(levels) == 212
    assert len(read_pairs(OASST, pairs="best_worst")[0]) == 212
    assert (
        len(read_pairs(OASST, pairs="adjacent")[0]) == sum(len(ranked) - 1 for _, ranked in levels) == 429
    )  # 641 ranked replies


def flat(node: dict[str, Any], tree: str) -> Iterator[dict[str, Any]]:
    """The messages of a tree as the hub has them: with nulls for what a message has not."""
    yield {"parent_id": None, "rank": None, **node, "message_tree_id": tree, "replies": None} | {"emojis": {}}
    for reply in node["replies"]:
        yield from flat(reply, tree)


@pytest.mark.skipif(not OASST.is_file(), reason="the real data of ../shared/data is not here")
def test_the_messages_of_the_real_trees_in_any_order(file: Path) -> None:
    trees = [json.loads(line) for line in OASST.read_text(encoding="utf-8").split("\n") if line]
    rows = [message for each in trees for message in flat(each["prompt"], each["message_tree_id"])]
    for row in rows:
        del row["replies"]
    random.Random(1).shuffle(rows)
    pairs, report = read_pairs(write(file, *rows))
    assert (report.sources[0].format, report.kept, report.made) == ("oasst", 100, 754)
    assert report.counts == {"unjudged": 1}

    def without_place(pairs: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps({**pair, "source": ""}, sort_keys=True) for pair in pairs)

    assert without_place(pairs) == without_place(read_pairs(OASST)[0])


def message(identity: str, parent: str | None, role: str, text: str, rank: Any = None) -> dict[str, Any]:
    names = {"message_id": identity, "parent_id": parent, "message_tree_id": "q"}
    return {**names, "role": role, "text": text, "rank": rank, "deleted": False, "lang": "en"}


MESSAGES = [
    message("a", "q", "assistant", "A", 1),
    message("q", None, "prompter", "Q"),
    message("b", "q", "assistant", "B", 0),
]


def test_messages_meet_by_their_names(file: Path) -> None:
    lost = [
        message("c", "gone", "prompter", "And?"),
        message("d", "c", "assistant", "D", 0),
        message("e", "c", "assistant", "E", 1),
    ]
    (pair,), report = read_pairs(write(file, *MESSAGES, *lost))
    assert [turn["content"] for turn in pair["prompt"]] == ["Q"]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("B", "A")
    assert pair["source"] == f"{file}:2"
    assert [(p.kind, p.place.line, p.field) for p in report.problems] == [("unjudged", 4, "parent_id")]


@pytest.mark.parametrize(
    "change",
    [
        {"message_id": "q"},
        {"message_id": None},
        {"parent_id": 5},
        {"role": "robot"},
        {"text": 5},
        {"rank": "1"},
        {"deleted": "no"},
    ],
)
def test_damaged_messages_are_named_where_they_stand(file: Path, change: dict[str, Any]) -> None:
    error = error_of(write(file, *MESSAGES[:2], {**MESSAGES[2], **change}))
    assert (error.line, error.field) == (3, next(iter(change)))


def test_messages_in_a_circle_are_reported(file: Path) -> None:
    circle = [message("x", "y", "prompter", "X"), message("y", "x", "assistant", "Y", 0)]
    error = error_of(write(file, *MESSAGES, *circle))
    assert (error.line, error.field) == (4, "parent_id")


def node(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "deleted": False, "replies": list(replies), **more}


def tree(*replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "message_tree_id": "t",
        "tree_state": "ready_for_export",
        "prompt": node("prompter", "Q", *replies, **more),
    }


def test_a_tree_has_a_list_for_each_level(file: Path) -> None:
    deep = node("prompter", "More?", node("assistant", "yes", rank=1), node("assistant", "no", rank=0))
    made = lists(file, tree(node("assistant", "A", deep, rank=0), node("assistant", "B", rank=1)))
    assert [[turn["content"] for turn in row["prompt"]] for row in made] == [["Q"], ["Q", "A", "More?"]]
    assert [row["scores"] for row in made] == [[-1, -2], [-2, -1]]


def test_deleted_messages_take_what_follows_with_them(file: Path) -> None:
    below = node("prompter", "More?", node("assistant", "yes", rank=1), node("assistant", "no", rank=0))
    row = tree(
        node("assistant", "A", below, rank=0, deleted=True),
        node("assistant", "B", rank=1),
        node("assistant", "C", rank=2),
        node("assistant", "D", rank=3, review_result=False),
    )
    (pair,), report = read_pairs(write(file, row))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("B", "C")
    assert [(p.kind, p.field) for p in report.problems] == [
        ("unjudged", "prompt.replies[0]"),
        ("unjudged", "prompt.replies[3]"),
    ]


def test_trees_without_a_list_and_damaged_ones(file: Path) -> None:
    good = tree(node("assistant", "A", rank=0), node("assistant", "B", rank=1))
    alone = tree(node("assistant", "A", rank=0), node("assistant", "B", rank=None))
    assert read_pairs(write(file, good, alone))[1].counts == {"nothing_to_compare": 1}
    damaged = {
        "prompt.replies[1].role": tree(node("assistant", "A"), node("robot", "B")),
        "prompt.replies[0].text": tree(node("assistant", 5)),
        "prompt.replies[1].rank": tree(node("assistant", "A", rank=0), node("assistant", "B", rank="1")),
        "prompt.deleted": tree(deleted="no"),
        "prompt.replies[0].replies": tree({"role": "assistant", "text": "A", "replies": {}}),
        "prompt.replies[0]": tree("A"),
    }
    for field, row in damaged.items():
        assert error_of(write(file, row)).field == field


def test_a_tree_deeper_than_the_stack(file: Path) -> None:
    from dpo_kit.pairs.formats import FORMATS

    inner = node("prompter", "Q", node("assistant", "A", rank=0), node("assistant", "B", rank=1))
    for _ in range(5000):
        inner = node("prompter", "Q", node("assistant", "A", inner))
    made = FORMATS["oasst_tree"].convert({"message_tree_id": "t", "prompt": inner})
    assert [len(row["prompt"]) for row in made] == [10001]
