"""Time and memory that training a model takes on this machine, estimated without the model.

Only its configuration is needed: layers are made without memory. What is measured is how fast the machine
multiplies matrices. To measure training itself, run `dpo-kit bench` on a recipe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_kit.capacity import LEAST_TOKENS
from dpo_kit.errors import InputError
from dpo_kit.examples import Example
from dpo_kit.models import load_config, load_model
from dpo_kit.roofline import count_work, largest_sizes, matmul_rates

ModelSource = str | Path | dict[str, Any]
Device = str | torch.device

# Share of the limit that training reaches; 0.53 to 0.74 in `make bench` (README), on a CPU, in fp32 and bf16.
SHARES = (0.75, 0.5)
# Side of the product that the rate is measured on, and most columns: larger ones are no faster.
_SIDES = {"cpu": (1536, 4096), "cuda": (8192, 16384)}
_HEAD_BYTES = 2**30
_PROBE_TOKENS = 128


def estimate(
    source: ModelSource,
    steps: Sequence[Sequence[Example]],
    *,
    distinct: int,
    largest_step: int,
    device: Device | None = None,
) -> dict[str, Any]:
    """What an epoch takes, all parameters trained with Adam, a reference computed once by the same model.

    Time is the least arithmetic (`roofline.count_work`) of the steps given, taken times what the epoch has of
    their distinct tokens, at the measured rate of matrix products, over a share of the limit between
    `SHARES`. Memory is weights, gradients and two moments in fp32, the activations that a forward pass
    keeps without gradient checkpointing, and the head's logits of at most 1 GiB.

    Args:
        source: folder, hub id, or configuration fields with `model_type`; no weights are read.
        steps: some of the epoch's.
        distinct: tokens of all trees of the epoch.
        largest_step: tokens of the largest of them.
        device: None: cuda where there is one, else the CPU. fp32 on the CPU, autocast to bf16 on cuda.

    Returns:
        parameters, device, dtype, flops, flops_per_second (measured), shares_of_limit (assumed), seconds
        [low, high], uncounted (kinds of layers whose arithmetic is not known), and memory in bytes: weights,
        gradients, moments, activations_per_token (None: see `kept_per_token`; the next two are then without
        activations), least (in micro-batches of 1024 tokens), whole_step (the largest step at once), machine
        (all that the device has; None where unknown).

    Raises `InputError` where no model can be made.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = "bf16" if place.type == "cuda" else "fp32"
    fields = model_fields(source)
    with torch.device("meta"):
        model = load_model(fields)
    works = [count_work(step, len(step), model) for step in steps]
    share = distinct / sum(work.distinct_tokens for work in works)
    flops = sum(work.flops for work in works) * share
    hidden, intermediate, vocabulary = largest_sizes(model)
    side, most = _SIDES.get(place.type, _SIDES["cpu"])
    shape = (side, min(hidden, most), min(intermediate, most))
    (rate,) = matmul_rates(dtype, [shape], device=place).values()
    parameters = sum(p.numel() for p in model.parameters())
    per_token = kept_per_token(fields, bf16=dtype == "bf16")
    fixed = 16 * parameters

    def bytes_with(tokens: int) -> int:
        return int(fixed + tokens * (per_token or 0) + min(_HEAD_BYTES, 4 * tokens * vocabulary))

    return {
        "parameters": parameters,
        "device": place.type,
        "dtype": dtype,
        "flops": flops,
        "flops_per_second": rate,
        "shares_of_limit": list(SHARES),
        "seconds": [flops / rate / each for each in SHARES],
        "uncounted": sorted({name for work in works for name in work.uncounted}),
        "memory": {
            "weights": 4 * parameters,
            "gradients": 4 * parameters,
            "moments": 8 * parameters,
            "activations_per_token": per_token,
            "least": bytes_with(min(LEAST_TOKENS, largest_step)),
            "whole_step": bytes_with(largest_step),
            "machine": machine_bytes(place),
        },
    }


def model_fields(source: ModelSource) -> dict[str, Any]:
    """A model's configuration as fields, those that it leaves out too; raises `InputError` for none."""
    return load_config(source).to_dict()


def fields_of_sound_model(source: ModelSource) -> dict[str, Any]:
    """`model_fields` of which a model can be made; raises `InputError`, field `model`, where none can be."""
    try:
        fields = model_fields(source)
        layers = fields.get("num_hidden_layers", 1)
        if layers < 1:
            raise ValueError(f"num_hidden_layers is {layers}")
        with torch.device("meta"):
            load_model(fields)
    except InputError as error:
        raise InputError(error.problem, file=error.file, field="model", mend=error.mend) from error
    except Exception as error:  # whatever a family's own code raises at sizes that do not go together
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        file = None if isinstance(source, dict) else source
        raise InputError(
            f"no causal LM can be made of this configuration: {reason}",
            file=file,
            field="model",
            mend="See its config.json",
        ) from error
    return fields


def kept_per_token(fields: dict[str, Any], *, bf16: bool = False) -> float | None:
    """Bytes that the body of a model keeps of each token for its backward pass; nothing is allocated.

    Found from forward passes of tensors without memory. What grows with the square of the length (a mask,
    weights of attention) is taken off, since attention over a tree does not keep it. Sizes are the CPU's.
    None where the model computes what depends on values (mixtures of experts).
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model = load_model(fields)
            once, twice, thrice = (_kept_bytes(model, k * _PROBE_TOKENS) for k in (1, 2, 3))
    except Exception:  # whatever a family's own code raises at tensors without values
        return None
    finally:
        log.disabled = before
    # Of a + b n + c n^2 at n, 2 n and 3 n, b n.
    return (4 * twice - 2.5 * once - 1.5 * thrice) / _PROBE_TOKENS


def _kept_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes that a forward pass of one sequence keeps, parameters apart; the head is not run."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that its number is not given to another
        return saved

    body: Any = model.get_decoder()  # type: ignore[operator]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        hidden = body(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)[0]
    total = sum(storage.nbytes() for storage in kept.values())
    del hidden
    return total


def machine_bytes(device: torch.device) -> int | None:
    """Memory that the device has in all; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
