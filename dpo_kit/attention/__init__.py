"""Attention over token trees, for every transformers family that uses the AttentionInterface.

A branch of the tree attends to its path and, causally, to itself, so no mask ever has the square of
the packed row. How that is computed is a backend's business:

    gathered    scaled-dot-product attention over gathered keys, branches of like size together; any device
    varlen      variable-length flash attention over gathered keys, fp16 and bf16; CUDA
    flex        FlexAttention with a block mask, nothing gathered; CUDA

What a CUDA backend cannot do for a layer or a dtype, it leaves to the gathered one.

Nothing here serves models with recurrent state, whose layers never call an attention function;
`models.py` checks who can be trusted.
"""

from dpo_kit.attention.interface import (
    ATTENTION_BACKENDS,
    TREE_ATTENTION,
    TreeAttentionPlan,
    attention_backend,
    plan_tree_attention,
    tree_attention,
)

__all__ = [
    "ATTENTION_BACKENDS",
    "TREE_ATTENTION",
    "TreeAttentionPlan",
    "attention_backend",
    "plan_tree_attention",
    "tree_attention",
]
