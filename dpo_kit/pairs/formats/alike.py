"""Rows that have dpo_kit's own columns: canonical pairs, labelled replies and ranked lists."""

from __future__ import annotations

from dpo_kit.pairs.formats.registry import Convert, Format, Row
from dpo_kit.pairs.formats.turns import SYSTEM, as_messages, taking_system
from dpo_kit.pairs.formats.values import label, number
from dpo_kit.pairs.kinds import LISTS, SCORED, UNPAIRED
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, kind_of


def columns(*names: str) -> Convert:
    """An adapter that takes these columns as they are, those that there are; turns become messages."""

    def convert(row: Row) -> Row:
        found = {name: row[name] for name in names if name in row}
        for name, value in found.items():
            if not isinstance(value, str):
                found[name] = as_messages(value, name)
        return found

    return taking_system(convert)


def _lists_of_texts(row: Row) -> bool:
    sides = [row.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(side, list) and side and isinstance(side[0], str) for side in sides)


def _only_lists_of_texts(row: Row) -> list[str]:
    complete = "chosen" in row and "rejected" in row
    return ["lists of texts in 'chosen' and 'rejected'"] if complete and not _lists_of_texts(row) else []


def _no_lists_of_texts(row: Row) -> list[str]:
    return ["texts or messages in 'chosen' and 'rejected'"] if _lists_of_texts(row) else []


def _several(row: Row) -> Row:
    """All of the chosen replies are better than all of the rejected ones: rank 1 and rank 2."""
    sides: list[list[str]] = []
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list):
            raise BadRow(f"expected a list of texts, found {kind_of(row[name])}", field=name)
        sides.append([checked_text(text, f"{name}[{i}]") for i, text in enumerate(row[name])])
    if not all(sides):
        raise UnusablePair("nothing_to_compare", field="rejected" if sides[0] else "chosen")
    ranks = [rank for rank, side in enumerate(sides, 1) for _ in side]
    return {"prompt": row["prompt"], "completions": [*sides[0], *sides[1]], "ranks": ranks}


def _not_conversations(row: Row) -> list[str]:
    sides = [name for name in ("chosen", "rejected") if name in row]
    return [f"a list of messages in '{name}'" for name in sides if not isinstance(row[name], list)]


def _implicit(row: Row) -> Row:
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str):
            raise BadRow(
                "expected a whole conversation as a list of messages, found text; where a reply begins "
                "in a whole text cannot be told from its characters",
                field=name,
            )
    return {name: as_messages(row[name], name) for name in ("chosen", "rejected")}


def _not_ranked(row: Row) -> list[str]:
    return [] if row.keys() & {"scores", "ranks"} else ["the field 'scores' or 'ranks'"]


def _labelled(reply: str, said: str) -> Convert:
    """The adapter of rows with a prompt, one reply and a label in these columns."""

    def convert(row: Row) -> Row:
        asked, given = (as_messages(row[name], name) for name in ("prompt", reply))
        return {"prompt": asked, "completion": given, "label": label(row[said], said)}

    return taking_system(convert)


def _labelled_conversation(row: Row) -> Row:
    whole = as_messages(row["messages"], "messages")
    return {"completion": whole, "label": label(row["label"], "label")}


def _scored(reply: str) -> Convert:
    def convert(row: Row) -> Row:
        asked, given = (as_messages(row[name], name) for name in ("prompt", reply))
        score = number(row["score"], "score")
        if score is None:
            raise UnusablePair("unjudged", field="score")
        return {"prompt": asked, "completion": given, "score": score}

    return taking_system(convert)


def _not_one_score(row: Row) -> list[str]:
    return ["one number in 'score'"] if isinstance(row.get("score"), list | dict) else []


FORMATS = (
    Format(
        "explicit_prompt",
        "{prompt, chosen, rejected} as text or messages; chosen and rejected may repeat the prompt as "
        "messages (HuggingFaceH4/ultrafeedback_binarized)",
        ("prompt", "chosen", "rejected"),
        columns("prompt", "chosen", "rejected"),
        _no_lists_of_texts,
        optional=SYSTEM,
    ),
    Format(
        "implicit_prompt",
        "{chosen, rejected} as whole conversations, lists of messages or of ShareGPT's turns",
        ("chosen", "rejected"),
        taking_system(_implicit),
        _not_conversations,
        optional=SYSTEM,
    ),
    Format(
        "ranked",
        "{prompt, completions: [K], scores: [K] (higher is better) or ranks: [K] (1 is best)} as text or "
        "messages",
        ("prompt", "completions"),
        columns("prompt", "completions", "scores", "ranks"),
        _not_ranked,
        optional=("scores", "ranks", *SYSTEM),
        kind=LISTS,
    ),
    Format(
        "unpaired",
        "{prompt, completion, label} as text or messages; label: true where the completion is desirable "
        "(huggingface/trl)",
        ("prompt", "completion", "label"),
        _labelled("completion", "label"),
        optional=SYSTEM,
        kind=UNPAIRED,
    ),
    Format(
        "safety_labels",
        "{prompt, response, is_safe: true where the response is harmless} (PKU-Alignment/BeaverTails)",
        ("prompt", "response", "is_safe"),
        _labelled("response", "is_safe"),
        optional=SYSTEM,
        names={"completion": "response", "label": "is_safe"},
        kind=UNPAIRED,
    ),
    Format(
        "unpaired_messages",
        "{messages, label} with a whole conversation (hiyouga/LLaMA-Factory)",
        ("messages", "label"),
        taking_system(_labelled_conversation),
        optional=SYSTEM,
        prompt_field="messages",
        kind=UNPAIRED,
    ),
    Format(
        "several_chosen",
        "{prompt, chosen: [texts], rejected: [texts]}, each of the chosen better than each of the rejected "
        "(allenai/reward-bench-2)",
        ("prompt", "chosen", "rejected"),
        taking_system(_several),
        _only_lists_of_texts,
        optional=SYSTEM,
        kind=LISTS,
    ),
    *(
        Format(
            f"scored_{reply}",
            f"{{prompt, {reply}, score}}, one reply a row",
            ("prompt", reply, "score"),
            _scored(reply),
            _not_one_score,
            optional=SYSTEM,
            names={"completion": reply},
            kind=SCORED,
        )
        for reply in ("completion", "response")
    ),
)
