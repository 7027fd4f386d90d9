"""How a training state lies in files: no pickle is written and none is read.

A state (of an optimiser, a scheduler, a gradient scaler) is a tree of dictionaries, lists and scalars with
tensors as leaves: the tree is NAME.json, the tensors are NAME.safetensors. An optimiser's state goes by the
names of parameters, so that it does not depend on their order. A manifest holds the digests of all files:
with it a checkpoint can be told to be whole. What a trainer is, and when it saves, is not known here.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dpo_kit.disk import digest_file, sync_file, sync_folder
from dpo_kit.errors import InputError

MANIFEST = "manifest.json"
FORMAT = "dpo_kit checkpoint 2"

# torch.save writes these, and so did checkpoints before this format.
_PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
# What torch.compile and gradient checkpointing put into the names of parameters.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def split_tree(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A state as JSON, with names in the place of tensors, and the tensors by these names.

    A name is the path to the tensor, its parts joined by "/". A tensor that is there twice is kept once.

    Raises:
        InputError: a value that is none of the kinds that JSON or safetensors keep.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def split(value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            known = names.setdefault(_place(value), path)
            tensors.setdefault(known, value.detach())
            return {"$tensor": known}
        if isinstance(value, tuple):
            return {"$tuple": [split(part, f"{path}/{n}") for n, part in enumerate(value)]}
        if isinstance(value, list):
            return [split(part, f"{path}/{n}") for n, part in enumerate(value)]
        if isinstance(value, Mapping):
            parts = {key: split(part, f"{path}/{key}") for key, part in value.items()}
            plain = all(isinstance(key, str) and not key.startswith("$") for key in parts)
            return parts if plain else {"$dict": [[split(key, path), part] for key, part in parts.items()]}
        raise InputError(
            f"{path} is a {type(value).__name__}, which only a pickle could keep",
            field="train.optim",
            mend="Use another optimiser or schedule, or set train.save_strategy to no.",
        )

    return split(tree, name), tensors


def join_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tree`; tensors that were one object are one again."""
    if isinstance(tree, list):
        return [join_tree(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(join_tree(tree["$tuple"], tensors))
    if "$dict" in tree:
        return {join_tree(key, tensors): join_tree(part, tensors) for key, part in tree["$dict"]}
    return {key: join_tree(part, tensors) for key, part in tree.items()}


def _place(value: Tensor) -> Any:
    """The same for two tensors that are the same memory, seen alike."""
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    if not local.numel():
        # A rank that has no row of it: at no place at all.
        return id(value)
    return local.data_ptr(), str(local.device), local.dtype, value.shape, local.stride()


def write_json(path: Path, content: Any) -> None:
    """Write what JSON can hold; NaN and infinities too, as Python's json has them."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read it back; every float is the same again."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any dtypes and devices, of which none need be contiguous or alone in its memory."""
    safetensors.torch.save_file({name: _alone(value) for name, value in tensors.items()}, path)


def _alone(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read them into memory, on the CPU: a file that is mapped must outlive whoever uses its tensors."""
    return {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Names of a model's parameters, whatever is wrapped around its blocks; of a shared one the first."""
    return {parameter: plain_name(name) for name, parameter in model.named_parameters()}


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def optimizer_state(optimizer: Any, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """An optimiser's state and hyper-parameters, by names of parameters.

    Returns:
        state: {name of parameter: {name of state: value}};
        groups: [{"params": [names of parameters], hyper-parameter: value}].

    Raises:
        InputError: a parameter that is not the model's.
    """
    named = [name for group in _named_groups(optimizer, names) for name in group]
    found = optimizer.state_dict()
    # What torch numbers is numbered in the order of the groups.
    state = {named[number]: value for number, value in found["state"].items()}
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        | {"params": [named[number] for number in group["params"]]}
        for group in found["param_groups"]
    ]
    return {"state": state, "groups": groups}


def load_optimizer_state(optimizer: Any, names: Mapping[nn.Parameter, str], saved: dict[str, Any]) -> None:
    """Take over what `optimizer_state` gave, bit for bit.

    Raises:
        InputError: it is of other parameters, or of other groups of them.
    """
    named = _named_groups(optimizer, names)
    before = [group["params"] for group in saved["groups"]]
    if list(map(set, named)) != list(map(set, before)):
        differing = set().union(*map(set, named)) ^ set().union(*map(set, before))
        which = f" ({', '.join(sorted(differing)[:3])}, ...)" if differing else ""
        raise InputError(
            f"the checkpoint's optimiser is of other parameters than the run's{which}",
            mend="Resume with the model, adapter and weight decay of the run that wrote it.",
        )
    number = {name: at for at, name in enumerate(name for group in named for name in group)}
    # torch pairs parameters by their places in the groups.
    groups = [
        group | {"params": [number[name] for name in here]}
        for group, here in zip(saved["groups"], named, strict=True)
    ]
    state = {number[name]: value for name, value in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _keep_dtypes(optimizer, names, saved["state"])


def _named_groups(optimizer: Any, names: Mapping[nn.Parameter, str]) -> list[list[str]]:
    groups = [group["params"] for group in optimizer.param_groups]
    if any(parameter not in names for group in groups for parameter in group):
        raise InputError("the optimiser has a parameter that is not the model's")
    return [[names[parameter] for parameter in group] for group in groups]


def _keep_dtypes(optimizer: Any, names: Mapping[nn.Parameter, str], saved: dict[str, dict[str, Any]]) -> None:
    """torch casts what it loads to the parameter's dtype; an optimiser may keep fp32 beside bf16 weights."""
    for parameter, state in optimizer.state.items():
        for key, value in saved.get(names.get(parameter, ""), {}).items():
            held = state.get(key)
            if isinstance(held, Tensor) and isinstance(value, Tensor) and held.dtype != value.dtype:
                state[key] = value.to(held.device)


def random_states() -> dict[str, Tensor]:
    """States of this process's generators: Python's, NumPy's, torch's, and that of its CUDA device."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Take over what `random_states` gave; the state of a CUDA device only where there is one now."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint, its last file; all of it is on the disk when this returns.

    It names every file with its bytes and the digest that `dpo_kit.disk.digest_file` gives.
    """
    files = {}
    for path in _files(folder):
        sync_file(path)
        files[_name(path, folder)] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    path = folder / MANIFEST
    path.write_text(_manifest_text(files), encoding="utf-8")
    sync_file(path)
    for inner in {file.parent for file in _files(folder)} | {folder}:
        sync_folder(inner)


def _manifest_text(files: Mapping[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": files, "sha256": own}, indent=1)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and _name(p, folder) != MANIFEST)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def pickles_in(folder: Path) -> list[str]:
    """Names of the files in a folder that torch.save or pickle writes."""
    return [_name(path, folder) for path in _files(folder) if path.suffix.lower() in _PICKLES]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was written.

    Nothing is read again that was read already and has not been touched since.
    """
    stamps = tuple((_name(p, folder), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(folder))
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written whole"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    try:
        return _damage(folder.absolute(), text, stamps)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


@lru_cache(maxsize=16)
def _damage(folder: Path, text: str, stamps: Iterable[tuple[str, int, int]]) -> str | None:
    try:
        files = json.loads(text)["files"]
        as_written = text == _manifest_text(files)
    except (ValueError, KeyError, TypeError, RecursionError):
        as_written = False
    if not as_written:
        return f"{MANIFEST} is not as it was written"
    sizes = {name: size for name, size, _ in stamps}
    for name, expected in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes and was written with {expected['bytes']}"
        if digest_file(folder / name) != expected["sha256"]:
            return f"{name} is not as it was written: its digest differs"
    return None
