"""Tree attention by FlexAttention with a block mask (arXiv 2412.05496), on CUDA.

Depth-first rows make the mask short to say: row q sees row k iff k <= q < subtree_end[k]. Which blocks
of the T x T mask are empty, mixed or full follows from the least and the greatest subtree end of each
block of keys, so the mask itself is never evaluated outside the kernel. Nothing is gathered: memory stays
that of T rows however long the paths are.

Runs compiled on CUDA. Elsewhere FlexAttention is a slow reference without a backward pass; gradients
there, and inputs that its kernels refuse, go to `GatheredAttention`.

Shapes: T rows of the tree, N blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.attention.fallback import LazyGathered
from dpo_kit.attention.transport import SentAsArrays
from dpo_kit.tree import IntArray, TokenTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
_COMPILED_ON = ("cuda",)


@dataclass
class FlexAttention(SentAsArrays):
    """A `TreeAttentionPlan`.

    Attributes:
        subtree_end: [T] int32, the first row behind each row's subtree.
        positions: [T] int32, depth of each row.
        max_position: depth of the deepest token.
        gathered: for what FlexAttention cannot do.
    """

    subtree_end: Tensor
    positions: Tensor
    max_position: int
    gathered: LazyGathered
    _masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(cls, tree: TokenTree) -> FlexAttention:
        """Subtrees of a tree."""
        return cls(
            subtree_end=torch.from_numpy(subtree_ends(tree).astype(np.int32)),
            positions=torch.from_numpy(tree.positions.astype(np.int32)),
            max_position=int(tree.positions.max()),
            gathered=LazyGathered(tree),
        )

    def to(self, device: torch.device | str) -> FlexAttention:
        """The same plan on another device."""
        return FlexAttention(
            self.subtree_end.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
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
        if not flex_takes(query, key, value):
            return self.gathered.plan.attend(
                query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=sinks
            )
        from torch.nn.attention.flex_attention import AuxRequest

        out = _flex_attention(query.device.type)(
            query,
            key,
            value,
            score_mod=None if softcap is None else _soft_cap(softcap, query),
            block_mask=self.block_mask(window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
        if sinks is not None:
            # exp(s) / (exp(lse) + exp(sink)) = exp(s) / exp(lse) * sigmoid(lse - sink)
            out, aux = out
            share_1HT = (aux.lse - sinks.to(aux.lse.dtype)[None, :, None]).sigmoid()
            out = out * share_1HT[..., None].to(out.dtype)
        return out.transpose(1, 2)

    def block_mask(self, window: int | None) -> BlockMask:
        """The mask of a kind of layer, made once for all layers of the kind."""
        if window not in self._masks:
            self._masks[window] = self._block_mask(window)
        return self._masks[window]

    def _block_mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        some, full = block_structure(self.subtree_end, self.positions, window, BLOCK)
        length = len(self.positions)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~full),
            *_listed(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(self.subtree_end, self.positions, window),
            seq_lengths=(length, length),
        )


def subtree_ends(tree: TokenTree) -> IntArray:
    """[T] the first row behind each row's subtree: the end of the last branch that sees it."""
    lengths = tree.branch_lengths
    ends = np.empty(len(tree), np.int64)
    # Of several values for one place, numpy keeps the last.
    ends[tree.visible_rows] = np.repeat(tree.branch_starts + lengths, np.diff(tree.visible_offsets))
    return ends


def block_structure(
    subtree_end: Tensor, positions: Tensor, window: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """What each block of queries sees of each block of keys.

    Args:
        subtree_end: [T] int32, see `subtree_ends`.
        positions: [T] int32, depth of each row.
        window: number of latest positions that a token sees, itself included; None for all.
        block: rows in a block, the last one filled up.

    Returns:
        [N, N] bool, queries by keys: whether it sees something (with a window also some blocks of which
        it sees nothing), and whether it sees everything. A block that is filled up is never full.
    """
    ends_low, ends_high = _block_range(subtree_end, block)
    first = torch.arange(len(ends_low), device=subtree_end.device, dtype=subtree_end.dtype) * block
    earlier = first[:, None] > first
    some = (earlier & (ends_high > first[:, None])) | (first[:, None] == first)
    # Ends are at most T, so that the last rows of queries that are filled up lie behind all of them.
    full = earlier & (ends_low >= first[:, None] + block)
    if window is not None:
        depth_low, depth_high = _block_range(positions, block)
        some &= depth_low[:, None] - depth_high < window
        full &= depth_high[:, None] - depth_low < window
    return some, full


def _block_range(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[T] -> [N] least and [N] greatest of each block."""
    missing = -len(x) % block
    limits = torch.iinfo(x.dtype)
    low = F.pad(x, (0, missing), value=limits.max).view(-1, block).amin(1)
    high = F.pad(x, (0, missing), value=limits.min).view(-1, block).amax(1)
    return low, high


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] bool -> [1, 1, N] how many of each row, and [1, 1, N, N] which: those first, ascending."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _mask_mod(subtree_end: Tensor, positions: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The mask at single places. Only tensors are captured: a new number would compile a new kernel."""

    def in_path(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_end[k])

    if window is None:
        return in_path
    oldest = positions - window

    def in_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_end[k]) & (positions[k] > oldest[q])

    return in_window


def _soft_cap(softcap: float, query: Tensor) -> Callable[..., Tensor]:
    """The change of single scores. The cap is a tensor because the compiler takes no float that may vary."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    cap = torch.full((), softcap, dtype=dtype, device=query.device)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def available() -> bool:
    """Whether this torch has FlexAttention with a log-sum-exp to ask for (torch 2.9 and newer)."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return False
    return True


def flex_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention can compute with these inputs where they are."""
    if not available():
        return False
    if query.is_cuda:
        known = query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return known and 16 <= query.shape[-1] <= 256
    return query.device.type == "cpu" and not any(x.requires_grad for x in (query, key, value))


@lru_cache
def _flex_attention(device_type: str) -> Any:
    """The function, compiled once for all lengths where it is meant to be fast."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type in _COMPILED_ON else flex_attention
