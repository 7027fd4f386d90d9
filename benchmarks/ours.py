"""What dpo_kit's side of the benchmark needs and dpo_kit itself has no use for.

A reference whose log-probs were computed ahead of training, and a collator that shares nothing across
pairs, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.attention import attention_backend
from dpo_kit.examples import PairTokens
from dpo_kit.logprob import HeadInputs
from dpo_kit.packing import MicroBatch, plan_step
from dpo_kit.reference import LiveReference
from dpo_kit.scoring import SequenceLogProbs


class TableReference:
    """Log-probs looked up by the pair's place in the data; see `dpo_kit.reference.Reference`."""

    is_policy = True
    needs_keys = False
    model: nn.Module | None = None

    def __init__(self, table: dict[str, Tensor]) -> None:
        self._table = table

    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """Of sequences as the reference scored them, chosen first; no `entries`."""
        both = torch.stack([self._table[source] for source in batch.sources])
        return SequenceLogProbs(both.T.reshape(-1).to(batch.lengths.device), torch.empty(0))

    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """A table has log-probs alone."""
        raise TypeError("there is no forward pass")


def precomputed_reference(
    policy: nn.Module, rows: Sequence[dict[str, Any]], token_budget: int, bf16: bool
) -> TableReference:
    """Score all pairs once, packed as full as the budget allows, whatever step they belong to."""
    device = next(policy.parameters()).device
    grads = [p.requires_grad for p in policy.parameters()]
    live = LiveReference(policy, is_policy=True)
    table: dict[str, Tensor] = {}
    pairs = [PairTokens.from_row(row) for row in rows]
    for planned in plan_step(pairs, token_budget, backend=attention_backend(device.type)):
        batch = planned.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            found = live.logprobs(batch).sequences
        both = found.view(2, -1).T.cpu()
        table |= dict(zip(batch.sources, both, strict=True))
    for parameter, had in zip(policy.parameters(), grads, strict=True):
        parameter.requires_grad_(had)
    return TableReference(table)


def within_pairs(
    plan: Callable[[Sequence[dict[str, Any]]], dict[str, list[MicroBatch]]], vocabulary: int
) -> Callable[[Sequence[dict[str, Any]]], dict[str, list[MicroBatch]]]:
    """The same collator, sharing a prompt within a pair and nothing between pairs.

    While a step is planned, the first token of each pair's prompt is one that no other pair has; after
    that it is itself again. So several pairs lie in one row as ever, one tree each, and kernels, budget
    and log-probs are the same.
    """

    def planned(rows: Sequence[dict[str, Any]]) -> dict[str, list[MicroBatch]]:
        marked = [
            {**row, "prompt_ids": [vocabulary + i, *row["prompt_ids"][1:]]} for i, row in enumerate(rows)
        ]
        first = torch.tensor([row["prompt_ids"][0] for row in rows])
        inputs = plan(marked)
        return {**inputs, "micro_batches": [restored(batch, first) for batch in inputs["micro_batches"]]}

    def restored(batch: MicroBatch, first: Tensor) -> MicroBatch:
        ids = batch.input_ids
        place = (ids - vocabulary).clamp(min=0)
        return replace(batch, input_ids=torch.where(ids < vocabulary, ids, first[place]))

    return planned
