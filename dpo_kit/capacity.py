"""How many tokens one forward and backward pass may hold, from what it keeps per token and what is free.

Only the arithmetic and the two measurements; what is done with the answer is the trainer's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from dpo_kit.examples import Example
from dpo_kit.models import is_reward_model, output_head
from dpo_kit.packing import MicroBatch
from dpo_kit.scoring import what_is_trained

# More tokens at once gain nothing: the matrix products are large by then.
MOST_TOKENS = 65536
LEAST_TOKENS = 1024
# What is measured with at most.
PROBE_TOKENS = 2048
# Of the memory that is free, for activations; the rest is for fragments and one layer's backward pass.
_SHARE = 0.75
# What the head keeps and computes with at most.
_HEAD_BYTES = 2**30


def kept_bytes(model: nn.Module, batch: MicroBatch) -> int:
    """Bytes that one forward pass keeps for its backward pass, without parameters and the head's logits."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    vocabulary = None if is_reward_model(model) else output_head(model).module.weight.shape[0]
    sizes: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters and saved.shape[-1:] != (vocabulary,):
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        # The graph holds what was kept, so that no place in memory is counted for two tensors.
        graph = what_is_trained(model, batch).sum()
    total = sum(sizes.values())
    del graph
    return total


def bytes_per_token(model: nn.Module, half: MicroBatch, whole: MicroBatch) -> float:
    """What a forward pass keeps for each token more, from two passes.

    Args:
        model: in the mode and under the autocast that it will be trained in.
        half: some pairs, on the model's device.
        whole: these and more.
    """
    more = whole.input_ids.numel() - half.input_ids.numel()
    return max(kept_bytes(model, whole) - kept_bytes(model, half), 1) / max(more, 1)


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that tensors can still have, the allocator's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def training_bytes(model: nn.Module) -> int:
    """Gradients and the two moments of Adam, in the dtype of the parameters that are trained."""
    return sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def tokens_that_fit(free: int, reserved: int, per_token: float) -> int:
    """Tokens of a micro-batch, a multiple of 256.

    Args:
        free: bytes that are free before the first step.
        reserved: of these, what gradients and optimiser will take.
        per_token: bytes that a forward pass keeps per token.
    """
    tokens = int(_SHARE * (free - reserved - _HEAD_BYTES) / per_token) // 256 * 256
    return min(max(tokens, LEAST_TOKENS), MOST_TOKENS)


def measured_budget(
    model: nn.Module, plan: Callable[[Sequence[Example]], MicroBatch], pairs: Sequence[Example]
) -> int:
    """Tokens of a micro-batch that fit a CUDA device beside the model and what training it takes.

    Args:
        model: on the device, in the mode, under the autocast and with the checkpointing of its training.
        plan: pairs -> one micro-batch.
        pairs: of the data; as many of the first ones are looked at as PROBE_TOKENS hold, two at least.
    """
    sizes = np.cumsum([len(p.prompt) + sum(map(len, p.replies)) for p in pairs])
    few = pairs[: max(2, int((sizes <= PROBE_TOKENS).sum()))]
    device = next(model.parameters()).device
    try:
        half, whole = (plan(part).to(device) for part in (few[: len(few) // 2], few))
        per_token = bytes_per_token(model, half, whole)
    except torch.OutOfMemoryError:
        return LEAST_TOKENS
    return tokens_that_fit(free_bytes(device), training_bytes(model), per_token)
