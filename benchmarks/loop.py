"""A plain loop of DPO training in PyTorch, and the two scorers that run in it.

`Naive` is what one writes first: chosen and rejected padded into one rectangle, full logits, log-softmax.
`Trees` is dpo_kit's planning and scoring in the same loop, for machines that hold torch and transformers
and not what a transformers.Trainer on a data set needs. Neither does anything that the other could not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Row = dict[str, Any]


class Scorer(Protocol):
    """Cuts a step's pairs into parts and scores them."""

    def plan(self, rows: Sequence[Row]) -> list[Any]:
        """The parts of a step; their pairs are all of the step's, in any order."""

    def score(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[P] log-probs of a part's chosen and rejected replies, and [2P] the replies' lengths."""


class Naive:
    """One padded rectangle per step, all logits in fp32."""

    def __init__(self, device: str) -> None:
        self.device = device

    def plan(self, rows: Sequence[Row]) -> list[Any]:
        replies = [(row, row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
        length = max(len(row["prompt_ids"]) + len(reply) for row, reply in replies)
        ids = torch.zeros(len(replies), length, dtype=torch.long)
        mask, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, reply) in enumerate(replies):
            begin, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(reply)
            ids[i, :end] = torch.tensor(row["prompt_ids"] + reply)
            mask[i, :end] = 1
            completion[i, begin:end] = True
        return [tuple(tensor.to(self.device) for tensor in (ids, mask, completion))]

    def score(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, completion = part
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        chosen, rejected = (tokens * completion[:, 1:]).sum(1).chunk(2)
        return chosen, rejected, completion.sum(1)


class Trees:
    """dpo_kit: token trees under a token budget, log-probs without a matrix of logits."""

    def __init__(self, device: str, token_budget: int) -> None:
        self.device, self.token_budget = device, token_budget

    def plan(self, rows: Sequence[Row]) -> list[Any]:
        from dpo_kit.attention import attention_backend
        from dpo_kit.examples import PairTokens
        from dpo_kit.packing import plan_step

        pairs = [PairTokens.from_row(row) for row in rows]
        planned = plan_step(pairs, self.token_budget, backend=attention_backend(self.device))
        return [batch.to(self.device) for batch in planned]

    def score(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor, Tensor]:
        from dpo_kit.scoring import sequence_logprobs

        sequences = sequence_logprobs(model, part).sequences
        return sequences[: part.num_pairs], sequences[part.num_pairs :], part.lengths


@dataclass(frozen=True)
class Settings:
    """Of a loop; the names are those of transformers' TrainingArguments."""

    batch_size: int
    learning_rate: float
    beta: float
    bf16: bool
    device: str
    max_grad_norm: float = 1.0


def train(
    policy: nn.Module,
    reference: nn.Module | None,
    rows: Sequence[Row],
    scorer: Scorer,
    settings: Settings,
    known: Sequence[Sequence[tuple[Tensor, Tensor]]] | None = None,
    step_done: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """One epoch of DPO (arXiv 2305.18290, equation 7): AdamW, linear decay of the learning rate.

    Args:
        policy: trained in place.
        reference: a live reference; None with `known`.
        rows: the pairs; a last step that is not full is trained too.
        scorer: plans and scores.
        settings: of the loop.
        known: the reference's log-probs of each part of each step; see `reference_logprobs`.
        step_done: called after each step.

    Returns:
        For each step: loss, grad_norm (before clipping), logps/chosen and logps/rejected (mean per pair).
    """
    optimizer = torch.optim.AdamW(policy.parameters(), settings.learning_rate, weight_decay=0.0, fused=True)
    starts = range(0, len(rows), settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / len(starts)))
    logged = []
    policy.train()
    for step, start in enumerate(starts):
        pairs = rows[start : start + settings.batch_size]
        sums = torch.zeros(3, device=settings.device)
        for place, part in enumerate(scorer.plan(pairs)):
            with _autocast(settings):
                if known is None:
                    assert reference is not None
                    with torch.no_grad():
                        expected = scorer.score(reference, part)[:2]
                else:
                    expected = known[step][place]
                chosen, rejected, _ = scorer.score(policy, part)
            margins = (chosen - expected[0]) - (rejected - expected[1])
            losses = -F.logsigmoid(settings.beta * margins)
            (losses.sum() / len(pairs)).backward()
            sums += torch.stack([losses.sum(), chosen.sum(), rejected.sum()]).detach()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        names = ("loss", "logps/chosen", "logps/rejected")
        means = dict(zip(names, (sums / len(pairs)).tolist(), strict=True))
        logged.append({**means, "grad_norm": float(norm)})
        step_done()
    return logged


def reference_logprobs(
    reference: nn.Module, rows: Sequence[Row], scorer: Scorer, settings: Settings
) -> list[list[tuple[Tensor, Tensor]]]:
    """The reference's log-probs of each part of each step, computed ahead."""
    starts = range(0, len(rows), settings.batch_size)
    with torch.no_grad(), _autocast(settings):
        return [
            [
                scorer.score(reference, part)[:2]
                for part in scorer.plan(rows[start : start + settings.batch_size])
            ]
            for start in starts
        ]


def _autocast(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(settings.device, dtype=torch.bfloat16, enabled=settings.bf16)
