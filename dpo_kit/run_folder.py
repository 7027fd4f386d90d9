"""The run folder: where things lie, how they are written, and what the run was made in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from dpo_kit.checkpoints import put_aside
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError

_PACKAGES = ("dpo-kit", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a whole file: beside its place first, then renamed."""
    written = path.with_name(f".{path.name}.writing")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def make_room(folder: Path) -> Path | None:
    """Put a folder that holds an earlier run aside; its new name, or None where there is nothing.

    Raises:
        InputError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not any((folder / name).exists() for name in ("recipe.yaml", "sft", "metrics.jsonl")):
        raise InputError(
            "there is something here that is not a run folder",
            file=folder,
            field="train.output_dir",
            mend="Choose another folder.",
        )
    return put_aside(folder)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_environment(
    config: PreferenceConfig, model: PreTrainedModel, data: Mapping[str, Dataset | None]
) -> dict[str, Any]:
    """Versions, device, seed, and digests of the starting weights and of the tokenised data."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device: dict[str, Any] = {"type": config.device.type, "threads": torch.get_num_threads()}
    if config.device.type == "cuda":
        device["name"] = torch.cuda.get_device_name(config.device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device,
        "autocast": "bf16" if config.bf16 else "fp16" if config.fp16 else None,
        "ranks": config.world_size,
        "seed": config.seed,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(model.parameters()).dtype),
            "sha256": digest_weights(model),
        },
        "data": {
            split: {"pairs": len(dataset), "sha256": _digest_rows(dataset)}
            for split, dataset in data.items()
            if dataset is not None
        },
    }


def digest_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_rows(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    columns = [c for c in ("prompt_ids", "chosen_ids", "rejected_ids") if c in dataset.column_names]
    for row in dataset.select_columns(columns):
        digest.update(repr([row[c] for c in columns]).encode())
    return digest.hexdigest()
