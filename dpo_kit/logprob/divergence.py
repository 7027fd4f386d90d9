"""Token log-probs of policy and reference, and the divergence of their whole distributions at every token.

For losses that look at distributions, not at the given tokens alone: TDPO (arXiv 2404.11999)
takes KL(reference || policy) at every position, with gradient. With p the policy's probabilities and q the
reference's, the gradients at the policy's logits are

    of a log-prob   one-hot - p
    of the KL       p - q

so both come from the same pass as the values. As in `chunked`, rows are taken in chunks; a chunk's two
matrices of logits become, in place, p - one-hot and p - q, which are kept for the backward pass while they
fit the byte budget and computed again where they do not.

Plain PyTorch on any device. Leaves out Triton kernels, and a gradient to the reference.
Shapes: N rows, C rows of one chunk, H hidden size (its own for each model), V vocabulary, E extras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    check,
    chunk_rows,
    fill_extras,
    slope,
    softmax_,
    store,
    subtract_one_hot_,
)
from dpo_kit.logprob.slices import slices


def token_logprobs_and_kl(
    policy: HeadInputs,
    reference: HeadInputs,
    targets: Tensor,
    *,
    extras: Sequence[str] = (),
    keep_bytes: int = KEEP_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs of `targets` under policy and reference, and KL(reference || policy) of each row.

    Beyond inputs and gradients it holds about `keep_bytes + chunk_bytes` at most; the weight's gradient is
    summed in fp32, and autocast adds a copy of both weights in its dtype.

    Args:
        policy: gradients flow to its hidden, weight and bias, and are computed only for those that ask.
        reference: of the same N and V; H, soft cap, scale and dtype may differ. It gets no gradient.
        targets: [N] token ids, integer, 0 <= id < V.
        extras: statistics of the policy's distributions, see `dpo_kit.logprob.token_logprobs`.
        keep_bytes: the gradients at both models' logits are kept for the backward pass up to this size.
        chunk_bytes: of both models' logits that are held at a time where they are not kept.

    Returns:
        [N] the policy's log-probs in nats, with gradient; [N] the reference's, without; [N] KL(reference ||
        policy) in nats, with gradient, infinite where the policy rules out what the reference does not; a
        dict of [N] extras, without. All fp32, or fp64 where one of the inputs is.

    Raises:
        ValueError: shapes that do not fit, different N or V, a target outside the vocabulary (on an
            accelerator the device's own error), unknown extras.
    """
    check(policy, targets, extras)
    check(reference, targets, ())
    if len(policy.weight) != len(reference.weight):
        sizes = f"{len(policy.weight)} and {len(reference.weight)}"
        raise ValueError(f"policy and reference must have one vocabulary, got {sizes} tokens")
    settings = _Settings(
        policy.computing_dtype(),
        policy.softcap,
        policy.scale,
        reference.detach().to(reference.computing_dtype()),
        tuple(extras),
        keep_bytes if policy.wants_gradient() else 0,
        chunk_bytes,
    )
    with torch.autocast(policy.hidden.device.type, enabled=False):
        logps, kl, reference_logps, statistics = _LogProbsAndKL.apply(
            policy.hidden, policy.weight, policy.bias, targets, settings
        )
    return logps, reference_logps, kl, dict(zip(extras, statistics, strict=True))


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype
    softcap: float | None
    scale: float
    reference: HeadInputs
    extras: tuple[str, ...]
    keep_bytes: int
    chunk_bytes: int


@dataclass(frozen=True)
class _Results:
    """[N] each, extras [E, N]; or the same of some rows, to be written to."""

    logps: Tensor
    lse: Tensor
    reference_logps: Tensor
    reference_lse: Tensor
    kl: Tensor
    extras: Tensor

    def __getitem__(self, rows: slice) -> _Results:
        return _Results(*(x[..., rows] for x in vars(self).values()))


