"""The dataloader's collator: rows of a tokenised data set -> the micro-batches that a step computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_kit.config import PreferenceConfig
from dpo_kit.dealing import TokenRows, mismatched_partners
from dpo_kit.examples import Example, ScoredReplies, example_of
from dpo_kit.losses import Objective
from dpo_kit.packing import Layout, MicroBatch, plan_step

Row = dict[str, Any]


@dataclass
class Planner:
    """Plans steps as a run's settings and its objective want them.

    Attributes:
        args: token budget and attention backend are read when a step is planned.
        objective: says which replies are scored.
        layout: of the micro-batches.
        with_keys: whether they carry what a cached reference knows their sequences by.
        longest: tokens of the longest sequence of the data that the models were checked for; None: no limit.
        filler: a small example, for ranks that have fewer micro-batches than others.
    """

    args: PreferenceConfig
    objective: Objective
    layout: Layout = "padded"
    with_keys: bool = False
    longest: int | None = None
    filler: Example | None = None

    def rows_of(self, dataset: Any) -> TokenRows:
        """What a dataloader reads: no Python object per token, and partners where they are needed."""
        return TokenRows(dataset, mismatched_partners(dataset) if self.objective.needs_mismatched else None)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Rows of one step -> its `micro_batches` and, where wanted, those of replies to other prompts
        (`mismatched`); what they were cut from (`examples`, `strangers`) by which `token_budget`, to cut them
        again by another; and a `filler`.
        """
        strangers = [self.mismatched(row) for row in rows] if self.objective.needs_mismatched else None
        planned = self.cut([self.example(row) for row in rows], strangers)
        return planned | {"filler": None if self.filler is None else self.whole([self.filler])}

    def cut(self, examples: Sequence[Example], strangers: Sequence[Example] | None) -> dict[str, Any]:
        """What a step's examples are cut into under the budget of now."""
        cut = {
            "examples": examples,
            "micro_batches": self.plan(examples),
            "token_budget": self.args.token_budget,
        }
        return (
            cut if strangers is None else cut | {"strangers": strangers, "mismatched": self.plan(strangers)}
        )

    def example(self, row: Row) -> Example:
        """What is trained on."""
        return example_of(row, with_rejected=self.objective.needs_rejected)

    def mismatched(self, row: Row) -> Example:
        """The row's prompt with the replies of another row, to another prompt.

        Replies lose their end where they would reach beyond `longest`; a token always stays, with which the
        sequence is no longer than the row's own.
        """
        prompt, replies = np.asarray(row["prompt_ids"]), list(row["partner"])
        if self.longest is not None:
            room = max(self.longest - len(prompt), 1)
            replies = [reply[:room] for reply in replies]
        return ScoredReplies(prompt, replies, [0.0] * len(replies))

    def scored(self, rows: Sequence[Row]) -> list[list[Example]]:
        """All examples that the reference is asked for, like with like."""
        examples = [[self.example(row) for row in rows]]
        if self.objective.needs_mismatched:
            examples.append([self.mismatched(row) for row in rows])
        return examples

    def whole(self, examples: Sequence[Example]) -> MicroBatch:
        """All examples in one micro-batch, whatever the budget."""
        (batch,) = self._planned(examples, sys.maxsize, self.layout)
        return batch

    def plan(self, examples: Sequence[Example], layout: Layout | None = None) -> list[MicroBatch]:
        """Examples -> micro-batches under the run's token budget."""
        return self._planned(examples, self.args.token_budget, layout or self.layout)

    def _planned(self, examples: Sequence[Example], budget: int, layout: Layout) -> list[MicroBatch]:
        if not examples:
            return []
        return plan_step(examples, budget, layout, self.args.backend, with_keys=self.with_keys)
