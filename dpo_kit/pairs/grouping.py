"""Replies that stand in rows of their own -> one ranked list for each prompt.

Scored replies always, labelled ones where pairs or lists are asked for (good above bad). All replies of a
source are held, since those of one prompt may stand anywhere in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.choosing import prompt_digest
from dpo_kit.pairs.kinds import CONTEXT, SCORED, UNPAIRED, Kind
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import Place
from dpo_kit.pairs.tally import PairsReport

Placed = tuple[dict[str, Any], list[Place]]


def is_grouped(kind: Kind, options: LoadOptions) -> bool:
    """Whether rows of this kind are put together by their prompt."""
    return kind == SCORED or (kind == UNPAIRED and options.shape in ("pairs", "lists"))


def group_by_prompt(rows: Iterable[Placed], kind: Kind, report: PairsReport) -> Iterator[Placed]:
    """Canonical rows of one reply, and where they stand -> ranked lists, in the order of their prompts.

    A prompt is another with other tools or variables of the template. A list's weight is that of its rows,
    which must be the same; its `prompt_id` is the first row's. A prompt with one reply only is accounted for
    and left out. Raises `InputError`, or accounts for it where the report goes on.
    """
    assert kind.judgement is not None
    groups: dict[tuple[str | None, ...], list[Placed]] = {}
    for row, places in rows:
        beside = (row.get(name) for name in CONTEXT)
        groups.setdefault((prompt_digest(row["prompt"]), *beside), []).append((row, places))
    for members in groups.values():
        places = [place for _, own in members for place in own]
        if odd := _other_weight(members):
            report.meet(odd, places[0])
            continue
        replies = [row["completion"] for row, _ in members]
        if all(reply == replies[0] for reply in replies):
            report.leave_out("nothing_to_compare", places[0])
            continue
        first = {name: value for name, value in members[0][0].items() if name not in kind.columns}
        scores = [float(row[kind.judgement]) for row, _ in members]
        prompt = members[0][0]["prompt"]
        yield {**first, "prompt": prompt, "completions": replies, "scores": scores}, places


def _other_weight(members: list[Placed]) -> InputError | None:
    """What is wrong where the replies of a prompt have more than one weight."""
    weight = members[0][0].get("weight", 1.0)
    for row, places in members:
        if row.get("weight", 1.0) != weight:
            return places[0].error(
                f"the reply has another weight than the first of its prompt ({members[0][1][0]}), "
                "and a list has one",
                field="weight",
                mend="Give all replies of a prompt one weight",
            )
    return None
