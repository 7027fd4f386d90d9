"""Token log-probs at bounded memory, in plain PyTorch, on any device.

The rows are taken in chunks. A chunk's logits become, in place, its probabilities minus one at the target:
the gradient with respect to the logits but for a factor of each row. They are kept for the backward pass
while they fit the byte budget and computed again where they do not.

Shapes: N rows, C rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_kit.logprob.slices import slices

# What is kept between forward and backward, and the share of that for one chunk: large enough
# for an efficient matrix product, small against the model.
KEEP_BYTES = 768 * 2**20
CHUNK_BYTES = 128 * 2**20
# Element-wise passes go over a chunk in blocks that fit the processor's cache.
BLOCK_BYTES = 4 * 2**20
# Rows of the weight's gradient that are turned into fp32 at once, for the same reason.
_WEIGHT_ROWS = 4096


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
    device = hidden.device.type
    # As autocast does for a linear layer; the reduction over the vocabulary stays in fp32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Under no_grad autograd still calls forward, and tells it that its inputs want gradients.
    keep_bytes = keep_bytes if torch.is_grad_enabled() else 0
    with torch.autocast(device, enabled=False):
        logps, entropy = _ChunkedLogProbs.apply(
            hidden, weight, bias, targets, dtype, softcap, scale, "entropy" in extras, keep_bytes, chunk_bytes
        )
    return logps, {"entropy": entropy} if "entropy" in extras else {}


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
        with_entropy: bool,
        keep_bytes: int,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = _chunk_rows(len(hidden), weight.shape[0] * hidden.element_size(), chunk_bytes)
        reduced = torch.promote_types(dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=reduced, device=hidden.device)
        lse = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if with_entropy else None
        budget = keep_bytes
        kept: list[Tensor | None] = []
        for chunk in slices(len(hidden), rows):
            logits = _logits(hidden[chunk], weight, bias, softcap, scale)
            budget -= logits.numel() * logits.element_size()
            keep = budget >= 0
            _reduce(logits, targets[chunk], logps[chunk], lse[chunk], _part(entropy, chunk), softcap, keep)
            kept.append(logits if keep else None)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.kept, ctx.rows, ctx.softcap, ctx.scale = kept, rows, softcap, scale
        entropy = logps.new_empty(0) if entropy is None else entropy
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        # Sums over several chunks are kept in fp32, as one matrix product would keep them.
        grad_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight, dtype=lse.dtype) if wants_weight else None
        if grad_weight is not None and not len(hidden):
            grad_weight.zero_()
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if wants_bias else None
        # The gradient at the logits is softmax minus one-hot times a factor per row. The factor goes to the
        # small side of each product, so that nothing passes over C x V numbers but the products.
        factor = -(grad_logps * ctx.scale).to(lse.dtype)[:, None]
        for i, chunk in enumerate(slices(len(hidden), ctx.rows)):
            # A second pass over the same graph finds nothing kept and computes it again.
            difference, ctx.kept[i] = ctx.kept[i], None
            if difference is None:
                difference = _logits(hidden[chunk], weight, bias, ctx.softcap, ctx.scale)
                _to_difference(difference, targets[chunk], lse[chunk], ctx.softcap)
            if grad_hidden is not None:
                grad_hidden[chunk] = (difference @ weight) * factor[chunk]
            if grad_weight is not None:
                scaled = (hidden[chunk] * factor[chunk]).to(hidden.dtype)
                _add_product(grad_weight, difference, scaled, first=i == 0)
            if grad_bias is not None:
                grad_bias += (difference.T @ factor[chunk].to(hidden.dtype)).squeeze(1)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(bias_dtype),
            *(None,) * 7,
        )


def _chunk_rows(length: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk: all alike, since a small last one multiplies slowly."""
    chunks = max(1, math.ceil(length * row_bytes / chunk_bytes))
    return max(1, math.ceil(length / chunks))


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _blocks(x_CV: Tensor) -> list[slice]:
    return slices(len(x_CV), max(1, BLOCK_BYTES // (x_CV.shape[1] * 4)))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """[C, V] logits in the dtype of `hidden`."""
    logits_CV = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    if scale != 1.0:
        logits_CV *= scale
    if softcap is not None:
        logits_CV.div_(softcap).tanh_().mul_(softcap)
    return logits_CV


def _reduce(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    softcap: float | None,
    keep: bool,
) -> None:
    """Fill in [C] log-probs, log-sum-exps and entropies of [C, V] logits.

    The logits are used up; where they are to be kept they become what `_to_difference` makes of them.
    """
    for rows in _blocks(logits):
        block = logits[rows].to(lse.dtype)
        target = block.gather(1, targets[rows, None]).squeeze(1)
        slope = _slope(block, softcap) if keep else None
        highest = block.amax(-1)
        torch.softmax(block, -1, out=block)
        # The largest probability is exp(highest - lse) and at least 1 / V, so its logarithm is exact.
        lse[rows] = highest - block.amax(-1).log()
        logps[rows] = target - lse[rows]
        if entropy is not None:
            entropy[rows] = torch.special.entr(block).sum(-1)
        if keep:
            _finish_difference(block, targets[rows], slope, logits[rows])


def _to_difference(logits: Tensor, targets: Tensor, lse: Tensor, softcap: float | None) -> None:
    """Turn [C, V] logits, in place, into probabilities minus one-hot, times the slope of the soft cap."""
    for rows in _blocks(logits):
        block = logits[rows].to(lse.dtype)
        slope = _slope(block, softcap)
        block.sub_(lse[rows, None]).exp_()
        _finish_difference(block, targets[rows], slope, logits[rows])


def _slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative of softcap * tanh(z / softcap), from its value."""
    return None if softcap is None else 1 - (capped / softcap).square()


def _finish_difference(probs: Tensor, targets: Tensor, slope: Tensor | None, out: Tensor) -> None:
    """One is subtracted before rounding, or 1 - p of a sure token is lost."""
    places = torch.arange(len(probs), device=probs.device) * probs.shape[1] + targets
    probs.view(-1).index_add_(0, places, -probs.new_ones(len(probs)))
    if slope is not None:
        probs *= slope
    if probs.data_ptr() != out.data_ptr():
        out.copy_(probs)


def _add_product(total_VH: Tensor, difference_CV: Tensor, scaled_CH: Tensor, first: bool) -> None:
    """total += difference.T @ scaled, or = where it is the first one."""
    if total_VH.dtype == difference_CV.dtype:
        total_VH.addmm_(difference_CV.T, scaled_CH, beta=0 if first else 1)
        return
    for rows in slices(len(total_VH), _WEIGHT_ROWS):
        product = difference_CV[:, rows].T @ scaled_CH
        if first:
            total_VH[rows] = product
        else:
            total_VH[rows] += product
