"""Token log-probs at bounded memory, in plain PyTorch, on any device.

The rows are taken in chunks. A chunk's logits become, in place, its probabilities minus one at the target:
the gradient with respect to the logits but for its sign and factor. They are kept for the backward pass
while they fit the byte budget and computed again where they do not.

Shapes: N rows, C rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What is kept between forward and backward, and the share of that for one chunk: large enough
# for an efficient matrix product, small against the model.
KEEP_BYTES = 768 * 2**20
CHUNK_BYTES = 128 * 2**20
# Element-wise passes go over a chunk in blocks that fit the processor's cache.
BLOCK_BYTES = 4 * 2**20


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
    """See `dpo_kit.logprob.token_logprobs`; at most about `keep_bytes + chunk_bytes` beyond its inputs."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for a linear layer; the reduction over the vocabulary stays in fp32.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # Under no_grad autograd still calls forward, and tells it that its inputs want gradients.
    keep_bytes = keep_bytes if torch.is_grad_enabled() else 0
    with torch.autocast(device, enabled=False):
        logps, entropy = _ChunkedLogProbs.apply(
            hidden, weight, bias, targets, softcap, scale, "entropy" in extras, keep_bytes, chunk_bytes
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
        softcap: float | None,
        scale: float,
        with_entropy: bool,
        keep_bytes: int,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        row_bytes = weight.shape[0] * hidden.element_size()
        rows = max(1, chunk_bytes // row_bytes)
        reduced = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=reduced, device=hidden.device)
        lse = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if with_entropy else None
        budget = keep_bytes
        kept: list[Tensor | None] = []
        for chunk in _slices(len(hidden), rows):
            logits = _logits(hidden[chunk], weight, bias, softcap, scale)
            _to_difference(logits, targets[chunk], logps[chunk], lse[chunk], _part(entropy, chunk))
            budget -= logits.numel() * logits.element_size()
            kept.append(logits if budget >= 0 else None)
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
        chunks = _slices(len(hidden), ctx.rows)
        # Sums over several chunks are kept in fp32, as one matrix product would keep them.
        summed = lse.dtype if len(chunks) > 1 else hidden.dtype
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=summed) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=summed) if wants_bias else None
        for i, chunk in enumerate(chunks):
            # A second pass over the same graph finds nothing kept and computes it again.
            difference, ctx.kept[i] = ctx.kept[i], None
            if difference is None:
                difference = _logits(hidden[chunk], weight, bias, ctx.softcap, ctx.scale)
                _normalise(difference, targets[chunk], lse[chunk])
            grad = _to_logit_gradient(
                difference, targets[chunk], lse[chunk], grad_logps[chunk], ctx.softcap, ctx.scale
            )
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if grad_weight is not None and summed == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[chunk])
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[chunk]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=summed)
        grad_weight, grad_bias = (None if g is None else g.to(hidden.dtype) for g in (grad_weight, grad_bias))
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


def _slices(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _blocks(x_CV: Tensor) -> list[slice]:
    return _slices(len(x_CV), max(1, BLOCK_BYTES // (x_CV.shape[1] * 4)))


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


def _to_difference(
    logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, entropy: Tensor | None
) -> None:
    """Turn [C, V] logits into probabilities minus one-hot in place; fill in [C] log-probs, log-sum-exps,
    entropies."""
    for rows in _blocks(logits):
        block = logits[rows].to(lse.dtype)
        target = block.gather(1, targets[rows, None]).squeeze(1)
        highest, place = block.max(-1)
        torch.softmax(block, -1, out=block)
        # The largest probability is exp(highest - lse) and at least 1 / V, so its logarithm is exact.
        lse[rows] = highest - block.gather(1, place[:, None]).squeeze(1).log()
        logps[rows] = target - lse[rows]
        if entropy is not None:
            entropy[rows] = torch.special.entr(block).sum(-1)
        _minus_one_hot(block, targets[rows])
        if block.dtype != logits.dtype:
            logits[rows] = block.to(logits.dtype)


def _normalise(logits: Tensor, targets: Tensor, lse: Tensor) -> None:
    """The same where the log-sum-exps are known already."""
    for rows in _blocks(logits):
        block = logits[rows].to(lse.dtype).sub_(lse[rows, None]).exp_()
        _minus_one_hot(block, targets[rows])
        logits[rows] = block.to(logits.dtype)


def _minus_one_hot(probs: Tensor, targets: Tensor) -> None:
    """Subtract 1 at each row's target, in place; before rounding, or 1 - p of a sure token is lost."""
    places = torch.arange(len(probs), device=probs.device) * probs.shape[1] + targets
    probs.view(-1).index_add_(0, places, -probs.new_ones(len(probs)))


def _to_logit_gradient(
    difference: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Turn [C, V] probabilities minus one-hot into the gradient at hidden @ weight.T + bias, in place."""
    grad_C1 = -(grad_logps * scale)[:, None]
    for rows in _blocks(difference):
        block = difference[rows].to(lse.dtype)
        if softcap is not None:
            # logit = softcap * tanh(z / softcap), so dlogit/dz = 1 - (logit / softcap) ** 2; the logit is
            # log p + lse, and where p underflowed the product with p is 0 whatever the slope.
            probs = block.clone()
            _minus_one_hot(probs.neg_(), targets[rows])
            capped = probs.neg_().clamp_(min=0).log().add_(lse[rows, None]).div_(softcap).clamp_(-1, 1)
            block.mul_(1 - capped.square())
        block.mul_(grad_C1[rows])
        if block.dtype != difference.dtype:
            difference[rows] = block.to(difference.dtype)
    return difference
