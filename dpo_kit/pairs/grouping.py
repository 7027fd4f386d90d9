"""Replies that stand in rows of their own -> one ranked list for each prompt.

Scored replies always, labelled ones where pairs or lists are asked for (good above bad). All replies of a
source are held, since those of one prompt may stand anywhere in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dpo_kit.pairs.choosing import prompt_digest
from dpo_kit.pairs.kinds import SCORED, UNPAIRED, Kind
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import Place
from dpo_kit.pairs.tally import PairsReport

Placed = tuple[dict[str, Any], list[Place]]


def is_grouped(kind: Kind, options: LoadOptions) -> bool:
    """Whether rows of this kind are put together by their prompt."""
    return kind == SCORED or (kind == UNPAIRED and options.shape in ("pairs", "lists"))


def group_by_prompt(rows: Iterable[Placed], kind: Kind, report: PairsReport) -> Iterator[Placed]:
    """Canonical rows of one reply, and where they stand -> ranked lists, in the order of their prompts.

    What else a list says (tools, weight, ...) is what its first row says. A prompt with one reply only is
    accounted for and left out.
    """
    assert kind.judgement is not None
    groups: dict[str, list[Placed]] = {}
    for row, places in rows:
        groups.setdefault(prompt_digest(row["prompt"]), []).append((row, places))
    for members in groups.values():
        places = [place for _, own in members for place in own]
        replies = [row["completion"] for row, _ in members]
        if all(reply == replies[0] for reply in replies):
            report.leave_out("nothing_to_compare", places[0])
            continue
        first = {name: value for name, value in members[0][0].items() if name not in kind.columns}
        scores = [float(row[kind.judgement]) for row, _ in members]
        prompt = members[0][0]["prompt"]
        yield {**first, "prompt": prompt, "completions": replies, "scores": scores}, places
