"""FSDP2: weights, gradients and optimiser state in shards over the ranks, by accelerate and fully_shard.

Here is what the two leave open: that it is real on processors too, that it computes in the precision of one
process, and that the policy is sharded once and before anything is computed with it. What is run on a sharded
model is as ever, but by all ranks together: each pass through it is a meeting of them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from dpo_kit.errors import DpoKitWarning, InputError

# What `accelerate launch` sets where its configuration shards, or has parallelism_config.
_USE_FSDP = "ACCELERATE_USE_FSDP"
_USE_PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"
_WRAP_POLICY = "FSDP_AUTO_WRAP_POLICY"


def is_sharded(model: Any) -> bool:
    """Whether a model's parameters lie in shards over the ranks."""
    return isinstance(model, FSDPModule)


def check_wrappers(args: TrainingArguments) -> None:
    """Refuse what this cannot shard with, before anything is loaded onto a device.

    Raises:
        InputError: the first version of FSDP, shards for one process alone, or other parallelism.
    """
    if args.parallelism_config is not None or _says_yes(_USE_PARALLELISM):
        raise InputError(
            "with tensor, context or sequence parallelism several ranks need the same pairs, and here each "
            "has its own; copies of shards (HSDP) are not tested",
            field="train.parallelism_config",
            mend="Leave it out, in accelerate's configuration too; FSDP2 shards over all ranks.",
        )
    asked = args.fsdp_plugin_args
    if asked is None and not _says_yes(_USE_FSDP):
        return
    version = int(os.environ.get("FSDP_VERSION", 1) if asked is None else asked.get("fsdp_version", 2))
    if version != 2:
        raise InputError(
            f"FSDP version {version} is not supported",
            field="train.fsdp_config",
            mend="Set version: 2 there, or fsdp_version: 2 in accelerate's configuration.",
        )
    if asked is not None and args.world_size == 1:
        raise InputError(
            "there is one process, and nothing to shard over",
            field="train.fsdp",
            mend="Start with torchrun or accelerate launch, or leave fsdp out.",
        )


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Within: accelerate may say in the environment that it shards; after: later trainers are not told so."""
    before = os.environ.get(_USE_FSDP)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_USE_FSDP, None)


def shard_on_processors(accelerator: Accelerator, args: TrainingArguments) -> bool:
    """Have an accelerator shard on processors, where it would replicate without a word; whether it does now.

    Args:
        accelerator: just made, of several ranks or of one.
        args: say whether sharding is asked for; `accelerate launch` may, too.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    if args.fsdp_plugin_args is not None:
        plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    elif _says_yes(_USE_FSDP):
        plugin = FullyShardedDataParallelPlugin()
    else:
        return False
    # All states of accelerate are views of these two dictionaries.
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def check_model(model: nn.Module) -> None:
    """Refuse a model that was loaded in parts over ranks (tp_plan, or a distributed_config of its own).

    Raises:
        InputError: it is one.
    """
    cut = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if cut or (getattr(model, "_tp_size", None) or 1) > 1:
        raise InputError(
            "it lies in parts over ranks already (tp_plan, distributed_config): they would need the same "
            "pairs, and here each has its own",
            field="model",
            mend="Load it without these, and shard with FSDP2 (train.fsdp: true).",
        )


def fit_to_model(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Settle what a model is cut into and in which precision it computes.

    Decoder layers are gathered one by one. Weights have in every pass the precision that they were loaded in,
    as in one process, and autocast does the rest: the policy agrees with a reference that is not sharded.
    (accelerate would run all of it in bf16, the sums over layers too.) Gradients meet in fp32.

    Args:
        plugin: of the accelerator.
        model: before it is sharded.
    """
    said = os.environ.get(_WRAP_POLICY)
    if plugin.auto_wrap_policy is None and said is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    layers = plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None)
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and not layers:
        warnings.warn(
            f"{type(model).__name__} does not say what it is built of: it is gathered whole in each pass. "
            "Name the class of its layers in train.fsdp_config (transformer_layer_cls_to_wrap)",
            DpoKitWarning,
            stacklevel=3,
        )
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=floats[0] if len(set(floats)) == 1 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # model/ holds whole weights; how checkpoints lie is dpo_kit.checkpoints' business.
    plugin.set_state_dict_type("FULL_STATE_DICT")


def check_reference(plugin: FullyShardedDataParallelPlugin, reference: Any) -> None:
    """Refuse a copy of a policy whose weights are on one rank alone until it is sharded.

    Raises:
        InputError: it is such a copy.
    """
    if plugin.cpu_ram_efficient_loading and reference.is_policy and reference.model is not None:
        raise InputError(
            "each rank keeps a copy of the policy, and only one has its weights",
            field="reference.mode",
            mend="Set it to cached, name the model in reference.path, or set cpu_ram_efficient_loading to "
            "false in FSDP's configuration.",
        )


def prepare_once(accelerator: Accelerator) -> None:
    """Have `accelerator.prepare` hand a model that is sharded back as it is, and with it its optimiser.

    A second time it tells parameters apart by where they lie in memory, and those of which a rank has no row
    all lie nowhere.
    """
    prepare = accelerator.prepare

    def prepared(*given: Any, **keywords: Any) -> Any:
        if any(is_sharded(one) for one in given):
            return given if len(given) > 1 else given[0]
        return prepare(*given, **keywords)

    accelerator.prepare = prepared


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
