"""What a CUDA backend leaves to the gathered one: its plan of the same tree, made when it is first needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dpo_kit.attention.gathered import GatheredAttention
from dpo_kit.tree import TokenTree


@dataclass
class LazyGathered:
    """A `GatheredAttention` that costs nothing until it is used.

    Attributes:
        tree: what it is made of.
        device: where its index tensors go.
    """

    tree: TokenTree
    device: torch.device | str = "cpu"

    @cached_property
    def plan(self) -> GatheredAttention:
        """The plan; all layers of a pass share it."""
        return GatheredAttention.plan(self.tree).to(self.device)

    def to(self, device: torch.device | str) -> LazyGathered:
        """The same for another device."""
        return LazyGathered(self.tree, device)
