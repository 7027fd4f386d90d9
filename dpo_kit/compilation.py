"""torch.compile of a model's decoder layers, one by one, as an option that keeps the numbers.

What is compiled is each layer's own forward: norms, projections, rotary positions and the feed-forward
net, for all lengths at once. Outside stay gradient checkpointing and hooks (FSDP, PEFT, accelerate),
which transformers and torch put around a layer's forward, and tree attention, whose plan is a Python
object. Embeddings and the head are left alone: the head returns log-probs (`scoring.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_kit.attention import TREE_ATTENTION, tree_attention
from dpo_kit.errors import InputError

_COMPILED: dict[type[nn.Module], type[nn.Module]] = {}


def compile_blocks(model: nn.Module) -> int:
    """Compile the decoder layers of a causal LM, in place; before or after wrapping, once or again.

    Nothing is compiled yet: that happens in the first forward and backward pass. Names of parameters and
    of classes stay. In low precision the results differ by rounding, since fused operations round less often.

    Args:
        model: a transformers model, possibly wrapped (DDP, PEFT).

    Returns:
        Number of layers that are compiled.

    Raises:
        InputError: no layers of the kind that transformers' decoders are built of.
    """
    layers: list[nn.Module] = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no decoder layers that could be compiled one by one",
            mend="Run without compiling the blocks.",
        )
    # Dynamo would trace into the plan and guard on every number in it.
    AttentionInterface.register(TREE_ATTENTION, torch.compiler.disable(tree_attention))
    for layer in layers:
        # A class, as FSDP2 does it, and not `layer.forward`: transformers wraps the forward of classes with
        # gradient checkpointing, and only checkpointing outside of the compiled function gets any.
        layer.__class__ = _compiled(type(layer))
    return len(layers)


def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with a compiled forward; all layers of a class share it."""
    if kind in _COMPILED.values():
        return kind
    if kind not in _COMPILED:
        compiled = torch.compile(kind.forward, dynamic=True)

        # A plain function around it: transformers copies the attributes of what it wraps, and by those of
        # a compiled function the compiler would take the wrapper for the original.
        @functools.wraps(kind.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return compiled(self, *args, **kwargs)

        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _COMPILED[kind] = type(kind.__name__, (kind,), {"forward": forward, **names})
    return _COMPILED[kind]
