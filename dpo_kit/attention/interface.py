"""The attention function that transformers calls, and the choice of the backend that computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from dpo_kit.attention import varlen
from dpo_kit.attention.flex import FlexAttention
from dpo_kit.attention.gathered import GatheredAttention
from dpo_kit.tree import TokenTree

TREE_ATTENTION = "dpo_kit_tree"


class TreeAttentionPlan(Protocol):
    """How to attend over one packed tree; made once, used by every layer.

    Attributes:
        max_position: depth of the deepest token.
    """

    max_position: int

    def to(self, device: torch.device | str) -> TreeAttentionPlan:
        """The same plan on another device."""

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
        """Attention of each token to its path and itself.

        Args:
            query: [1, H, T, D].
            key: [1, G, T, D], of the query's dtype; H a multiple of G.
            value: [1, G, T, D], likewise.
            scaling: factor on the scores, default D ** -0.5.
            window: number of latest positions a token sees, itself included; None for all.
            softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
            sinks: [H] extra logit per head that takes part in the softmax and adds no value (gpt-oss).

        Returns:
            [1, T, H, D].
        """


ATTENTION_BACKENDS: dict[str, Callable[[TokenTree], TreeAttentionPlan]] = {
    "gathered": GatheredAttention.plan,
    "varlen": varlen.VarlenAttention.plan,
    "flex": FlexAttention.plan,
}


def attention_backend(device_type: str) -> str:
    """The backend to plan with for a device ("cuda", "cpu", ...)."""
    return "varlen" if device_type == "cuda" and varlen.available() else "gathered"


def plan_tree_attention(tree: TokenTree, backend: str = "gathered") -> TreeAttentionPlan:
    """The plan of a tree with at least one row, on the CPU.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend '{backend}'; known: {', '.join(ATTENTION_BACKENDS)}")
    return ATTENTION_BACKENDS[backend](tree)


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
    """What transformers calls in every layer; for the arguments see `TreeAttentionPlan.attend`.

    Args:
        attention_mask: must be None: the tree says who sees whom.
        tree: the plan, handed through the model's keyword arguments.
        dropout: must be 0: the rows of a shared prefix would get one draw for all its sequences.

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
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = tree.attend(query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=s_aux)
    return out, None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
