"""Attention over a token tree, for every transformers family that uses the AttentionInterface.

A branch attends to its path and, causally, to itself. Its keys are gathered along the path, so no
mask ever has the square of the packed row; branches of like size are computed together, padded to
the largest of them, because a call per branch costs more than the padding does.

Any device with scaled-dot-product attention; there is nothing here for models with recurrent
state, whose layers never call an attention function. `models.py` checks who can be trusted.

Shapes: T rows of the tree, B branches of a bucket, Q and K the longest branch and path of a bucket,
H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from dpo_kit.tree import Branch, TokenTree

TREE_ATTENTION = "dpo_kit_tree"

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
class TreeAttentionPlan:
    """How to attend over one packed tree; the same for every layer.

    Attributes:
        buckets: all branches, grouped by size.
        output_index: [T] place of each row among the buckets' (padded) outputs laid end to end.
        max_position: depth of the deepest token.
    """

    buckets: list[Bucket]
    output_index: Tensor
    max_position: int

    def to(self, device: torch.device | str) -> TreeAttentionPlan:
        """The same plan on another device."""
        index = self.output_index.to(device, non_blocking=True)
        return TreeAttentionPlan([b.to(device) for b in self.buckets], index, self.max_position)


def plan_tree_attention(tree: TokenTree) -> TreeAttentionPlan:
    """Group a tree's branches into buckets. The tree must have at least one row."""
    buckets, output_index, offset = [], np.empty(len(tree), np.int64), 0
    for branches in _group(tree.branches):
        bucket = _bucket(branches)
        width = bucket.query_rows.shape[1]
        for i, branch in enumerate(branches):
            rows = slice(branch.start, branch.start + branch.length)
            output_index[rows] = np.arange(branch.length) + offset + i * width
        offset += bucket.query_rows.numel()
        buckets.append(bucket)
    return TreeAttentionPlan(buckets, torch.from_numpy(output_index), int(tree.positions.max()))


def _group(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Neighbours in size share a bucket as long as that is cheaper than a bucket more."""
    groups: list[list[Branch]] = []
    queries = keys = 0
    for branch in sorted(branches, key=lambda b: (b.length, b.depth)):
        length, path = branch.length, branch.depth + branch.length
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


def _bucket(branches: list[Branch]) -> Bucket:
    queries = max(b.length for b in branches)
    keys = max(b.depth + b.length for b in branches)
    query_rows = np.empty((len(branches), queries), np.int64)
    key_rows = np.empty((len(branches), keys), np.int64)
    positions = np.empty((len(branches), queries), np.int64)
    for i, b in enumerate(branches):
        rows = np.arange(b.start, b.start + b.length)
        path = np.concatenate([b.path, rows])
        query_rows[i] = np.pad(rows, (0, queries - len(rows)), mode="edge")
        key_rows[i] = np.pad(path, (0, keys - len(path)), mode="edge")
        # Padded queries repeat the last position, so that no row of the mask is empty.
        positions[i] = np.minimum(np.arange(queries) + b.depth, len(path) - 1)
    plain = len(branches) == 1 and branches[0].depth == 0
    return Bucket(
        torch.from_numpy(query_rows), torch.from_numpy(key_rows), torch.from_numpy(positions), plain
    )


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeAttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the calling layer; not read.
        query: [1, H, T, D].
        key: [1, G, T, D], H a multiple of G.
        value: [1, G, T, D].
        attention_mask: must be None: the tree says who sees whom.
        tree: the plan, handed through the model's keyword arguments.
        scaling: factor on the scores, default D ** -0.5.
        dropout: must be 0: the rows of a shared prefix would get one draw for all its sequences.
        sliding_window: number of latest positions a token sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [H] extra logit per head that takes part in the softmax and adds no value (gpt-oss).

    Returns:
        [1, T, H, D] and None (no attention weights).

    Raises:
        ValueError: without a plan, with a mask, or with dropout.
    """
    if tree is None or attention_mask is not None or dropout:
        raise ValueError(
            "tree attention needs a plan (keyword `tree`), no attention mask and no dropout; got tree="
            f"{type(tree).__name__}, attention_mask={type(attention_mask).__name__}, dropout={dropout}"
        )
    window = sliding_window if sliding_window is not None and tree.max_position >= sliding_window else None
    # Under autocast rotary embeddings leave queries and keys in fp32; the projection's dtype is the value's.
    query_TF, key_TF, value_TF = (_rows(x.to(value.dtype)) for x in (query, key, value))
    outputs = []
    for bucket in tree.buckets:
        query_BHQD = _gather(query_TF, bucket.query_rows, query.shape[1])
        key_BGKD = _gather(key_TF, bucket.key_rows, key.shape[1])
        value_BGKD = _gather(value_TF, bucket.key_rows, value.shape[1])
        if softcap is not None or s_aux is not None or _written_out_is_faster(query_BHQD, key_BGKD):
            mask = bucket.mask(window, value.dtype)
            out_BHQD = _written_out(query_BHQD, key_BGKD, value_BGKD, mask, scaling, softcap, s_aux)
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
    out_THD = torch.cat(outputs).index_select(0, tree.output_index)
    return out_THD.unsqueeze(0), None


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
    s_aux: Tensor | None,
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
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(branches, heads, queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights[..., :keys].to(value_BGKD.dtype).reshape(branches, groups, -1, keys)
    return (weights @ value_BGKD).view(branches, heads, queries, -1)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
