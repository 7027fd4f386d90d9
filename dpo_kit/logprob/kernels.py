"""Triton kernels for the log-probs of a linear head, and their launchers.

A product is an element of hidden @ weight.T. Its logit is z = scale * (product + bias), or
softcap * tanh(z / softcap) where there is a soft cap.

    statistics           products -> log-probs, log-sum-exps and extras of their rows
    product_statistics   hidden states and weight -> the same, and no product is ever written
    to_gradient_         products -> gradients of the log-probs with respect to them, in place

The vocabulary is cut into tiles, and a tile writes its part of each statistic; `_joined` puts the parts
together. So there is no lock, no atomic and no order of arrival: the same input gives the same bits. All
sums are in fp32 (fp64 for fp64 products), whatever the input.

An extra is two branches, side by side: its part in `_extra_part` and the sum of the parts in `_joined_extra`.
"top1" is neither: the target's logit and the largest, which are there anyhow, say it.

Leaves out the matrix products of the chunked way (cuBLAS) and autograd: see `fused`.
Shapes: N rows, V vocabulary or a slice of it, H hidden size, T tiles of the vocabulary, E extras.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# Elements of one program of the element-wise kernels: 32 a thread, in 16-byte accesses.
TILE = 4096
WARPS = 4
# Rows of products start at multiples of this many elements: wide accesses, and the alignment that fast
# matrix products want, for a vocabulary of 50257 as well.
_ALIGNMENT = 64
# A tile of which every logit is -inf has this as its largest, so that no inf - inf arises.
_LOWEST = tl.constexpr(-1e30)


def product_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] uninitialised products in the dtype and on the device of `like`, rows aligned."""
    stride = triton.cdiv(columns, _ALIGNMENT) * _ALIGNMENT
    return torch.empty(rows, stride, dtype=like.dtype, device=like.device)[:, :columns]


