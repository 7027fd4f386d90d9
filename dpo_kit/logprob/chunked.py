"""Token log-probs at bounded memory, in plain PyTorch, on any device.

The rows are taken in chunks. A chunk's logits become, in place, its probabilities minus one at the target:
the gradient with respect to the logits but for a factor of each row. They are kept for the backward pass
while they fit the byte budget and computed again where they do not.

Shapes: N rows, C rows of one chunk, H hidden size, V vocabulary, E extras.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_kit.logprob.head import (
    CHUNK_BYTES,
    KEEP_BYTES,
    HeadGradients,
    HeadInputs,
    blocks,
    chunk_rows,
    fill_extras,
    slope,
    softmax_,
    store,
    subtract_one_hot_,
)
from dpo_kit.logprob.slices import slices


def chunked_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    extras: tuple[str, ...],
    keep_bytes: int = KEEP_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `dpo_kit.logprob.token_logprobs`.

    Beyond inputs and gradients it holds about `keep_bytes + chunk_bytes` at most; the weight's gradient is
    summed in fp32, and autocast adds a copy of the weight in its dtype.
    """
    head = HeadInputs(hidden, weight, bias, softcap, scale)
    dtype = head.computing_dtype()
    # Under no_grad autograd still calls forward, and tells it that its inputs want gradients.
    keep_bytes = keep_bytes if head.wants_gradient() else 0
    with torch.autocast(hidden.device.type, enabled=False):
        logps, statistics = _ChunkedLogProbs.apply(
            hidden, weight, bias, targets, dtype, softcap, scale, extras, keep_bytes, chunk_bytes
        )
    return logps, dict(zip(extras, statistics, strict=True))


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        scale: float,
        extras: tuple[str, ...],
        keep_bytes: int,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        head = HeadInputs(hidden, weight, bias, softcap, scale).to(dtype)
        rows = chunk_rows(len(hidden), len(weight) * head.hidden.element_size(), chunk_bytes)
        reduced = torch.promote_types(dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=reduced, device=hidden.device)
        lse = torch.empty_like(logps)
        statistics = logps.new_empty(len(extras), len(hidden))
        budget = keep_bytes
        kept: list[Tensor | None] = []
        for chunk in slices(len(hidden), rows):
            logits = head.logits(chunk)
            budget -= logits.nbytes
            keep = budget >= 0
            results = logps[chunk], lse[chunk], statistics[:, chunk]
            _reduce(logits, targets[chunk], results, extras, softcap, keep)
            kept.append(logits if keep else None)
            del logits  # before the next chunk is made
        ctx.save_for_backward(head.hidden, head.weight, head.bias, targets, lse)
        ctx.kept, ctx.rows, ctx.softcap, ctx.scale = kept, rows, softcap, scale
        ctx.mark_non_differentiable(statistics)
        return logps, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head = HeadInputs(hidden, weight, bias, ctx.softcap, ctx.scale)
        gradients = HeadGradients(head, ctx.needs_input_grad[:3], ctx.dtypes)
        # The gradient at the logits is softmax minus one-hot times this factor per row.
        factor = -(grad_logps * ctx.scale).to(lse.dtype)[:, None]
        for i, chunk in enumerate(slices(len(hidden), ctx.rows)):
            # A second pass over the same graph finds nothing kept and computes it again.
            difference, ctx.kept[i] = ctx.kept[i], None
            if difference is None:
                difference = head.logits(chunk)
                _to_difference(difference, targets[chunk], lse[chunk], ctx.softcap)
            gradients.add(chunk, difference, factor[chunk])
            del difference
        return *gradients.results(), *(None,) * 7


def _reduce(
    logits: Tensor,
    targets: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    extras: tuple[str, ...],
    softcap: float | None,
    keep: bool,
) -> None:
    """Fill in the results of [C, V] logits: [C] log-probs, [C] log-sum-exps and [E, C] extras.

    The logits are used up; where they are to be kept they become what `_to_difference` makes of them.
    """
    logps, lse, statistics = results
    for rows in blocks(logits):
        block = logits[rows].to(lse.dtype)
        factor = slope(block, softcap) if keep else None
        target, highest, lse[rows] = softmax_(block, targets[rows])
        logps[rows] = target - lse[rows]
        fill_extras(statistics[:, rows], extras, block, target, highest)
        if keep:
            subtract_one_hot_(block, targets[rows])
            store(block, factor, logits[rows])


def _to_difference(logits: Tensor, targets: Tensor, lse: Tensor, softcap: float | None) -> None:
    """Turn [C, V] logits, in place, into probabilities minus one-hot, times the slope of the soft cap."""
    for rows in blocks(logits):
        block = logits[rows].to(lse.dtype)
        factor = slope(block, softcap)
        block.sub_(lse[rows, None]).exp_()
        subtract_one_hot_(block, targets[rows])
        store(block, factor, logits[rows])
