"""Tree attention over gathered keys: variable-length flash attention, on CUDA.

The packed row is the queries as it stands, a branch being a stretch of it. Keys and values are gathered:
each branch's path and then its own rows, so that a branch is one sequence of a ragged batch whose causal
diagonal ends in the lower right corner. That is how flash attention aligns it since 2.1: query i of q
sees key j of k iff j <= i + k - q, and with a left window w also j >= i + k - q - w.

Nothing is padded, and nothing waits for the device: all sizes are known on the CPU. The gathered keys
take sum(path + length) rows in place of T, which `FlexAttention` does not need.

The kernel knows fp16 and bf16 only, no soft cap, and passes no gradient to its log-sum-exp (so no sinks);
those go to `GatheredAttention`.

Shapes: T rows of the tree, R gathered rows, B branches, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_kit.attention.fallback import LazyGathered
from dpo_kit.attention.transport import SentAsArrays
from dpo_kit.tree import IntArray, TokenTree


@dataclass
class VarlenAttention(SentAsArrays):
    """A `TreeAttentionPlan`.

    Attributes:
        key_rows: [R] rows of each branch's path and then of the branch; None where no branch has a path.
        query_offsets: [B + 1] int32, where each branch's queries begin, and T.
        key_offsets: [B + 1] int32, where each branch's keys begin, and R.
        longest_query: rows of the longest branch.
        longest_key: rows that the branch with the longest reach sees.
        max_position: depth of the deepest token.
        gathered: for what the kernel cannot do.
    """

    key_rows: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int
    max_position: int
    gathered: LazyGathered

    @classmethod
    def plan(cls, tree: TokenTree) -> VarlenAttention:
        """Offsets and rows of a tree."""
        return cls(
            key_rows=torch.from_numpy(tree.visible_rows) if tree.branch_depths.any() else None,
            query_offsets=_int32(np.append(tree.branch_starts, len(tree))),
            key_offsets=_int32(tree.visible_offsets),
            longest_query=int(tree.branch_lengths.max()),
            longest_key=int(np.diff(tree.visible_offsets).max()),
            max_position=int(tree.positions.max()),
            gathered=LazyGathered(tree),
        )

    def to(self, device: torch.device | str) -> VarlenAttention:
        """The same plan on another device."""
        return VarlenAttention(
            None if self.key_rows is None else self.key_rows.to(device, non_blocking=True),
            self.query_offsets.to(device, non_blocking=True),
            self.key_offsets.to(device, non_blocking=True),
            self.longest_query,
            self.longest_key,
            self.max_position,
            self.gathered.to(device),
        )

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
        if softcap is not None or sinks is not None or not kernel_takes(query, value):
            return self.gathered.plan.attend(
                query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=sinks
            )
        kernel, options = _kernel()
        out_THD: Tensor = kernel(
            query.squeeze(0).transpose(0, 1),
            self._keys(key),
            self._keys(value),
            self.query_offsets,
            self.key_offsets,
            self.longest_query,
            self.longest_key,
            scale=scaling,
            # Tokens to the left and to the right beside the token itself; -1 is no limit.
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
        return out_THD.unsqueeze(0)

    def _keys(self, x: Tensor) -> Tensor:
        """[1, G, T, D] -> [R, G, D]."""
        x_TGD = x.squeeze(0).transpose(0, 1)
        if self.key_rows is None:
            return x_TGD
        gathered: Tensor = _GatherRows.apply(x_TGD.flatten(1), self.key_rows)
        return gathered.view(-1, *x_TGD.shape[1:])


class _GatherRows(torch.autograd.Function):
    """[T, F] at [R] rows -> [R, F], with a gradient that is summed in fp32.

    A row of a path stands in every branch below it. The gradient of a plain index_select would be summed
    in the dtype of x, one rounding per branch. The order of the sums is the device's, unless
    `torch.use_deterministic_algorithms` is on.
    """

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x_TF)
        return x_TF.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        dtype = torch.promote_types(grad_RF.dtype, torch.float32)
        total = grad_RF.new_zeros(ctx.num_rows, grad_RF.shape[1], dtype=dtype)
        return total.index_add_(0, rows, grad_RF.to(dtype)).to(grad_RF.dtype), None


def available() -> bool:
    """Whether this torch has the kernel, for NVIDIA GPUs, with windows (torch 2.11 and newer)."""
    if torch.version.cuda is None:
        return False
    try:
        _kernel()
    except ImportError:
        return False
    return True


def kernel_takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel can compute with queries and values [1, heads, T, D] of this kind where they are.

    The meta device counts as one: there the kernel checks shapes and computes nothing.
    """
    size = query.shape[-1]
    # Latent attention (DeepSeek) has values narrower than its queries.
    if (
        query.dtype not in (torch.float16, torch.bfloat16)
        or size % 8
        or size > 256
        or size != value.shape[-1]
    ):
        return False
    return query.device.type == "meta" or (query.is_cuda and _is_ampere_or_newer(query.device.index))


@lru_cache
def _is_ampere_or_newer(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _kernel() -> tuple[Callable[..., Any], dict[str, bool]]:
    """`varlen_attn` and what this torch wants to be told; imported late because it is slow to import.

    Raises:
        ImportError: this torch has none, or one without windows.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = inspect.signature(varlen_attn).parameters
    if "window_size" not in options:
        raise ImportError(f"torch {torch.__version__} has varlen_attn without window_size")
    # Before the flag came (torch 2.12), the kernel took fewer key heads than query heads unasked.
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in options else {}


def _int32(x: IntArray) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))
