"""Tree attention over gathered keys: scaled-dot-product attention, on any device.

The keys of a branch are gathered along its path. Branches of like size are computed together, padded to
the largest of them, because a call per branch costs more than the padding does.

Shapes: T rows of the tree, B branches of a bucket, Q and K the longest branch and path of a bucket,
H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_kit.attention.transport import SentAsArrays
from dpo_kit.tree import IntArray, TokenTree

# A bucket costs about as much as this many query-key pairs before it computes any.
_BUCKET_OVERHEAD = 64 * 64


@dataclass
class Bucket:
    """Branches that are computed in one call.

    Attributes:
        query_rows: [B, Q] rows of the tree; padding repeats the branch's last row.
        key_rows: [B, K] rows of the path and then of the branch; padding likewise.
        query_positions: [B, Q] depth of each query row (a key's depth is its column).
        plain: one branch without a path: ordinary causal attention.
    """

    query_rows: Tensor
    key_rows: Tensor
    query_positions: Tensor
    plain: bool
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, K] additive mask, made once for all layers of a kind."""
        if (window, dtype) not in self._masks:
            queries = self.query_positions[:, None, :, None]
            keys = torch.arange(self.key_rows.shape[1], device=queries.device)
            allowed = keys <= queries
            if window is not None:
                allowed &= keys > queries - window
            mask = torch.zeros(allowed.shape, dtype=dtype, device=queries.device)
            self._masks[window, dtype] = mask.masked_fill_(~allowed, float("-inf"))
        return self._masks[window, dtype]


@dataclass
class GatheredAttention(SentAsArrays):
    """A `TreeAttentionPlan`: the buckets' index tensors end to end, which travel as few large ones.

    Attributes:
        query_rows: the buckets' `query_rows`, flat.
        key_rows: likewise.
        query_positions: likewise.
        sizes: (B, Q, K) of each bucket.
        output_index: [T] place of each row among the buckets' (padded) outputs laid end to end.
        max_position: depth of the deepest token.
    """

    query_rows: Tensor
    key_rows: Tensor
    query_positions: Tensor
    sizes: list[tuple[int, int, int]]
    output_index: Tensor
    max_position: int

    @classmethod
    def plan(cls, tree: TokenTree) -> GatheredAttention:
        """Group a tree's branches into buckets."""
        order, sizes = _group(tree.branch_lengths, tree.branch_depths)
        counts, queries, keys = np.array(sizes).T
        flat = (
            *_padded_queries(tree, order, queries.repeat(counts)),
            _padded_keys(tree, order, keys.repeat(counts)),
        )
        query_rows, query_positions, output_index, key_rows = map(torch.from_numpy, flat)
        return cls(query_rows, key_rows, query_positions, sizes, output_index, int(tree.positions.max()))

    @cached_property
    def buckets(self) -> list[Bucket]:
        """All branches, grouped by size."""
        queries, keys = [b * q for b, q, _ in self.sizes], [b * k for b, _, k in self.sizes]
        parts = zip(
            self.sizes,
            self.query_rows.split(queries),
            self.key_rows.split(keys),
            self.query_positions.split(queries),
            strict=True,
        )
        # A branch has a path where it sees more rows than its own.
        return [
            Bucket(rows.view(b, q), seen.view(b, k), positions.view(b, q), plain=b == 1 and q == k)
            for (b, q, k), rows, seen, positions in parts
        ]

    def to(self, device: torch.device | str) -> GatheredAttention:
        """The same plan on another device."""
        tensors = (self.query_rows, self.key_rows, self.query_positions, self.output_index)
        query_rows, key_rows, positions, index = (t.to(device, non_blocking=True) for t in tensors)
        return GatheredAttention(query_rows, key_rows, positions, self.sizes, index, self.max_position)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `TreeAttentionPlan.attend`."""
        query_TF, key_TF, value_TF = _rows(query), _rows(key), _rows(value)
        outputs = []
        for bucket in self.buckets:
            query_BHQD = _gather(query_TF, bucket.query_rows, query.shape[1])
            key_BGKD = _gather(key_TF, bucket.key_rows, key.shape[1])
            value_BGKD = _gather(value_TF, bucket.key_rows, value.shape[1])
            if softcap is not None or sinks is not None:
                mask = bucket.mask(window, value.dtype)
                out_BHQD = _written_out(query_BHQD, key_BGKD, value_BGKD, mask, scaling, softcap, sinks)
            elif _products_are_faster(query_BHQD, key_BGKD):
                mask = bucket.mask(window, torch.float32)
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                out_BHQD = _ByProducts.apply(query_BHQD, key_BGKD, value_BGKD, mask, scale)
            else:
                plain = bucket.plain and window is None
                out_BHQD = F.scaled_dot_product_attention(
                    query_BHQD,
                    key_BGKD,
                    value_BGKD,
                    attn_mask=None if plain else bucket.mask(window, value.dtype),
                    is_causal=plain,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            outputs.append(out_BHQD.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.output_index).unsqueeze(0)


def _group(lengths: IntArray, depths: IntArray) -> tuple[IntArray, list[tuple[int, int, int]]]:
    """Branches by size: neighbours share a bucket as long as that is cheaper than a bucket more.

    Args:
        lengths: [B] rows of each branch: its queries.
        depths: [B] rows of its path: what it sees beside itself.

    Returns:
        The branches in the order of their buckets, and of each bucket its branches, queries and keys.
    """
    sizes: list[tuple[int, int, int]] = []
    count = queries = keys = 0
    order = np.lexsort((depths, lengths))
    visible = (lengths + depths)[order].tolist()
    for length, seen in zip(lengths[order].tolist(), visible, strict=True):
        longer = seen if seen > keys else keys
        apart = count * queries * keys + length * seen + _BUCKET_OVERHEAD
        if count and (count + 1) * length * longer <= apart:
            count, queries, keys = count + 1, length, longer
            sizes[-1] = (count, queries, keys)
        else:
            count, queries, keys = 1, length, seen
            sizes.append((count, queries, keys))
    return order, sizes


def _padded_queries(
    tree: TokenTree, order: IntArray, widths: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Rows of the branches in `order`, each padded to its width with its last row, end to end.

    Returns:
        The rows, their depths, and for each row of the tree its place among them.
    """
    starts, lengths = tree.branch_starts, tree.branch_lengths
    begins = widths.cumsum() - widths
    moved = np.empty_like(starts)
    moved[order] = begins
    places = np.arange(len(tree)) + (moved - starts).repeat(lengths)
    # Padded queries stand at the last position, so that no row of the mask is empty.
    column = np.arange(widths.sum()) - begins.repeat(widths)
    column = np.minimum(column, (lengths[order] - 1).repeat(widths))
    return column + starts[order].repeat(widths), column + tree.branch_depths[order].repeat(widths), places


def _padded_keys(tree: TokenTree, order: IntArray, widths: IntArray) -> IntArray:
    """What the branches in `order` see, each padded to its width with its last row, end to end."""
    begins = tree.visible_offsets[order]
    column = np.arange(widths.sum()) + (begins - widths.cumsum() + widths).repeat(widths)
    return tree.visible_rows[np.minimum(column, (tree.visible_offsets[order + 1] - 1).repeat(widths))]


def _rows(x: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads * D]; free where the projection's layout was kept."""
    return x.squeeze(0).transpose(0, 1).flatten(1)


def _gather(x: Tensor, rows: Tensor, heads: int) -> Tensor:
    """[T, heads * D] at [B, L] rows -> [B, heads, L, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, heads, -1).transpose(1, 2)


def _products_are_faster(query: Tensor, key: Tensor) -> bool:
    """Processors multiply low-precision matrices fast, but not inside their fused attention.

    Measured with avx512_bf16: 1.4 to 6 times faster up to this size; beyond, the scores take the memory.
    """
    low_precision = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and low_precision and query.shape[2] * key.shape[2] <= 2**18


class _ByProducts(torch.autograd.Function):
    """Attention as two low-precision matrix products with an fp32 softmax between them.

    Only the rounded weights are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, mask_B1QK: Tensor, scale: float
    ) -> Tensor:
        grouped, keys = _grouped(query_BHQD, key_BGKD.shape[1]), key_BGKD.shape[2]
        scores = (grouped @ key_BGKD.transpose(-1, -2)).float()
        scores.view(*query_BHQD.shape[:3], keys).mul_(scale).add_(mask_B1QK)
        weights = torch.softmax(scores, -1, out=scores).to(value_BGKD.dtype)
        ctx.save_for_backward(grouped, key_BGKD, value_BGKD, weights)
        ctx.scale = scale
        return (weights @ value_BGKD).view(*query_BHQD.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQD: Tensor) -> tuple[Tensor | None, ...]:
        grouped, key, value, weights = ctx.saved_tensors
        grad = _grouped(grad_BHQD, key.shape[1])
        # The softmax's backward pass: weights * (grad at weights - its mean under the weights).
        at_scores = (grad @ value.transpose(-1, -2)).float()
        weights_fp32 = weights.float()
        mean = torch.linalg.vecdot(at_scores, weights_fp32).unsqueeze(-1)
        at_scores = at_scores.sub_(mean).mul_(weights_fp32).mul_(ctx.scale).to(key.dtype)
        return (
            (at_scores @ key).view(*grad_BHQD.shape[:3], -1),
            at_scores.transpose(-1, -2) @ grouped,
            weights.transpose(-1, -2) @ grad,
            None,
            None,
        )


def _grouped(x_BHQD: Tensor, groups: int) -> Tensor:
    """[B, G, H / G * Q, D]: the query heads of a group stand under each other, so that keys and values are
    not repeated."""
    branches, _, _, size = x_BHQD.shape
    return x_BHQD.reshape(branches, groups, -1, size)


def _written_out(
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention step by step, the softmax in fp32 or better; the only way to soft caps and sinks."""
    branches, heads, queries, size = query_BHQD.shape
    groups, keys = key_BGKD.shape[1:3]
    scores = (_grouped(query_BHQD, groups) @ key_BGKD.transpose(-1, -2)).view(branches, heads, queries, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(branches, heads, queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights[..., :keys].to(value_BGKD.dtype).reshape(branches, groups, -1, keys)
    return (weights @ value_BGKD).view(branches, heads, queries, -1)
