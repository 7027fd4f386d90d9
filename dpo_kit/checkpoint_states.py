"""A trainer's model, optimiser, schedule and scaler, into the files of a checkpoint and back.

Whole where one rank holds all of it, and sharded where ranks hold parts (FSDP2): either is read by any number
of ranks, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_kit.checkpoint_files import (
    join_tree,
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    plain_name,
    read_json,
    read_tensors,
    split_tree,
    write_json,
    write_tensors,
)
from dpo_kit.checkpoint_shards import (
    is_sharded,
    model_tensors,
    precisions,
    read_alike,
    read_shards,
    write_shards,
)
from dpo_kit.errors import DpoKitWarning
from dpo_kit.ranks import is_first

_MODEL_SHARDS, _OPTIMIZER_SHARDS = "sharded-model", "sharded-optimizer"
_OPTIMIZER, _SCHEDULER, _SCALER = "optimizer", "scheduler.json", "scaler.json"


def save_whole(trainer: Any, folder: str) -> None:
    """Write the model as save_pretrained does; a sharded one is gathered on the first rank."""
    if not is_sharded(trainer.model.parameters()):
        trainer._save(folder)
        return
    tensors = model_tensors(trainer.model)
    if adapters := getattr(trainer.model, "peft_config", None):
        # The base model is not written, and would be gathered for nothing.
        parts = {f".{name}." for name in adapters}
        trained = {plain_name(n) for n, p in trainer.model.named_parameters() if p.requires_grad}
        tensors = {n: v for n, v in tensors.items() if n in trained or any(p in f"{n}." for p in parts)}
    trainer._save(folder, state_dict=_gathered(tensors))


def _gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first rank's CPU, and nothing on the others; one at a time is on a device."""
    whole = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first():
            whole[name] = full.cpu()
    return whole


def save_model(trainer: Any, folder: Path) -> None:
    """Write a checkpoint's model: as `save_whole`, but a sharded one sharded; an adapter is whole."""
    model = trainer.model
    if not is_sharded(model.parameters()) or hasattr(model, "peft_config"):
        save_whole(trainer, str(folder))
        return
    write_shards(folder / _MODEL_SHARDS, model_tensors(model))
    if trainer.args.should_save:
        model.config.save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)


def load_sharded_model(model: Any, folder: Path) -> bool:
    """Load a checkpoint's model where the checkpoint or the model is sharded; whether it was.

    Raises:
        InputError: it is of another model.
    """
    shards = folder / _MODEL_SHARDS
    if shards.is_dir():
        _widen(model, shards)
        read_shards(shards, model_tensors(model))
        return True
    if not is_sharded(model.parameters()):
        return False
    if hasattr(model, "peft_config"):
        _load_adapter(model, folder)
    else:
        read_shards(folder, model_tensors(model))
    return True


def _widen(model: Any, shards: Path) -> None:
    """Give parameters the precision of a sharded checkpoint, where that has more, with a warning.

    accelerate shards in fp32 what was loaded in less: the bits by which small updates differ are there alone.
    """
    known, widened = precisions(shards), False
    for name, value in model.named_parameters():
        kept = known.get(plain_name(name), value.dtype)
        if kept.itemsize > value.dtype.itemsize:
            value.data, widened = value.data.to(kept), True
    if widened and is_first():
        message = (
            f"{shards.parent} was written in shards, which keep more bits than model.dtype has: weights are "
            "fp32 from here on, and round otherwise than before"
        )
        warnings.warn(message, DpoKitWarning, stacklevel=2)


def _load_adapter(model: Any, folder: Path) -> None:
    """Load a whole adapter into a sharded one, each rank its part."""
    from peft import get_peft_model_state_dict

    saved = read_tensors(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, value in get_peft_model_state_dict(model).items():
            value.copy_(_spread(saved[name], value))


def _spread(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the states of the optimiser, the schedule and, where there is one, the gradient scaler.

    Raises:
        InputError: a state that only a pickle could keep.
    """
    sharded = is_sharded(trainer.model.parameters())
    if not sharded and not trainer.args.should_save:
        return
    state = optimizer_state(trainer.optimizer, parameter_names(trainer.model))
    tree, tensors = split_tree(state, _OPTIMIZER)
    if sharded:
        write_shards(folder / _OPTIMIZER_SHARDS, tensors)
    if not trainer.args.should_save:
        return
    if not sharded:
        write_tensors(folder / f"{_OPTIMIZER}.safetensors", tensors)
    write_json(folder / f"{_OPTIMIZER}.json", tree)
    write_json(folder / _SCHEDULER, _scalars(trainer.lr_scheduler.state_dict(), "scheduler"))
    if (scaler := getattr(trainer.accelerator, "scaler", None)) is not None:
        write_json(folder / _SCALER, _scalars(scaler.state_dict(), "scaler"))


def _scalars(state: Any, name: str) -> Any:
    """A small state without tensors of its own: those it has are numbers."""
    return split_tree(_numbers(state), name)[0]


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    return type(value)(map(_numbers, value)) if isinstance(value, list | tuple) else value


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Read back what `save_optimizer` wrote, on any number of ranks; a warning where nothing was written.

    Raises:
        InputError: it is of another model, or of another optimiser.
    """
    if not (path := folder / f"{_OPTIMIZER}.json").is_file():
        message = f"{folder} has no optimiser's state (save_only_model): it begins anew, with the schedule"
        warnings.warn(message, DpoKitWarning, stacklevel=2)
        return
    names = parameter_names(trainer.model)
    tree = read_json(path)
    tensors = _optimizer_tensors(tree, folder, {name: value for value, name in names.items()})
    load_optimizer_state(trainer.optimizer, names, join_tree(tree, tensors))
    trainer.lr_scheduler.load_state_dict(join_tree(read_json(folder / _SCHEDULER), {}))
    if (path := folder / _SCALER).is_file() and getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler.load_state_dict(join_tree(read_json(path), {}))


def _optimizer_tensors(tree: Any, folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a tree of states names, spread over ranks as the parameters are."""
    shards, whole = folder / _OPTIMIZER_SHARDS, folder / f"{_OPTIMIZER}.safetensors"
    if not shards.is_dir() and not is_sharded(parameters.values()):
        return read_tensors(whole)
    # A name is optimizer/state/PARAMETER/...; see `checkpoint_files.split_tree`.
    owners = {name: parameters.get(name.split("/")[2], torch.empty(0)) for name in _names(tree)}
    found = read_alike(shards if shards.is_dir() else folder, owners)
    return (
        found if shards.is_dir() else {name: _widened(value, owners[name]) for name, value in found.items()}
    )


def _widened(value: Tensor, owner: Tensor) -> Tensor:
    """A state in the precision of a parameter that had less of it before it was sharded."""
    narrow = value.is_floating_point() and value.shape == owner.shape and value.itemsize < owner.itemsize
    return value.to(owner.dtype) if narrow else value


def _names(tree: Any) -> list[str]:
    if isinstance(tree, dict) and "$tensor" in tree:
        return [tree["$tensor"]]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [name for part in parts for name in _names(part)]
