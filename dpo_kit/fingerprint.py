"""What a model is known by: digests of its weights, and of all that its log-probs depend on.

Looks at a model in memory, or at the files of one; loads nothing and keeps nothing (see `reference`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dpo_kit.adapter_folders import base_of
from dpo_kit.disk import BLOCK_BYTES, THREADS, digest_block, digest_file
from dpo_kit.errors import InputError
from dpo_kit.models import unwrap

# Part of every key: raise it when the same model gives other log-probs than before, or shards another form.
FORMAT_VERSION = 1
# Part of what files are known by: raise it when other files, or other bytes of them, count.
_FILES_VERSION = 2


# Fields of configurations, of models and of adapters, that no log-prob depends on: where it comes from,
# what generation, training, a cache of keys and values or the shape of outputs go by. Dropout is off in all
# that is scored here; the dtype is that of the weights. A field that is not named here counts.
_WITHOUT_EFFECT = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "auto_mapping", "revision"),
        *("transformers_version", "peft_version", "base_model_name_or_path", "parent_library"),
        *("inference_mode", "task_type", "init_lora_weights", "initializer_range", "router_aux_loss_coef"),
        *("dtype", "torch_dtype", "use_cache", "cache_implementation", "gradient_checkpointing"),
        *("return_dict", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "prefix"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
    }
)
# peft's modules around a layer of the base model, and what torch.compile puts around one.
_WRAPPERS = ("base_layer", "original_module", "_orig_mod")


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of a model's parameters and buffers."""
    return _digest_tensors(dict(model.state_dict()))


def model_key(
    model: nn.Module, *, autocast: torch.dtype | None = None, adapters: Sequence[str] | None = None
) -> str:
    """32 hexadecimal digits that change with what the model's log-probs depend on, and with nothing else.

    That is: names, dtypes, shapes and values of parameters and of buffers (those that are not saved too), the
    class's name, the configuration's fields, without those that have no effect, and the minor version of
    transformers, whose code a release may change. How a forward pass is laid out, by which kernels and with
    which other sequences changes a log-prob by rounding only, and is no part of it.

    It cannot see what is in none of these: an attribute of a module that was set by hand (`attention.scaling
    *= 0.5`, another `act_fn`), a hook, or the code of a class that was edited under the same name. After such
    a change use another cache folder, or a live reference.

    Args:
        model: a causal LM, possibly wrapped (DDP, compile, peft).
        autocast: what it is scored under.
        adapters: names of the peft adapters that are switched on; default: those that are. With none the key
            is the bare base model's.
    """
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "peft_config") else inner
    on = active_adapters(inner) if adapters is None else list(adapters)
    tensors = dict(_named_tensors(base, on))
    if on and hasattr(inner, "prompt_encoder"):
        tensors |= inner.prompt_encoder.state_dict(prefix="prompt_encoder ")
    facts = {
        "version": FORMAT_VERSION,
        "transformers": transformers.__version__.split(".")[:2],
        "class": type(base).__qualname__,
        "config": _with_effect(base.config.to_dict()),
        "autocast": None if autocast is None else str(autocast),
        "weights": _digest_tensors(tensors),
    }
    if on:
        facts["adapters"] = [_with_effect(inner.peft_config[name].to_dict()) for name in on]
        facts["scaling"] = _scaling(base, on)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_as_text).encode()).hexdigest()[:32]


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that a peft model's forward goes through; none where it is a bare model."""
    inner: Any = unwrap(model)
    if not hasattr(inner, "peft_config") or inner._adapters_disabled:
        return []
    return list(inner.active_adapters)


def files_key(folder: Path, *also: str) -> str | None:
    """32 hexadecimal digits for the bytes of a model's files in a folder, without loading it.

    Args:
        folder: with *.safetensors and config.json, or with an adapter on a model in another folder.
        also: what else the model that is loaded from there depends on.

    Returns:
        None where the files alone do not say which model it is: weights that are not there, or not yet, and
        an adapter on a model elsewhere.
    """
    if not _has_weights(folder):
        return None
    patterns = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    base: str | None = ""
    if (folder / "adapter_config.json").is_file():
        try:
            base = files_key(Path(base_of(folder)))
        except InputError:
            base = None
    if base is None:
        return None
    digests = [(path.name, digest_file(path)) for path in files]
    versions = (FORMAT_VERSION, _FILES_VERSION)
    return hashlib.sha256(repr((versions, digests, base, also)).encode()).hexdigest()[:32]


