"""A linear head in plain PyTorch, by chunks of rows: what `chunked` and `divergence` have in common.

What goes into a head and its check, logits, softmax, extras, and the way from a gradient at the logits back
to the gradients of hidden, weight and bias. Leaves out autograd, and what to keep and what to compute again.

Shapes: N rows, C rows of one chunk or block, H hidden size, V vocabulary, E extras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kit.logprob.slices import slices

EXTRAS = ("entropy", "squared_probs", "top1")

# What is kept between forward and backward, and the share of that for one chunk: large enough
# for an efficient matrix product, small against the model.
KEEP_BYTES = 768 * 2**20
CHUNK_BYTES = 128 * 2**20
# Element-wise passes go over a chunk in blocks that fit the processor's cache.
BLOCK_BYTES = 4 * 2**20
# Rows of the weight's gradient that are turned into fp32 at once, for the same reason.
_WEIGHT_ROWS = 4096


@dataclass(frozen=True)
class HeadInputs:
    """What a model's head is about to turn into logits.

    The logits are `z = scale * (hidden @ weight.T + bias)`, and `softcap * tanh(z / softcap)` where there
    is a soft cap.

    Attributes:
        hidden: [N, H] hidden states, floating point; N may be 0.
        weight: [V, H] the head's matrix.
        bias: [V] or None.
        softcap: positive, or None.
        scale: factor on the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def computing_dtype(self) -> torch.dtype:
        """Of the matrix products, as autocast does for a linear layer; reductions stay in fp32."""
        device = self.hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self.hidden.dtype

    def wants_gradient(self) -> bool:
        """Whether grad mode is on and one of the tensors asks for a gradient."""
        tensors = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def detach(self) -> HeadInputs:
        """The same without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return HeadInputs(self.hidden.detach(), self.weight.detach(), bias, self.softcap, self.scale)

    def to(self, dtype: torch.dtype) -> HeadInputs:
        """The same with every tensor in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return HeadInputs(self.hidden.to(dtype), self.weight.to(dtype), bias, self.softcap, self.scale)

    def logits(self, rows: slice) -> Tensor:
        """[C, V] in the dtype of the tensors, which must be one."""
        hidden, weight = self.hidden[rows], self.weight
        logits_CV = hidden @ weight.T if self.bias is None else torch.addmm(self.bias, hidden, weight.T)
        if self.scale != 1.0:
            logits_CV *= self.scale
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV


def check(head: HeadInputs, targets: Tensor, extras: Sequence[str]) -> None:
    """Raise ValueError where shapes do not fit, a target is no token or an extra is unknown."""
    hidden, weight, bias, softcap = head.hidden, head.weight, head.bias, head.softcap
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"expected hidden [N, H] and weight [V, H], got {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected targets [{hidden.shape[0]}], got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {tuple(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if unknown := set(extras) - set(EXTRAS):
        raise ValueError(f"unknown extras {sorted(unknown)}; known: {', '.join(EXTRAS)}")
    # On an accelerator the look at the values would wait for the device.
    if targets.device.type == "cpu" and len(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets must lie in 0 .. {weight.shape[0] - 1}, got {low} .. {high}")


def chunk_rows(length: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk: all alike, since a small last one multiplies slowly."""
    chunks = max(1, math.ceil(length * row_bytes / chunk_bytes))
    return max(1, math.ceil(length / chunks))


def blocks(x_CV: Tensor) -> list[slice]:
    """The rows of a chunk, in blocks for element-wise passes."""
    return slices(len(x_CV), max(1, BLOCK_BYTES // (x_CV.shape[1] * 4)))


def softmax_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a [C, V] block of logits, in place, into probabilities.

    Returns:
        [C] logits of the targets, largest logits, log-sum-exps.
    """
    target = logits.gather(1, targets[:, None]).squeeze(1)
    highest = logits.amax(-1)
    torch.softmax(logits, -1, out=logits)
    # The largest probability is exp(highest - lse) and at least 1 / V, so its logarithm is exact.
    return target, highest, highest - logits.amax(-1).log()


def fill_extras(
    out: Tensor, names: Sequence[str], probs: Tensor, target_logits: Tensor, highest: Tensor
) -> None:
    """Write the named statistics of a [C, V] block of probabilities into the rows of `out` [E, C]."""
    for name, row in zip(names, out, strict=True):
        if name == "entropy":
            row.copy_(torch.special.entr(probs).sum(-1))
        elif name == "squared_probs":
            row.copy_(probs.square().sum(-1))
        elif name == "top1":
            row.copy_(target_logits == highest)
        else:
            raise ValueError(f"'{name}' is not computed from a block")


def slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative of softcap * tanh(z / softcap), from its value."""
    return None if softcap is None else 1 - (capped / softcap).square()


def subtract_one_hot_(probs: Tensor, targets: Tensor) -> None:
    """To be called before rounding, or 1 - p of a sure token is lost."""
    places = torch.arange(len(probs), device=probs.device) * probs.shape[1] + targets
    probs.view(-1).index_add_(0, places, -probs.new_ones(len(probs)))


def store(block: Tensor, factor: Tensor | None, out: Tensor) -> None:
    """out = block * factor, where `block` may be `out` itself or a copy of it in higher precision."""
    if factor is not None:
        block *= factor
    if block.data_ptr() != out.data_ptr():
        out.copy_(block)


class HeadGradients:
    """The gradients of hidden, weight and bias, as far as they are wanted, summed chunk by chunk."""

    def __init__(
        self, head: HeadInputs, wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None]
    ) -> None:
        """
        Args:
            head: in the dtype of the matrix products.
            wanted: for hidden, weight and bias.
            dtypes: of the results.
        """
        self._head, self._dtypes = head, dtypes
        # Sums over several chunks are kept in fp32, as one matrix product would keep them.
        summed = torch.promote_types(head.hidden.dtype, torch.float32)
        self._hidden = torch.empty_like(head.hidden, dtype=dtypes[0]) if wanted[0] else None
        self._weight = torch.empty_like(head.weight, dtype=summed) if wanted[1] else None
        if self._weight is not None and not len(head.hidden):
            self._weight.zero_()
        self._bias = (
            torch.zeros_like(head.bias, dtype=summed) if wanted[2] and head.bias is not None else None
        )

    def add(self, rows: slice, difference_CV: Tensor, factor_C1: Tensor) -> None:
        """Add a chunk whose gradient at hidden @ weight.T + bias is difference * factor; in order.

        The factor goes to the small side of each product, so that nothing passes over C x V numbers but
        the products.
        """
        hidden, weight = self._head.hidden[rows], self._head.weight
        if self._hidden is not None:
            self._hidden[rows] = (difference_CV @ weight) * factor_C1
        if self._weight is not None:
            scaled = (hidden * factor_C1).to(hidden.dtype)
            _add_product(self._weight, difference_CV, scaled, first=rows.start == 0)
        if self._bias is not None:
            self._bias += (difference_CV.T @ factor_C1.to(hidden.dtype)).squeeze(1)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias; None where not wanted."""
        _, weight_dtype, bias_dtype = self._dtypes
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(weight_dtype),
            None if self._bias is None else self._bias.to(bias_dtype),
        )


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
