"""Several judged replies to a prompt: scores, ratings and ranks, as public sets lay them.

Each adapter gives `canonical_row` a ranked list, or one scored reply; what pairs are made of them is
`choosing`'s. Trees of OASST are in `trees`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo_kit.pairs.formats.instructions import instruction
from dpo_kit.pairs.formats.registry import Convert, Format, Row
from dpo_kit.pairs.formats.turns import SYSTEM, taking_system
from dpo_kit.pairs.formats.values import number, rank, score
from dpo_kit.pairs.kinds import LISTS, SCORED
from dpo_kit.pairs.messages import text_or_messages
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, kind_of

Judged = tuple[Any, float | int | None, str]  # a reply, what is said of it (None: nothing), and where

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_PROMPTS = ("prompt", "instruction", "query", "question", "input")
_REPLIES = ("responses", "response", "generations", "answers", "candidates", "outputs", "completions")
_SCORES = ("scores", "score", "ratings", "rating", "rewards", "reward")
_RANKS = ("ranks", "rank")
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def judged_list(prompt: Any, judged: Iterable[Judged], by: str) -> list[Row | UnusablePair]:
    """The ranked list of those replies that were judged, and an account of each that was not.

    `by` is `scores` or `ranks`. Raises `UnusablePair` where fewer than two were judged.
    """
    all_judged = list(judged)
    known = [(reply, value) for reply, value, _ in all_judged if value is not None]
    if len(known) < 2:
        raise UnusablePair("nothing_to_compare")
    row = {"prompt": prompt, "completions": [reply for reply, _ in known], by: [value for _, value in known]}
    return [row, *(UnusablePair("unjudged", field=field) for _, value, field in all_judged if value is None)]


def parallel(
    prompt: Any, replies: Any, judgements: Any, replies_at: str, judgements_at: str, by: str
) -> list[Row | UnusablePair]:
    """`judged_list` of replies and of what is said of them, lists side by side that stand at these places."""
    for field, value in ((replies_at, replies), (judgements_at, judgements)):
        if not isinstance(value, list):
            raise BadRow(f"expected a list, found {kind_of(value)}", field=field)
    if len(replies) != len(judgements):
        raise BadRow(f"{len(judgements)} {by} for {len(replies)} replies", field=judgements_at)
    judged: list[Judged] = []
    for i, (reply, value) in enumerate(zip(replies, judgements, strict=True)):
        field = f"{judgements_at}[{i}]"
        judged.append((reply, number(value, field) if by == "scores" else rank(value, field, 1), field))
    return judged_list(prompt, judged, by)


def objects(row: Row, field: str, *keys: str) -> list[tuple[Mapping[str, Any], str]]:
    """The elements of the row's list and where each stands; all must be objects with these keys."""
    listed = row[field]
    if not isinstance(listed, list):
        raise BadRow(f"expected a list, found {kind_of(listed)}", field=field)
    found: list[tuple[Mapping[str, Any], str]] = []
    for i, element in enumerate(listed):
        place = f"{field}[{i}]"
        if not isinstance(element, dict):
            raise BadRow(
                f"expected an object with {' and '.join(keys)}, found {kind_of(element)}", field=place
            )
        for key in keys:
            if key not in element:
                raise BadRow("there is no such key", field=f"{place}.{key}")
        found.append((element, place))
    return found


def _lacks_objects(field: str, *keys: str) -> Callable[[Row], list[str]]:
    """Detection: the column is a list, empty or with an object with these keys as its first element."""

    def lacks(row: Row) -> list[str]:
        listed = row.get(field)
        fits = isinstance(listed, list) and all(
            isinstance(each, dict) and each.keys() >= set(keys) for each in listed[:1]
        )
        if fits or field not in row:
            return []
        return [f"objects with {' and '.join(repr(key) for key in keys)} in '{field}'"]

    return lacks


def _ultrafeedback_score(key: str) -> Convert:
    def convert(row: Row) -> list[Row | UnusablePair]:
        replies = objects(row, "completions", "response", key)
        return judged_list(
            row["instruction"],
            [(each["response"], number(each[key], f"{at}.{key}"), f"{at}.{key}") for each, at in replies],
            "scores",
        )

    return convert


