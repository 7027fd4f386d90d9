"""Tensors that are sharded over ranks (FSDP2), in files: each rank writes its part, and any number reads.

The files are safetensors, by torch.distributed.checkpoint's Hugging Face storage, which says in each where
its parts belong. It reads whole files too: so a state goes from one process to many ranks, and back.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_shards

from dpo_kit.checkpoint_files import plain_name
from dpo_kit.errors import InputError


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is spread over ranks."""
    return any(isinstance(value, DTensor) for value in tensors)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model's checkpoint must hold: parameters, shared ones once, and the buffers that are saved."""
    saved = {plain_name(name) for name in model.state_dict()}
    found = [*model.named_parameters(), *model.named_buffers()]
    named = {plain_name(name): value.detach() for name, value in found}
    return {name: value for name, value in named.items() if name in saved}


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write each rank's part of the tensors into one file per rank; all ranks call it.

    Raises:
        OSError: on all ranks, where one cannot write.
    """
    with _for_people():
        dcp.save(
            {name: value.detach() for name, value in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )


def read_shards(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, from the safetensors files of a folder, sharded or whole.

    With DTensors among them all ranks call it.

    Raises:
        InputError: one is not there, or has another shape.
    """
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, value in into.items():
        if name not in known:
            raise InputError(f"the checkpoint has no {name}", file=folder)
        if (size := known[name].size) != value.shape:  # type: ignore[union-attr]
            problem = f"{name} has the shape {list(size)} and the model's {list(value.shape)}"
            raise InputError(problem, file=folder)
    with _for_people():
        dcp.load(
            dict(into),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not is_sharded(into.values()),
        )


def precisions(folder: Path) -> dict[str, torch.dtype]:
    """The dtypes of the tensors in the safetensors files of a folder, by name."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: about.properties.dtype for name, about in known.items()}  # type: ignore[union-attr]


def read_alike(folder: Path, owners: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a folder, each spread over ranks as its owner is, where that is spread and of its shape.

    Args:
        folder: of safetensors files, sharded or whole.
        owners: by names of tensors; the parameter that each belongs to.

    Returns:
        Those, on the devices of their owners where they are spread, else on the CPU.
    """
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found: dict[str, Tensor] = {}
    for name, owner in owners.items():
        about = known[name]
        size, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
        if isinstance(owner, DTensor) and owner.shape == size:
            mesh, placements = owner.device_mesh, owner.placements
            found[name] = empty_shards(*size, dtype=dtype, device_mesh=mesh, placements=placements)
        else:
            found[name] = torch.empty(size, dtype=dtype)
    read_shards(folder, found)
    return found


@contextmanager
def _for_people() -> Iterator[None]:
    """Without what torch says to developers; its errors are what went wrong on the first rank."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        # Not even an Exception.
        raise error.failures[min(error.failures)][0] from None
    finally:
        logger.setLevel(level)
