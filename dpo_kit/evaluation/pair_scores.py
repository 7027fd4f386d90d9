"""Log-probs under one model: of micro-batches in turn, and of both replies of every pair of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from datasets import Dataset
from torch import nn

from dpo_kit.attention import attention_backend
from dpo_kit.examples import Example, PairTokens
from dpo_kit.packing import Layout, MicroBatch, plan_step
from dpo_kit.scoring import SequenceLogProbs, choose_layout, sequence_logprobs

# Pairs that are planned together: many enough that like prompts meet, few enough to hold.
_PAIRS_AT_ONCE = 256


def score_batches(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[MicroBatch, SequenceLogProbs]]:
    """Score micro-batches in turn, without gradients.

    Args:
        model: a causal LM on the device; in eval mode meanwhile.
        batches: what is scored.
        device: of the model.
        autocast: what the forward passes run in, whatever the caller runs in; None for the weights' dtype.

    Yields:
        Each micro-batch, on the device, with its log-probs.
    """
    training = model.training
    model.eval()
    try:
        for planned in batches:
            batch = planned.to(device)
            # Not around the yield: there it would hold for the caller too.
            with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                scored = sequence_logprobs(model, batch)
            yield batch, scored
    finally:
        model.train(training)


def score_pairs(
    model: nn.Module,
    dataset: Dataset,
    *,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, list[float] | list[int]], tuple[Layout, str]]:
    """Score a tokenised data set (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    Args:
        model: a causal LM.
        dataset: at least one pair.
        token_budget: tokens of one forward pass.
        progress: called with the number of pairs done since the last call.

    Returns:
        Columns chosen_logp, rejected_logp (nats, summed over the completion) and chosen_tokens,
        rejected_tokens, in the order of the data set; and the layout with the reason for it.
    """
    device = next(model.parameters()).device
    probe = [PairTokens.from_row(row) for row in dataset.select(range(min(len(dataset), _PAIRS_AT_ONCE)))]
    backend = attention_backend(device.type)
    layout, reason = choose_layout(model, probe, backend)
    values = torch.empty(len(dataset), 2, dtype=torch.float64)
    lengths = torch.empty(len(dataset), 2, dtype=torch.int64)
    lots = _numbered_pairs(dataset)
    batches = (batch for pairs in lots for batch in plan_step(pairs, token_budget, layout, backend))
    for batch, scored in score_batches(model, batches, device):
        index = torch.tensor([int(source) for source in batch.sources])
        values[index] = scored.sequences.view(2, -1).T.double().cpu()
        lengths[index] = batch.lengths.view(2, -1).T.cpu()
        if progress is not None:
            progress(batch.num_pairs)
    columns: dict[str, list[float] | list[int]] = {
        "chosen_logp": values[:, 0].tolist(),
        "rejected_logp": values[:, 1].tolist(),
        "chosen_tokens": lengths[:, 0].tolist(),
        "rejected_tokens": lengths[:, 1].tolist(),
    }
    return columns, (layout, reason)


def _numbered_pairs(dataset: Dataset) -> Iterator[list[Example]]:
    """Lots of pairs; the number of each travels where its source would, through the order packing makes."""
    for start in range(0, len(dataset), _PAIRS_AT_ONCE):
        rows = dataset.select(range(start, min(start + _PAIRS_AT_ONCE, len(dataset))))
        yield [PairTokens.from_row(row | {"source": str(start + i)}) for i, row in enumerate(rows)]
