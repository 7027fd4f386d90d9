"""The run folder: where things lie, how they are written, and what the run was made in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from dpo_kit import ranks
from dpo_kit.checkpoint_folders import put_aside
from dpo_kit.config import PreferenceConfig
from dpo_kit.disk import writing
from dpo_kit.errors import InputError
from dpo_kit.fingerprint import digest_weights
from dpo_kit.quantised import count_parameters
from dpo_kit.yaml_file import read_yaml

# What a part of a run's start was made from, beside what was made.
ORIGIN_FILE = "origin.json"
LOCK_FILE = ".lock"
_PACKAGES = ("dpo-kit", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a whole file: beside its place first, then renamed."""
    written = path.with_name(f".{path.name}.writing")
    with writing(path.name, path.parent, partial=written):
        written.write_text(text, encoding="utf-8")
        os.replace(written, path)


def without_leftovers(written: Path) -> Path:
    """A folder to write, without what a process that died has left in it; on all ranks together."""
    if ranks.is_first():
        shutil.rmtree(written, ignore_errors=True)
    ranks.wait()
    return written


def replace_folder(written: Path, final: Path) -> None:
    """Put a folder that was written whole in the place of an older one."""
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)


# What a run cannot change on the way and still be the same run, or what its optimiser's state would override.
_TRAIN = (
    "batch_size",
    "seed",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "group_by_prompt",
    "bf16",
    "fp16",
)
_FIXED = ("model", "reference", "data", "sft", "candidates", "loss", *(f"train.{name}" for name in _TRAIN))
_FREE = ("reference.cache_dir", "data.cache_dir", "data.num_proc", "data.eval", "sft.train.disable_tqdm")


def check_same_run(folder: Path, resolved: dict[str, Any]) -> None:
    """Refuse to resume what is no run, or a run of another recipe.

    Raises:
        InputError: naming the first key that differs.
    """
    if not _holds_anything(folder):
        return
    _check_is_run(folder)
    if not (folder / "recipe.yaml").exists():
        return
    # What a folder of an earlier version does not say.
    before = {
        "train.group_by_prompt": False,
        "reference.adapter": None,
        "reference.update_every": 512,
        "reference.update_weight": 0.6,
    }
    before |= flat_keys(read_yaml(folder / "recipe.yaml")[0])
    # As it comes back from a file: a tuple as a list.
    now = flat_keys(json.loads(json.dumps(resolved)))
    fixed_too = _of_eval(resolved)
    for key in sorted(before.keys() | now.keys()):
        fixed = any(key == name or key.startswith(f"{name}.") for name in (*_FIXED, *fixed_too))
        if fixed and key not in _FREE and before.get(key) != now.get(key):
            raise InputError(
                f"the run was started with {before.get(key)!r} and would go on with {now.get(key)!r}",
                file=folder,
                field=key,
                mend="Resume with the recipe as it was, or start anew without --resume.",
            )


def _of_eval(resolved: dict[str, Any]) -> list[str]:
    """What the pairs of `candidates` take from the section `eval`."""
    section = resolved.get("candidates")
    if section is None:
        return []
    taken = [name for name in ("reward", "max_new_tokens") if section.get(name) is None]
    return ["eval.prompts", *(f"eval.{name}" for name in taken)]


def is_finished(folder: Path, resolved: dict[str, Any]) -> bool:
    """Whether the folder holds all of a run of this very recipe.

    A resume writes its recipe first: the recipe that counts is the one that the summary is of.
    """
    if not (folder / "summary.json").exists() or not (folder / "model").exists():
        return False
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except ValueError:
        # Cut by a machine that lost its power: the end of the run is made again.
        return False
    return isinstance(summary, dict) and summary.get("recipe") == digest_recipe(resolved)


def digest_recipe(resolved: dict[str, Any]) -> str:
    """What tells one resolved recipe from another."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def flat_keys(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> dotted keys."""
    if not isinstance(content, dict):
        return {prefix: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return found


# A run that was stopped on the way to its first step has no recipe.yaml yet.
_MADE_BY_RUNS = ("recipe.yaml", "sft", f"pairs/{ORIGIN_FILE}", "metrics.jsonl")


def _check_is_run(folder: Path) -> None:
    if not any((folder / name).exists() for name in _MADE_BY_RUNS):
        raise InputError(
            "there is something here that is not a run folder",
            file=folder,
            field="train.output_dir",
            mend="Choose another folder.",
        )


def make_room(folder: Path) -> Path | None:
    """Put a folder that holds an earlier run aside; its new name, or None where there is nothing.

    Raises:
        InputError: the folder holds something else, or a run that another process is carrying out.
    """
    if not _holds_anything(folder):
        return None
    _check_is_run(folder)
    with alone_in(folder, "run", "train.output_dir"):
        return put_aside(folder)


def _holds_anything(folder: Path) -> bool:
    """Whether there is more than what a run leaves that died before it had written anything whole."""
    if not folder.is_dir():
        return folder.exists()
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return any(path.name != LOCK_FILE and not path.name.endswith(".writing") for path in found)


@contextlib.contextmanager
def alone_in(folder: Path, what: str, field: str) -> Iterator[None]:
    """Make a folder, and keep other processes out of it for as long as this lasts.

    A process that dies lets go of it, whatever it dies of.

    Args:
        folder: in which `what` is carried out.
        what: "run" or "comparison", for the message.
        field: of the recipe, that names the folder.

    Raises:
        InputError: another process has the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK_FILE, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(str(error.strerror), file=folder, field=field) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is carrying out the {what} in this folder",
                file=folder,
                field=field,
                mend="Wait for it, or name another folder.",
            ) from None
        yield


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
            "parameters": count_parameters(model),
            "dtype": str(next(model.parameters()).dtype),
            "sha256": digest_weights(model),
        },
        "data": {
            split: {"pairs": len(dataset), "sha256": _digest_rows(dataset)}
            for split, dataset in data.items()
            if dataset is not None
        },
    }


def _digest_rows(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    columns = [c for c in ("prompt_ids", "chosen_ids", "rejected_ids") if c in dataset.column_names]
    for row in dataset.select_columns(columns):
        digest.update(repr([row[c] for c in columns]).encode())
    return digest.hexdigest()
