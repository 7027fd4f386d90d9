"""Log-probs of both replies of every pair under one model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import nn

from dpo_kit.attention import attention_backend
from dpo_kit.examples import PairTokens
from dpo_kit.packing import Layout, plan_step
from dpo_kit.scoring import choose_layout, sequence_logprobs

# Pairs that are planned together: many enough that like prompts meet, few enough to hold.
_PAIRS_AT_ONCE = 256


def score_pairs(
    model: nn.Module,
    dataset: Dataset,
    *,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, list[float] | list[int]], tuple[Layout, str]]:
    """Score a tokenised data set (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    Args:
        model: a causal LM, in eval mode afterwards.
        dataset: at least one pair.
        token_budget: tokens of one forward pass.
        progress: called with the number of pairs done since the last call.

    Returns:
        Columns chosen_logp, rejected_logp (nats, summed over the completion) and chosen_tokens,
        rejected_tokens, in the order of the data set; and the layout with the reason for it.
    """
    model.eval()
    device = next(model.parameters()).device
    probe = [PairTokens.from_row(row) for row in dataset.select(range(min(len(dataset), _PAIRS_AT_ONCE)))]
    backend = attention_backend(device.type)
    layout, reason = choose_layout(model, probe, backend)
    values = torch.empty(len(dataset), 2, dtype=torch.float64)
    lengths = torch.empty(len(dataset), 2, dtype=torch.int64)
    for start in range(0, len(dataset), _PAIRS_AT_ONCE):
        rows = dataset.select(range(start, min(start + _PAIRS_AT_ONCE, len(dataset))))
        # The pair's number travels where its source would, through whatever order the packing makes.
        pairs = [PairTokens.from_row(row | {"source": str(start + i)}) for i, row in enumerate(rows)]
        for batch in plan_step(pairs, token_budget, layout, backend):
            with torch.no_grad():
                sums = sequence_logprobs(model, batch.to(device)).sequences
            index = torch.tensor([int(source) for source in batch.sources])
            values[index] = sums.view(2, -1).T.double().cpu()
            lengths[index] = batch.lengths.view(2, -1).T
            if progress is not None:
                progress(batch.num_pairs)
    columns: dict[str, list[float] | list[int]] = {
        "chosen_logp": values[:, 0].tolist(),
        "rejected_logp": values[:, 1].tolist(),
        "chosen_tokens": lengths[:, 0].tolist(),
        "rejected_tokens": lengths[:, 1].tolist(),
    }
    return columns, (layout, reason)
