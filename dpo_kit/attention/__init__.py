"""Attention over token trees, for every transformers family that uses the AttentionInterface.

A branch of the tree attends to its path and, causally, to itself, so no mask ever has the square of
the packed row. How that is computed is a backend's business:

    gathered    scaled-dot-product attention over gathered keys, branches of like size together; any device

Nothing here serves models with recurrent state, whose layers never call an attention function;
`models.py` checks who can be trusted.
"""

from dpo_kit.attention.interface import TREE_ATTENTION, TreeAttentionPlan, plan_tree_attention, tree_attention

__all__ = ["TREE_ATTENTION", "TreeAttentionPlan", "plan_tree_attention", "tree_attention"]
