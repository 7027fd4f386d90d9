"""The least arithmetic that a step needs, and how fast this machine multiplies matrices: the limit.

    share of the limit = least arithmetic / measured rate of matrix products / measured time

Products with weight matrices and the products of attention are counted, on distinct tokens. Norms,
activations, softmax, embeddings, optimiser and whatever is computed a second time (gradient checkpointing)
are free. A little is counted that could be left out: a reply's last token, whose hidden state nobody reads;
and attention's backward pass in layers below the first trained one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_kit.examples import Example, sequences_of
from dpo_kit.models import load_model, output_head, unwrap
from dpo_kit.tree import build_tree

Shape = tuple[int, int, int]
Model = nn.Module | dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Side of a square product that is large for the device, and rows of the body's and the head's products.
_LARGE = {"cpu": (1536, 4096, 512), "cuda": (8192, 16384, 4096)}


@dataclass(frozen=True)
class Work:
    """What a number of steps compute.

    Attributes:
        distinct_tokens: tokens of the token trees of all steps.
        separate_tokens: tokens of the same sequences kept apart, unpadded.
        padded_tokens: tokens of one rectangle per step, all sequences as long as the longest.
        predictions: completion tokens of the trees, each one once.
        flops: least arithmetic, two per multiply-add: see `count_work`.
        uncounted: kinds of layers that hold matrices and whose arithmetic is not known here; `flops` is
            then less than the least.
    """

    distinct_tokens: int
    separate_tokens: int
    padded_tokens: int
    predictions: int
    flops: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Passes:
    """Multiply-adds of all passes together: of a token, of a prediction, and of a pair of tokens that see
    each other, the last by the attention window of the layers (None: no window)."""

    body: int
    head: int
    attention: dict[int | None, int]
    uncounted: tuple[str, ...]


def count_work(
    pairs: Sequence[Example], batch_size: int, model: Model, reference: Model | bool = True
) -> Work:
    """Tokens and least arithmetic of training on pairs, so many a step, in their order.

    Every distinct token of a step goes through the body's matrices, and every distinct prediction through
    the head's: forward, backward to the input, backward to the weight, and forward in a live reference. A
    frozen matrix needs no gradient of its own (LoRA: three passes in place of four), and nothing below
    the first trainable parameter (in the order in which the model lists its layers) a gradient of its
    input. Attention adds the products of queries with keys and of weights with values, for the pairs of
    tokens that see each other: once forward, twice backward, once in the reference. Of a mixture of
    experts those are counted that a token is sent to.

    Args:
        pairs: all with a rejected reply, or none.
        batch_size: pairs in a step.
        model: the policy, on any device (meta too), or its configuration's fields (all of it is trained).
        reference: a live reference; True where its matrices are the policy's, False for none or where
            its log-probs are known already.
    """
    passes = [_training_passes(_instance(model))]
    if reference is not False:
        passes.append(_forward_passes(_instance(model if reference is True else reference)))
    distinct = separate = padded = predictions = 0
    visible: Counter[int | None] = Counter()
    windows = {window for each in passes for window in each.attention}
    for start in range(0, len(pairs), batch_size):
        sequences, begins = sequences_of(pairs[start : start + batch_size])
        tree = build_tree(sequences)
        replies = [rows[begin:] for rows, begin in zip(tree.sequence_rows, begins, strict=True)]
        distinct += len(tree)
        separate += sum(map(len, sequences))
        padded += len(sequences) * max(map(len, sequences))
        predictions += len(np.unique(np.concatenate(replies)))
        for window in windows:
            seen = tree.positions + 1
            visible[window] += int((seen if window is None else np.minimum(seen, window)).sum())
    multiply_adds = sum(
        each.body * distinct
        + each.head * predictions
        + sum(size * visible[window] for window, size in each.attention.items())
        for each in passes
    )
    uncounted = tuple(sorted({name for each in passes for name in each.uncounted}))
    return Work(distinct, separate, padded, predictions, 2 * multiply_adds, uncounted)


def _instance(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return load_model(model)


def _forward_passes(model: nn.Module) -> _Passes:
    matrices, uncounted = body_matrices(model)
    head = output_head(model).module.weight.numel()
    return _Passes(sum(size for _, size in matrices), head, _attention_sizes(model), uncounted)


def _training_passes(model: nn.Module) -> _Passes:
    """Forward and backward of a policy whose frozen parameters are marked as such."""
    matrices, uncounted = body_matrices(model)
    head = output_head(model).module.weight
    sizes = {id(module): size for module, size in matrices}
    head_parts = {id(module) for module in output_head(model).module.modules()}
    body, trains = 0, False
    for module in model.modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if id(module) in sizes:
            body += sizes[id(module)] * (1 + trains + own)
        trains |= own and id(module) not in head_parts
    attention = {window: (3 if trains else 1) * size for window, size in _attention_sizes(model).items()}
    return _Passes(body, head.numel() * (1 + trains + head.requires_grad), attention, uncounted)


def body_matrices(model: nn.Module) -> tuple[list[tuple[nn.Module, int]], tuple[str, ...]]:
    """Layers that multiply a token by matrices, the head apart.

    Returns:
        (layer, elements that one token meets) of each, and the kinds of layers that hold matrices and were
        not understood.
    """
    head = {id(m) for m in output_head(model).module.modules()}
    found: list[tuple[nn.Module, int]] = []
    uncounted = set()
    for module in unwrap(model).modules():
        if id(module) in head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear):
            # Not the weight's own size, which is another one where it is quantised.
            found.append((module, module.in_features * module.out_features))
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if not matrices:
            continue
        experts, active = _experts(model)
        if isinstance(module, Conv1D) or all(p.ndim == 2 and p.shape[0] == experts for p in matrices):
            found.append((module, sum(p.numel() for p in matrices)))
        elif all(p.ndim in (2, 3) and p.shape[0] == experts for p in matrices):
            weights = sum(p.numel() for p in matrices if p.ndim == 3)
            found.append((module, weights // experts * active))
        else:
            uncounted.add(type(module).__name__)
    return found, tuple(sorted(uncounted))


def _text_config(model: nn.Module) -> Any:
    inner: Any = unwrap(model)
    return inner.config.get_text_config()


def _first(config: Any, *names: str) -> Any:
    """The first of several fields that a configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _experts(model: nn.Module) -> tuple[int, int]:
    """Experts of a layer, and those that one token is sent to; -1 where there are none."""
    config = _text_config(model)
    count = _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = _first(config, "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
    return (int(count), int(active)) if isinstance(count, int) and isinstance(active, int) else (-1, 0)


def _attention_sizes(model: nn.Module) -> dict[int | None, int]:
    """By window (None: all earlier tokens): multiply-adds of one token that sees one, over all layers."""
    config = _text_config(model)
    heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    size = _first(config, "head_dim") or (config.hidden_size // heads if heads else 0)
    # Latent attention (DeepSeek) has heads of two sizes.
    both = (_first(config, "qk_head_dim") or size) + (_first(config, "v_head_dim") or size)
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    sizes: Counter[int | None] = Counter()
    for kind in kinds:
        # Layers with recurrent state attend to nothing.
        if kind == "full_attention":
            sizes[None] += heads * both
        elif kind == "sliding_attention":
            sizes[window] += heads * both
    return dict(sizes)


def largest_sizes(model: nn.Module) -> tuple[int, int, int]:
    """(hidden, intermediate, vocabulary) as `shapes_in_use` takes them: the head's sizes, and the width of
    the body's largest matrix over the hidden size."""
    vocabulary, hidden = output_head(model).module.weight.shape
    matrices, _ = body_matrices(model)
    dense = [size for module, size in matrices if isinstance(module, (nn.Linear, Conv1D))]
    return int(hidden), max(dense, default=hidden * hidden) // hidden, int(vocabulary)


def shapes_in_use(hidden: int, intermediate: int, vocabulary: int, device: str = "cpu") -> list[Shape]:
    """(rows, inner, columns) of a large square product, of the body's large ones and of the head's."""
    side, tokens, predictions = _LARGE.get(torch.device(device).type, _LARGE["cpu"])
    return [
        (side, side, side),
        (tokens, hidden, intermediate),
        (tokens, intermediate, hidden),
        (predictions, hidden, vocabulary),
    ]


def matmul_rates(
    dtype: str | torch.dtype,
    shapes: Sequence[Shape],
    seconds: float = 0.3,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Rate of x @ w.T for each shape: "rows x inner x columns" -> flop/s, the median of several products.

    fp32 is multiplied in the precision that torch is set to (`torch.set_float32_matmul_precision`).

    Args:
        dtype: "fp32", "bf16", "fp16", "fp64", or torch's own.
        shapes: (rows, inner, columns).
        seconds: time spent on each shape; at least five products are timed whatever it says.
        device: where the products are made.
    """
    kind, place = DTYPES[dtype] if isinstance(dtype, str) else dtype, torch.device(device)
    return {" x ".join(map(str, shape)): _rate(kind, shape, seconds, place) for shape in shapes}


def _rate(dtype: torch.dtype, shape: Shape, seconds: float, device: torch.device) -> float:
    rows, inner, columns = shape
    x = torch.randn(rows, inner, device=device).to(dtype)
    w = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(x, w.T, out=out)

    times: list[float] = []
    with torch.no_grad():
        # The first products choose a kernel and fault in the memory.
        for _ in range(2):
            product()
        while len(times) < 5 or sum(times) < seconds:
            times.append(_seconds_of(product, device))
    return 2 * rows * inner * columns / median(times)


def _seconds_of(call: Any, device: torch.device) -> float:
    """Time of a call: on the device where that keeps a clock of its own, so that launching it is free."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def share_of_limit(flops: float, rate: float, seconds: float) -> float:
    """Time that the least arithmetic takes at the measured rate, over the measured time."""
    return flops / rate / seconds