def statistics(
    products_NV: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    extras: tuple[str, ...],
    *,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Statistics of the softmax of each row.

    Args:
        products_NV: from `product_buffer`, filled.
        bias_V: or None.
        targets_N: token ids; one outside the vocabulary gets a log-prob of NaN.
        extras: names from `dpo_kit.logprob.EXTRAS`.

    Returns:
        [2 + E, N] fp32 (fp64 for fp64): log-probs of the targets, log-sum-exps, extras in their order.
    """
    n, v = products_NV.shape
    block_v = min(TILE, triton.next_power_of_2(v))
    block_n = TILE // block_v
    tiles = triton.cdiv(v, block_v)
    parts, target_logits = _outputs(products_NV, tiles, extras)
    _statistics_kernel[triton.cdiv(n, block_n), tiles](
        products_NV,
        bias_V,
        targets_N,
        target_logits,
        parts,
        n,
        v,
        products_NV.stride(0),
        SCALE=scale,
        SOFTCAP=softcap,
        EXTRAS=_with_parts(extras),
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=WARPS,
    )
    return _joined(parts, target_logits, extras)


def product_statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    extras: tuple[str, ...],
    *,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """`statistics` of hidden @ weight.T; a logit lives in registers only, in fp32.

    The forward pass of Cut Cross-Entropy (arXiv 2411.09009, section 4.2), with a tile's parts written
    out where that has locks. fp16, bf16 or fp32.
    """
    hidden_NH, weight_VH = hidden_NH.contiguous(), weight_VH.contiguous()
    (n, h), v = hidden_NH.shape, len(weight_VH)
    blocks = product_blocks(hidden_NH.dtype)
    tiles = triton.cdiv(v, blocks["BLOCK_V"])
    parts, target_logits = _outputs(hidden_NH, tiles, extras)
    exact = torch.get_float32_matmul_precision() == "highest"
    _product_statistics_kernel[(triton.cdiv(n, blocks["BLOCK_N"]) * tiles,)](
        hidden_NH,
        weight_VH,
        bias_V,
        targets_N,
        target_logits,
        parts,
        n,
        v,
        H=h,
        SCALE=scale,
        SOFTCAP=softcap,
        EXTRAS=_with_parts(extras),
        PRECISION="ieee" if exact else "tf32",
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return _joined(parts, target_logits, extras)


def to_gradient_(
    products_NV: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    logps_N: Tensor,
    lse_N: Tensor,
    *,
    first: int,
    softcap: float | None,
    scale: float,
) -> None:
    """Turn products into the gradient of each row's log-prob with respect to them, in place.

    Args:
        products_NV: from `product_buffer`; columns `first` to `first + V` of the vocabulary.
        bias_V: of these columns, or None.
        targets_N: token ids in the whole vocabulary.
        logps_N, lse_N: the first two of `statistics`.
    """
    n, v = products_NV.shape
    block_v = min(TILE, triton.next_power_of_2(v))
    block_n = TILE // block_v
    _gradient_kernel[triton.cdiv(n, block_n), triton.cdiv(v, block_v)](
        products_NV,
        bias_V,
        targets_N,
        logps_N,
        lse_N,
        n,
        v,
        first,
        products_NV.stride(0),
        SCALE=scale,
        SOFTCAP=softcap,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=WARPS,
    )


def product_blocks(dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes of `product_statistics`: they fit the registers and the shared memory of sm_80."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_H": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def _with_parts(extras: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in extras if name != "top1")


def _outputs(like: Tensor, tiles: int, extras: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """What a kernel writes: [2 + extras, T, N] parts of the statistics and [N] logits of the targets."""
    dtype, n = torch.promote_types(like.dtype, torch.float32), len(like)
    parts = torch.empty(2 + len(_with_parts(extras)), tiles, n, dtype=dtype, device=like.device)
    # The tile that holds the target writes its logit; no tile does where there is no such token.
    return parts, torch.full((n,), float("nan"), dtype=dtype, device=like.device)


def _joined(parts: Tensor, target_logits_N: Tensor, extras: tuple[str, ...]) -> Tensor:
    """Parts of the tiles, see `_outputs` -> [2 + E, N] log-probs, log-sum-exps, extras."""
    tops_TN, totals_TN = parts[0], parts[1]
    top_N = tops_TN.amax(0)
    shifts_TN = tops_TN - top_N
    total_N = (shifts_TN.exp() * totals_TN).sum(0)
    log_total_N = total_N.log()
    # The logit less the largest first: the log-prob of a sure token keeps its digits.
    rows = [target_logits_N - top_N - log_total_N, top_N + log_total_N]
    parts_TN = iter(parts[2:])
    for name in extras:
        if name == "top1":
            rows.append((target_logits_N == top_N).to(top_N.dtype))
        else:
            rows.append(_joined_extra(name, next(parts_TN), totals_TN, shifts_TN, total_N))
    return torch.stack(rows)


@triton.jit
def _extra_part(NAME: tl.constexpr, z_NV, weights_NV):  # type: ignore[no-untyped-def]
    """A tile's part of an extra; z is the logit less the tile's largest, a weight exp(z)."""
    if NAME == "entropy":
        # A weight of 0 may come from a logit of -inf, and 0 * -inf is NaN.
        part_N = tl.sum(tl.where(weights_NV == 0.0, 0.0, weights_NV * z_NV), 1)
    elif NAME == "squared_probs":
        part_N = tl.sum(weights_NV * weights_NV, 1)
    else:
        tl.static_assert(False, "no kernel for this extra")
    return part_N


def _joined_extra(
    name: str, part_TN: Tensor, totals_TN: Tensor, shifts_TN: Tensor, total_N: Tensor
) -> Tensor:
    """The extra of whole rows; a shift is the tile's largest logit less the row's largest."""
    share_TN = shifts_TN.exp() / total_N
    if name == "entropy":
        return total_N.log() - (share_TN * (part_TN + shifts_TN * totals_TN)).sum(0)
    if name == "squared_probs":
        return (share_TN.square() * part_TN).sum(0)
    raise ValueError(f"the parts of '{name}' have no sum")


@triton.jit
def _logits(products_NV, bias_ptr, columns_V, v, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    z = products_NV
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns_V, mask=columns_V < v, other=0.0).to(z.dtype)[None, :]
    if SCALE != 1.0:
        z *= SCALE
    if SOFTCAP is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is finite for every x.
        z = SOFTCAP * (1.0 - 2.0 / (tl.exp(z * (2.0 / SOFTCAP)) + 1.0))
    return z


@triton.jit
def _store_parts(  # type: ignore[no-untyped-def]
    logits_NV,
    rows_N,
    tile,
    tiles,
    targets_ptr,
    target_logits_ptr,
    parts_ptr,
    n,
    v,
    EXTRAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write one tile's part of each statistic, and the logits of the targets that lie in it."""
    live_N = rows_N < n
    columns_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z_NV = tl.where((columns_V < v)[None, :], logits_NV, float("-inf"))
    targets_N = tl.load(targets_ptr + rows_N, mask=live_N, other=-1)
    is_target_NV = columns_V[None, :] == targets_N[:, None]
    here_N = (targets_N >= tile * BLOCK_V) & (targets_N < tl.minimum((tile + 1) * BLOCK_V, v))
    target_logits_N = tl.sum(tl.where(is_target_NV, z_NV, 0.0), 1)
    tl.store(target_logits_ptr + rows_N, target_logits_N, mask=live_N & here_N)
    top_N = tl.maximum(tl.max(z_NV, 1), _LOWEST)
    z_NV -= top_N[:, None]
    weights_NV = tl.exp(z_NV)
    place_N = tile * n + rows_N
    plane = tiles.to(tl.int64) * n
    tl.store(parts_ptr + place_N, top_N, mask=live_N)
    tl.store(parts_ptr + plane + place_N, tl.sum(weights_NV, 1), mask=live_N)
    for i in tl.static_range(len(EXTRAS)):
        part_N = _extra_part(EXTRAS[i], z_NV, weights_NV)
        tl.store(parts_ptr + (2 + i) * plane + place_N, part_N, mask=live_N)


@triton.jit(do_not_specialize=["n", "v"])
def _statistics_kernel(  # type: ignore[no-untyped-def]
    products_ptr,
    bias_ptr,
    targets_ptr,
    target_logits_ptr,
    parts_ptr,
    n,
    v,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers_NV = products_ptr + rows_N.to(tl.int64)[:, None] * stride + columns_V[None, :]
    # Up to the stride, not to v: the padding is readable, and an aligned mask keeps the accesses wide.
    products_NV = tl.load(pointers_NV, mask=(rows_N < n)[:, None] & (columns_V < stride)[None, :], other=0.0)
    z_NV = _logits(products_NV.to(parts_ptr.dtype.element_ty), bias_ptr, columns_V, v, SCALE, SOFTCAP)
    _store_parts(z_NV, rows_N, tile, tiles, targets_ptr, target_logits_ptr, parts_ptr, n, v, EXTRAS, BLOCK_V)


@triton.jit(do_not_specialize=["n", "v"])
def _product_statistics_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    target_logits_ptr,
    parts_ptr,
    n,
    v,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP blocks of rows go through the vocabulary together, so that a tile of `weight` read for one
    # is still in the cache for the others.
    tiles = tl.cdiv(v, BLOCK_V)
    group = tl.program_id(0) // (GROUP * tiles)
    within = tl.program_id(0) % (GROUP * tiles)
    height = tl.minimum(tl.cdiv(n, BLOCK_N) - group * GROUP, GROUP)
    tile = within // height
    rows_N = (group * GROUP + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inner_H = tl.arange(0, BLOCK_H)
    # Rows past the end repeat the last one: no mask, and their results are not stored.
    hidden_NH = hidden_ptr + tl.minimum(rows_N, n - 1).to(tl.int64)[:, None] * H + inner_H[None, :]
    weight_HV = weight_ptr + tl.minimum(columns_V, v - 1).to(tl.int64)[None, :] * H + inner_H[:, None]
    products_NV = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        a_NH = tl.load(hidden_NH + start, mask=(inner_H < H - start)[None, :], other=0.0)
        b_HV = tl.load(weight_HV + start, mask=(inner_H < H - start)[:, None], other=0.0)
        if INTERPRETED:  # whose dot knows no bf16
            a_NH, b_HV = a_NH.to(tl.float32), b_HV.to(tl.float32)
        products_NV = tl.dot(a_NH, b_HV, products_NV, input_precision=PRECISION)
    z_NV = _logits(products_NV, bias_ptr, columns_V, v, SCALE, SOFTCAP)
    _store_parts(z_NV, rows_N, tile, tiles, targets_ptr, target_logits_ptr, parts_ptr, n, v, EXTRAS, BLOCK_V)


@triton.jit(do_not_specialize=["n", "v", "first"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    products_ptr,
    bias_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    n,
    v,
    first,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_V = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live_N = rows_N < n
    inside_NV = live_N[:, None] & (columns_V < stride)[None, :]
    pointers_NV = products_ptr + rows_N.to(tl.int64)[:, None] * stride + columns_V[None, :]
    targets_N = tl.load(targets_ptr + rows_N, mask=live_N, other=-1)
    logps_N = tl.load(logps_ptr + rows_N, mask=live_N, other=0.0)
    lse_N = tl.load(lse_ptr + rows_N, mask=live_N, other=0.0)
    products_NV = tl.load(pointers_NV, mask=inside_NV, other=0.0).to(lse_N.dtype)
    z_NV = _logits(products_NV, bias_ptr, columns_V, v, SCALE, SOFTCAP)
    # 1 - p of the target from its log-prob, before rounding: in a second computation of the logits
    # one rounded otherwise would be more than all of 1 - p where p is near 1.
    is_target_NV = (columns_V + first)[None, :] == targets_N[:, None]
    gradient_NV = tl.where(is_target_NV, 1.0 - tl.exp(logps_N)[:, None], -tl.exp(z_NV - lse_N[:, None]))
    if SOFTCAP is not None:
        tanh_NV = z_NV * (1.0 / SOFTCAP)
        gradient_NV *= 1.0 - tanh_NV * tanh_NV
    if SCALE != 1.0:
        gradient_NV *= SCALE
    tl.store(pointers_NV, gradient_NV, mask=inside_NV)
