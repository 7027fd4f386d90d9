"""Tree attention over gathered keys: scaled-dot-product attention, on any device.

The keys of a branch are gathered along its path. Branches of like size are computed together, padded to
the largest of them, because a call per branch costs more than the padding does.

Shapes: T rows of the tree, B branches of a bucket, Q and K the longest branch and path of a bucket,
H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

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

    def to(self, device: torch.device | str) -> Bucket:
        """The same bucket on another device."""
        query_rows, key_rows, query_positions = (
            t.to(device, non_blocking=True) for t in (self.query_rows, self.key_rows, self.query_positions)
        )
        return Bucket(query_rows, key_rows, query_positions, self.plain)


@dataclass
class GatheredAttention:
    """A `TreeAttentionPlan`.

    Attributes:
        buckets: all branches, grouped by size.
        output_index: [T] place of each row among the buckets' (padded) outputs laid end to end.
        max_position: depth of the deepest token.
    """

    buckets: list[Bucket]
    output_index: Tensor
    max_position: int

    @classmethod
    def plan(cls, tree: TokenTree) -> GatheredAttention:
        """Group a tree's branches into buckets."""
        buckets, output_index, offset = [], np.empty(len(tree), np.int64), 0
        for branches in _group(tree.branch_lengths, np.diff(tree.visible_offsets)):
            bucket, place = _bucket(tree, branches)
            rows = bucket.query_rows.numpy()[place]
            output_index[rows] = np.flatnonzero(place) + offset
            offset += place.size
            buckets.append(bucket)
        return cls(buckets, torch.from_numpy(output_index), int(tree.positions.max()))

    def to(self, device: torch.device | str) -> GatheredAttention:
        """The same plan on another device."""
        index = self.output_index.to(device, non_blocking=True)
        return GatheredAttention([b.to(device) for b in self.buckets], index, self.max_position)

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
            if softcap is not None or sinks is not None or _written_out_is_faster(query_BHQD, key_BGKD):
                mask = bucket.mask(window, value.dtype)
                out_BHQD = _written_out(query_BHQD, key_BGKD, value_BGKD, mask, scaling, softcap, sinks)
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


def _group(lengths: IntArray, visible: IntArray) -> list[list[int]]:
    """Branches by size: neighbours share a bucket as long as that is cheaper than a bucket more.

    Args:
        lengths: [B] rows of each branch: its queries.
        visible: [B] rows that it sees: its keys.
    """
    groups: list[list[int]] = []
    queries = keys = 0
    order = np.lexsort((visible, lengths))
    for branch, length, path in zip(
        order.tolist(), lengths[order].tolist(), visible[order].tolist(), strict=True
    ):
        if groups:
            count = len(groups[-1])
            together = (count + 1) * max(queries, length) * max(keys, path)
            apart = count * queries * keys + length * path + _BUCKET_OVERHEAD
            if together <= apart:
                groups[-1].append(branch)
                queries, keys = max(queries, length), max(keys, path)
                continue
        groups.append([branch])
        queries, keys = length, path
    return groups


def _bucket(tree: TokenTree, branches: list[int]) -> tuple[Bucket, npt.NDArray[np.bool_]]:
    """The bucket of some branches, and which of its [B, Q] queries are not padding."""
    lengths, visible = tree.branch_lengths[branches, None], np.diff(tree.visible_offsets)[branches, None]
    queries, keys = np.arange(lengths.max()), np.arange(visible.max())
    query_rows = tree.branch_starts[branches, None] + np.minimum(queries, lengths - 1)
    key_rows = tree.visible_rows[tree.visible_offsets[:-1][branches, None] + np.minimum(keys, visible - 1)]
    # Padded queries stand at the last position, so that no row of the mask is empty.
    positions = np.minimum(queries + tree.branch_depths[branches, None], visible - 1)
    plain = len(branches) == 1 and tree.branch_depths[branches[0]] == 0
    query_index, key_index, depth = (torch.from_numpy(x) for x in (query_rows, key_rows, positions))
    return Bucket(query_index, key_index, depth, bool(plain)), queries < lengths


def _rows(x: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads * D]; free where the projection's layout was kept."""
    return x.squeeze(0).transpose(0, 1).flatten(1)


def _gather(x: Tensor, rows: Tensor, heads: int) -> Tensor:
    """[T, heads * D] at [B, L] rows -> [B, heads, L, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, heads, -1).transpose(1, 2)


def _written_out_is_faster(query: Tensor, key: Tensor) -> bool:
    """Processors multiply low-precision matrices fast, but not inside their fused attention.

    Measured with avx512_bf16: 1.4 to 6 times faster up to this size; beyond, the scores take the memory.
    """
    low_precision = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and low_precision and query.shape[2] * key.shape[2] <= 2**18


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
    # The query heads of a group stand under each other, so that keys and values are not repeated.
    grouped = query_BHQD.reshape(branches, groups, -1, size)
    scores = (grouped @ key_BGKD.transpose(-1, -2)).view(branches, heads, queries, keys)
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
