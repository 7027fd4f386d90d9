"""Token log-probs on CUDA: matrix products by cuBLAS, everything between them in Triton kernels.

With D the gradient of each row's log-prob with respect to its products, and g what arrives from above,

    gradient of hidden = g * (D @ weight)       made in the forward pass but for the factor
    gradient of weight = D.T @ (g * hidden)     D kept where it fits the budget, else made again

so that g meets [N, H] numbers and never [N, V] ones, and a frozen head costs two matrix products in all: no
backward pass over the vocabulary, no logits computed again.

The forward pass goes by rows, whose log-sum-exp needs the whole vocabulary. The backward pass, which knows
it, goes by slices of the vocabulary, all rows at once: each slice of the weight's gradient is written once,
with all of its sum inside one matrix product, and needs no fp32 sum of the weight's size.

Leaves out CPU tensors (`chunked`), double backward and forward-mode derivatives.
Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_kit.logprob import kernels
from dpo_kit.logprob.slices import slices

# D is kept between forward and backward up to this size.
KEEP_BYTES = 512 * 2**20
# One chunk of products: about a thousand rows of a vocabulary of 128k in bf16, which keeps a matrix
# product at its full rate.
CHUNK_BYTES = 256 * 2**20
# Rows or columns of a chunk are whole tiles of the matrix product.
_TILE = 128


@dataclass(frozen=True)
class _Settings:
    softcap: float | None
    scale: float
    extras: tuple[str, ...]
    autocast: torch.dtype | None
    keep_bytes: int
    chunk_bytes: int

    @property
    def head(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "scale": self.scale}

    def cast(self, x: Tensor) -> Tensor:
        """As autocast does for a linear layer; the reduction over the vocabulary stays in fp32."""
        return x if self.autocast is None else x.to(self.autocast)

    def lines(self, length: int, itemsize: int) -> int:
        """Rows, or columns, of one chunk where each holds `length` products."""
        return max(_TILE, self.chunk_bytes // max(1, length * itemsize) // _TILE * _TILE)


def fused_token_logprobs(
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
    fused_product: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `dpo_kit.logprob.token_logprobs`; a target outside the vocabulary gets NaN.

    Beyond inputs, results and gradients it holds at most `chunk_bytes` and an [N, H] matrix where the head
    is frozen; where it is not, `keep_bytes` at most of D and another [N, H] matrix as well. Autocast adds
    copies of hidden and weight in its dtype.

    Args:
        keep_bytes: D is kept for the backward pass up to this size.
        chunk_bytes: of products held at a time where they are not kept (at least 128 rows or columns).
        fused_product: compute the log-probs in one kernel that writes no logits; only where no gradient is
            wanted. It does not round logits to the dtype of `hidden`, so its log-probs differ from the
            others' in low precision: do not take one side of a margin from it.

    Raises:
        ValueError: tensors on the CPU without Triton's interpreter; `fused_product` in fp64 or where a
            gradient is wanted.
    """
    device = hidden.device.type
    if device != "cuda" and not kernels.INTERPRETED:
        raise ValueError(f"impl 'fused' needs tensors on a CUDA device, got {device}; 'chunked' needs none")
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = _Settings(softcap, scale, extras, autocast, keep_bytes, chunk_bytes)
    inputs = (hidden, weight, bias)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if fused_product and (wants_gradient or hidden.dtype == torch.float64):
        raise ValueError("fused_product takes fp16, bf16 or fp32 and gives no gradient; leave it False")
    # The kernels go by pointers; the matrix products take any strides.
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    with torch.autocast(device, enabled=False), torch.cuda.device_of(hidden):
        if wants_gradient:
            results = _FusedLogProbs.apply(hidden, weight, bias, targets, settings)
        elif fused_product:
            hidden, weight = settings.cast(hidden), settings.cast(weight)
            results = kernels.product_statistics(hidden, weight, bias, targets, extras, **settings.head)
        else:
            hidden, weight = settings.cast(hidden), settings.cast(weight)
            results, _, _ = _forward(hidden, weight, bias, targets, settings)
    logps, _, *statistics = results
    return logps, dict(zip(extras, statistics, strict=True))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: _Settings,
    *,
    wants_hidden: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By chunks of rows, the same whatever is wanted: log-probs with and without gradient are bit-equal.

    Returns:
        [2 + E, N] `kernels.statistics`; [N, V] D where it is to be kept, else a buffer; [N, H] D @ weight
        where it is wanted.
    """
    n, v = len(hidden), len(weight)
    step = settings.lines(v, hidden.element_size())
    products = kernels.product_buffer(n if keep else min(n, step), v, hidden)
    unit_gradient = torch.empty_like(hidden) if wants_hidden else None
    reduced = torch.promote_types(hidden.dtype, torch.float32)
    results = torch.empty(2 + len(settings.extras), n, dtype=reduced, device=hidden.device)
    for rows in slices(n, step):
        chunk = products[rows] if keep else products[: rows.stop - rows.start]
        torch.mm(hidden[rows], weight.T, out=chunk)
        result = kernels.statistics(chunk, bias, targets[rows], settings.extras, **settings.head)
        results[:, rows] = result
        if keep or wants_hidden:
            kernels.to_gradient_(chunk, bias, targets[rows], result[0], result[1], first=0, **settings.head)
        if unit_gradient is not None:
            torch.mm(chunk, weight, out=unit_gradient[rows])
    return results, products, unit_gradient


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_head = wants_weight or wants_bias
        low = settings.cast(hidden)
        keep = wants_head and len(low) * len(weight) * low.element_size() <= settings.keep_bytes
        results, products, unit_gradient = _forward(
            low, settings.cast(weight), bias, targets, settings, wants_hidden=wants_hidden, keep=keep
        )
        logps, lse, *statistics = (row.clone() for row in results)
        inputs = (low, weight, bias, targets) if wants_head else (None,) * 4
        ctx.save_for_backward(*inputs, logps, lse, products if keep else None, unit_gradient)
        ctx.settings, ctx.hidden_dtype = settings, hidden.dtype
        ctx.mark_non_differentiable(lse, *statistics)
        return logps, lse, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logps, lse, kept, unit_gradient = ctx.saved_tensors
        _, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = grad_weight = grad_bias = None
        if unit_gradient is not None:
            grad_hidden = _scale_rows(unit_gradient, grad_logps, ctx.hidden_dtype)
        if wants_weight:
            grad_weight = torch.empty_like(weight)
            scaled_hidden = _scale_rows(hidden, grad_logps, hidden.dtype)
        if wants_bias:
            grad_bias = torch.empty_like(bias)
        if wants_weight or wants_bias:
            inputs = (hidden, weight, bias, targets, logps, lse)
            for columns, chunk in _gradient_by_columns(kept, inputs, ctx.settings):
                if grad_weight is not None:
                    _product_into(grad_weight[columns], chunk.T, scaled_hidden)
                if grad_bias is not None:
                    grad_bias[columns] = torch.mv(chunk.T, grad_logps.to(chunk.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None


def _gradient_by_columns(
    kept: Tensor | None, inputs: tuple[Tensor, ...], settings: _Settings
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with its [N, columns] of D; a slice's D lasts until the next."""
    hidden, weight, bias, targets, logps, lse = inputs
    step = min(len(weight), settings.lines(len(hidden), hidden.element_size()))
    products = kernels.product_buffer(len(hidden), step, hidden) if kept is None else kept
    for columns in slices(len(weight), step):
        if kept is not None:
            yield columns, kept[:, columns]
            continue
        chunk = products[:, : columns.stop - columns.start]
        torch.mm(hidden, settings.cast(weight[columns]).T, out=chunk)
        part, first = None if bias is None else bias[columns], columns.start
        kernels.to_gradient_(chunk, part, targets, logps, lse, first=first, **settings.head)
        yield columns, chunk


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _scale_rows(x_NH: Tensor, factor_N: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor[:, None], multiplied in the factor's precision and rounded once."""
    return torch.mul(x_NH, factor_N[:, None], out=torch.empty(x_NH.shape, dtype=dtype, device=x_NH.device))