def adapter_tensors(model: nn.Module, adapters: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers of some of a peft model's adapters, by their names in the wrapped base model."""
    base: Any = unwrap(model).get_base_model()  # type: ignore[operator]
    layers, wanted = _adapted_layers(base), set(adapters)
    return {
        name: value
        for name, value in _all_tensors(base).items()
        if wanted.intersection(_within_adapter(name.split("."), layers))
    }


def trained_base_parameters(model: nn.Module) -> list[str]:
    """Names of the base model's own parameters that a peft model trains: biases, norms, unfrozen layers.

    A weight that is shared is named wherever it is.
    """
    base: Any = unwrap(model).get_base_model()  # type: ignore[operator]
    layers = _adapted_layers(base)
    trained = (n for n, p in base.named_parameters(remove_duplicate=False) if p.requires_grad)
    return [name for name in trained if not _within_adapter(name.split("."), layers)]


def _has_weights(folder: Path) -> bool:
    """Whether there are weights, and all that an index names."""
    if next(folder.glob("*.safetensors"), None) is None:
        return False
    shards: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        named = read_fields(index).get("weight_map")
        if not isinstance(named, dict):
            return False
        shards |= set(map(str, named.values()))
    return all((folder / shard).is_file() for shard in shards)


def read_fields(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, or none that is whole and holds one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_effect(fields: Any) -> Any:
    """A configuration without the fields that have no effect, whatever is nested in it."""
    if isinstance(fields, dict):
        return {
            str(name): _with_effect(value)
            for name, value in fields.items()
            if name not in _WITHOUT_EFFECT and "drop" not in str(name)
        }
    return fields


def _as_text(value: Any) -> Any:
    """What JSON has no word for."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _named_tensors(base: nn.Module, on: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their names in the bare model; of peft's own only what is switched on."""
    layers = _adapted_layers(base)
    for name, value in _all_tensors(base).items():
        parts = name.split(".")
        if inner := _within_adapter(parts, layers):
            switched_on = [adapter for adapter in on if adapter in inner]
            if not switched_on:
                continue
            # What an adapter is called changes nothing.
            parts = [f"adapter {on.index(p)}" if p == switched_on[0] else p for p in parts]
        yield ".".join(part for part in parts if part not in _WRAPPERS), value


def _all_tensors(base: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too, by name."""
    found = dict(base.state_dict())
    return found | {name: value for name, value in base.named_buffers() if name not in found}


def _within_adapter(parts: list[str], layers: set[str]) -> list[str]:
    """The rest of a tensor's name, past the layer it is wrapped around; empty where it is the base's own."""
    # Longest first: a wrapped layer may lie in a wrapped layer.
    owner = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in layers), None)
    return [] if owner is None or parts[owner] in _WRAPPERS else parts[owner:]


def _adapted_layers(base: nn.Module) -> set[str]:
    """Names of the modules that peft has put around layers of the base model."""
    return {name for name, module in base.named_modules() if hasattr(module, "adapter_layer_names")}


def _scaling(base: nn.Module, on: Sequence[str]) -> list[list[float]]:
    """The factor of each adapter in each layer, which may have been set after the configuration was read."""
    layers = [getattr(module, "scaling", None) for module in base.modules()]
    return [[float(s[name]) for s in layers if isinstance(s, dict) and name in s] for name in on]


def _digest_tensors(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    seen: dict[tuple[Any, ...], bytes] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, value in sorted(tensors.items()):
            if not isinstance(value, Tensor):
                digest.update(f"{name} {value!r}".encode())
                continue
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if hasattr(value, "full_tensor"):
                # Sharded over ranks, which meet here; what is gathered is gone afterwards.
                digest.update(_digest_values(value.full_tensor(), pool))
                continue
            # Tied weights are hashed once.
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            if place not in seen:
                seen[place] = _digest_values(value, pool)
            digest.update(seen[place])
    return digest.hexdigest()


def _digest_values(value: Tensor, pool: ThreadPoolExecutor) -> bytes:
    """SHA-256 of the digests of a tensor's blocks."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    blocks = [flat[start : start + BLOCK_BYTES].data for start in range(0, len(flat), BLOCK_BYTES)]
    parts = map(digest_block, blocks) if len(blocks) == 1 else pool.map(digest_block, blocks)
    return hashlib.sha256(b"".join(parts)).digest()