class _LogProbsAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        policy = HeadInputs(hidden, weight, bias, settings.softcap, settings.scale).to(settings.dtype)
        reference = settings.reference
        row_bytes = len(weight) * (policy.hidden.element_size() + reference.hidden.element_size())
        ctx.rows = chunk_rows(len(hidden), row_bytes, settings.chunk_bytes)
        dtype = torch.promote_types(policy.hidden.dtype, reference.hidden.dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        lse, reference_logps, reference_lse, kl = (torch.empty_like(logps) for _ in range(4))
        statistics = logps.new_empty(len(settings.extras), len(hidden))
        results = _Results(logps, lse, reference_logps, reference_lse, kl, statistics)
        budget = settings.keep_bytes
        ctx.kept = []
        for chunk in slices(len(hidden), ctx.rows):
            pair = policy.logits(chunk), reference.logits(chunk)
            budget -= sum(x.nbytes for x in pair)
            keep = budget >= 0
            _reduce(*pair, targets[chunk], results[chunk], settings.extras, settings.softcap, keep)
            ctx.kept.append(pair if keep else None)
            del pair  # before the next chunk is made
        ctx.save_for_backward(
            *(policy.hidden, policy.weight, policy.bias),
            *(reference.hidden, reference.weight, reference.bias),
            *(targets, lse, reference_lse),
        )
        ctx.forms = (policy.softcap, policy.scale), (reference.softcap, reference.scale)
        ctx.mark_non_differentiable(reference_logps, statistics)
        return logps, kl, reference_logps, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, targets, lse, reference_lse = ctx.saved_tensors
        policy = HeadInputs(*tensors[:3], *ctx.forms[0])
        reference = HeadInputs(*tensors[3:], *ctx.forms[1])
        gradients = HeadGradients(policy, ctx.needs_input_grad[:3], ctx.dtypes)
        to_one_hot, to_reference = -grad_logps.to(lse.dtype)[:, None], grad_kl.to(lse.dtype)[:, None]
        # What is added over the vocabulary keeps to the size of probabilities, which fp16 can hold; the
        # size of what arrives from above goes to the small side of each product.
        size = torch.maximum(to_one_hot.abs(), to_reference.abs())
        unit = torch.where(size == 0, 1, size)
        to_one_hot, to_reference = to_one_hot / unit, to_reference / unit
        for i, chunk in enumerate(slices(len(policy.hidden), ctx.rows)):
            # A second pass over the same graph finds nothing kept and computes it again.
            pair, ctx.kept[i] = ctx.kept[i], None
            if pair is None:
                pair = policy.logits(chunk), reference.logits(chunk)
                _to_differences(*pair, targets[chunk], lse[chunk], reference_lse[chunk], policy.softcap)
            difference = _weighted_sum_(pair[0], pair[1], to_one_hot[chunk], to_reference[chunk])
            gradients.add(chunk, difference, size[chunk] * policy.scale)
            del pair, difference
        return *gradients.results(), None, None


def _reduce(
    logits: Tensor,
    reference_logits: Tensor,
    targets: Tensor,
    results: _Results,
    extras: tuple[str, ...],
    softcap: float | None,
    keep: bool,
) -> None:
    """Fill in the results of two [C, V] matrices of logits.

    The logits are used up; where they are to be kept they become what `_to_differences` makes of them.
    """
    for rows in blocks(logits):
        out, ids = results[rows], targets[rows]
        p = logits[rows].to(out.lse.dtype)
        q = reference_logits[rows].to(out.lse.dtype)
        factor = slope(p, softcap) if keep else None
        log_ratio = q - p
        target, highest, lse = softmax_(p, ids)
        reference_target, _, reference_lse = softmax_(q, ids)
        out.lse.copy_(lse)
        out.logps.copy_(target - lse)
        out.reference_lse.copy_(reference_lse)
        out.reference_logps.copy_(reference_target - reference_lse)
        log_ratio -= (reference_lse - lse)[:, None]
        # q log q -> 0 as q -> 0; two logits of -inf have no difference.
        log_ratio.masked_fill_(q == 0, 0.0)
        out.kl.copy_(log_ratio.mul_(q).sum(-1))
        fill_extras(out.extras, extras, p, target, highest)
        if keep:
            _store_differences(p, q, ids, factor, logits[rows], reference_logits[rows])


def _to_differences(
    logits: Tensor,
    reference_logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    reference_lse: Tensor,
    softcap: float | None,
) -> None:
    """Turn [C, V] logits, in place, into p - one-hot and p - q, times the slope of the policy's soft cap."""
    for rows in blocks(logits):
        p = logits[rows].to(lse.dtype)
        q = reference_logits[rows].to(lse.dtype)
        factor = slope(p, softcap)
        p.sub_(lse[rows, None]).exp_()
        q.sub_(reference_lse[rows, None]).exp_()
        _store_differences(p, q, targets[rows], factor, logits[rows], reference_logits[rows])


def _store_differences(
    p: Tensor, q: Tensor, targets: Tensor, factor: Tensor | None, out: Tensor, reference_out: Tensor
) -> None:
    """Both differences are taken before rounding; p and q are used up."""
    torch.sub(p, q, out=q)
    store(q, factor, reference_out)
    subtract_one_hot_(p, targets)
    store(p, factor, out)


def _weighted_sum_(a_CV: Tensor, b_CV: Tensor, weight_a_C1: Tensor, weight_b_C1: Tensor) -> Tensor:
    """weight_a * a + weight_b * b, in place of a."""
    for rows in blocks(a_CV):
        block = a_CV[rows].to(weight_a_C1.dtype)
        block.mul_(weight_a_C1[rows]).addcmul_(b_CV[rows].to(block.dtype), weight_b_C1[rows])
        store(block, None, a_CV[rows])
    return a_CV