def _ultrafeedback_aspect(aspect: str) -> Convert:
    def convert(row: Row) -> list[Row | UnusablePair]:
        judged = []
        for each, at in objects(row, "completions", "response", "annotations"):
            field = f"{at}.annotations.{aspect}"
            notes = each["annotations"]
            note = notes.get(aspect) if isinstance(notes, dict) else None
            if not isinstance(note, dict) or "Rating" not in note:
                raise BadRow("there is no 'Rating'", field=field)
            judged.append((each["response"], number(note["Rating"], f"{field}.Rating"), f"{field}.Rating"))
        return judged_list(row["instruction"], judged, "scores")

    return convert


def helpsteer_prompt(text: Any, field: str) -> list[dict[str, str]]:
    """HelpSteer's prompt -> messages; its turns after the first stand behind `<extra_id_1>User` lines."""
    pieces = _TURN.split(checked_text(text, field))
    texts, roles = pieces[::2], ["user", *(name.lower() for name in pieces[1::2])]
    in_turn = ["user", "assistant"] * (len(roles) // 2) + ["user"]
    if roles != in_turn or any("<extra_id_1>" in words for words in texts):
        raise BadRow(
            "expected turns of user and assistant by turns, the user's first and last",
            field=field,
            mend=r"Begin each further turn with '\n<extra_id_1>User\n' or '\n<extra_id_1>Assistant\n'",
        )
    return [{"role": role, "content": words} for role, words in zip(roles, texts, strict=True)]


def _helpsteer(attribute: str) -> Convert:
    def convert(row: Row) -> Row:
        return {
            "prompt": helpsteer_prompt(row["prompt"], "prompt"),
            "completion": row["response"],
            "score": score(row[attribute], attribute),
        }

    return convert


def _nectar(row: Row) -> list[Row | UnusablePair]:
    replies = objects(row, "answers", "answer", "rank")
    judged = [(each["answer"], rank(each["rank"], f"{at}.rank", 1), at) for each, at in replies]
    return judged_list(row["prompt"], judged, "ranks")


def _nemo(row: Row) -> list[Row | UnusablePair]:
    replies = objects(row, "completions", "rank", "completion")
    judged = [(each["completion"], rank(each["rank"], f"{at}.rank", 0), at) for each, at in replies]
    return judged_list(row["context"], judged, "ranks")


def _stack_exchange(row: Row) -> list[Row | UnusablePair]:
    replies = objects(row, "answers", "text", "pm_score")
    judged = [(each["text"], score(each["pm_score"], f"{at}.pm_score"), at) for each, at in replies]
    return judged_list(row["question"], judged, "scores")


def _scored_texts(row: Row) -> list[Row | UnusablePair]:
    replies = objects(row, "output", "score", "text")
    judged = [(each["text"], score(each["score"], f"{at}.score"), at) for each, at in replies]
    return judged_list(row["input"], judged, "scores")


def _comparison(row: Row) -> Row:
    replies = row["output"]
    if not isinstance(replies, list) or len(replies) != 2:
        found = f"a list of {len(replies)}" if isinstance(replies, list) else kind_of(replies)
        raise BadRow(f"expected the better reply and the worse one, found {found}", field="output")
    return {"prompt": instruction(row), "chosen": replies[0], "rejected": replies[1]}


def _lacks_two_texts(row: Row) -> list[str]:
    two = row.get("output")
    fits = "output" not in row or (
        isinstance(two, list) and len(two) == 2 and all(isinstance(text, str) for text in two)
    )
    return [] if fits else ["two texts in 'output', the better first"]


def _list_columns(row: Row) -> tuple[list[str], list[str], list[str]]:
    """The row's columns that may be the prompt, the list of replies, and the list of what is said of them."""
    lists = [name for name, value in row.items() if isinstance(value, list)]
    return (
        [name for name in _PROMPTS if name in row],
        [name for name in _REPLIES if name in lists],
        [name for name in (*_SCORES, *_RANKS) if name in lists],
    )


def _lacks_lists(row: Row) -> list[str]:
    wanted = (("a prompt", _PROMPTS), ("a list of replies", _REPLIES), ("scores or ranks", _SCORES + _RANKS))
    lacks = []
    for (what, names), found in zip(wanted, _list_columns(row), strict=True):
        if not found:
            lacks.append(f"{what} ({', '.join(repr(name) for name in names)})")
        elif len(found) > 1:
            lacks.append(f"{what} in one column, not in {' and '.join(repr(name) for name in found)}")
    return lacks


def _parallel_lists(row: Row) -> list[Row | UnusablePair]:
    if lacks := _lacks_lists(row):
        raise BadRow(f"the row lacks {', '.join(lacks)}")
    (prompt,), (replies,), (by,) = _list_columns(row)
    for i, reply in enumerate(row[replies]):
        text_or_messages(reply, f"{replies}[{i}]")
    text_or_messages(row[prompt], prompt)
    return parallel(row[prompt], row[replies], row[by], replies, by, "scores" if by in _SCORES else "ranks")


FORMATS = (
    Format(
        "parallel_lists",
        "{prompt, responses: [K], scores: [K]} under other names: instruction, query, question, input; "
        "generations, answers, ...; ratings, rewards, or ranks, 1 the best (distilabel, RRHF, RLHFlow)",
        (),
        taking_system(_parallel_lists),
        _lacks_lists,
        optional=(*_PROMPTS, *_REPLIES, *_SCORES, *_RANKS, *SYSTEM),
        kind=LISTS,
    ),
    Format(
        "ultrafeedback",
        "{instruction, completions: [{response, overall_score, fine-grained_score, annotations: {aspect: "
        "{Rating}}}]} (openbmb/UltraFeedback). overall_score counts unless another judgement is named, since "
        "ultrafeedback_binarized and Zephyr went by it; GPT-4's 1 became a 10 in some rows (argilla), which "
        "fine-grained_score, the mean of the four aspects, is free of",
        ("instruction", "completions"),
        _ultrafeedback_score("overall_score"),
        _lacks_objects("completions", "response"),
        prompt_field="instruction",
        kind=LISTS,
        judgements={
            "overall_score": _ultrafeedback_score("overall_score"),
            "fine-grained_score": _ultrafeedback_score("fine-grained_score"),
            **{aspect: _ultrafeedback_aspect(aspect) for aspect in ASPECTS},
        },
    ),
    Format(
        "helpsteer",
        "{prompt, response, helpfulness, correctness, coherence, complexity, verbosity}, one reply a row "
        "(nvidia/HelpSteer, HelpSteer2)",
        ("prompt", "response", *ATTRIBUTES),
        _helpsteer("helpfulness"),
        names={"completion": "response"},
        kind=SCORED,
        judgements={attribute: _helpsteer(attribute) for attribute in ATTRIBUTES},
    ),
    Format(
        "nectar",
        r"{prompt: '\n\nHuman: ... \n\nAssistant: ', answers: [{answer, rank}]}, rank 1 is best "
        "(berkeley-nest/Nectar)",
        ("prompt", "answers"),
        _nectar,
        _lacks_objects("answers", "answer", "rank"),
        names={"completions": "answers"},
        kind=LISTS,
    ),
    Format(
        "nemo",
        "{context: [messages], completions: [{rank, completion: [messages]}]}, rank 0 is best (NeMo RL)",
        ("context", "completions"),
        _nemo,
        _lacks_objects("completions", "rank", "completion"),
        prompt_field="context",
        kind=LISTS,
    ),
    Format(
        "stack_exchange",
        "{question, answers: [{text, pm_score}]}, the score log2 of 1 + upvotes, 1 more where accepted, as "
        "Askell et al. 2021 (HuggingFaceH4/stack-exchange-preferences)",
        ("question", "answers"),
        _stack_exchange,
        _lacks_objects("answers", "text", "pm_score"),
        prompt_field="question",
        names={"completions": "answers"},
        kind=LISTS,
    ),
    Format(
        "scored_texts",
        "{input, output: [{score, text}]} (LMFlow's text_to_scored_textlist)",
        ("input", "output"),
        _scored_texts,
        _lacks_objects("output", "score", "text"),
        prompt_field="input",
        names={"completions": "output"},
        kind=LISTS,
    ),
    Format(
        "comparison",
        "{instruction, input, output: [better, worse]} (comparison_gpt4_data of LLaMA-Factory before 0.7)",
        ("instruction", "output"),
        taking_system(_comparison),
        _lacks_two_texts,
        optional=("input", *SYSTEM),
        prompt_field="instruction",
        names={"chosen": "output[0]", "rejected": "output[1]"},
    ),
)
