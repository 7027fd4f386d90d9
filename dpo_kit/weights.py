"""Weights of a model: random ones, or those of files, quantised on the way where that is asked for.

What is missing in files is told; what may be missing is the caller's business (`models`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from dpo_kit.errors import InputError
from dpo_kit.foreign_code import require_safetensors
from dpo_kit.quantised import use_exact_layers


def random_weights(
    kind: Any, name: str, config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """A model of one of transformers' Auto classes with random weights of the seed; `name` is for errors.

    Raises:
        InputError: the configuration is of no such model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return kind.from_config(config, dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            problem = _first_line(error)[:300]
            raise InputError(f"no {name} can be made: {problem}", field="model.config") from error


def refuse_quantised_random(quantization: BitsAndBytesConfig | None) -> None:
    """Raises InputError where random weights are to be quantised."""
    if quantization is not None:
        raise InputError(
            "random weights are not quantised: a base that stays random has nothing to be adapted",
            field="model.quantization",
            mend="Name a model.path, or leave it out.",
        )


def saved_weights(
    kind: Any,
    source: str | Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    seed: int,
    *,
    quantization: BitsAndBytesConfig | None,
    device: torch.device | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """A model of a folder or hub id, and the names of the tensors that it lacks, and has in other shapes.

    Both are filled with random numbers of the seed.
    """
    folder = Path(source)
    if folder.is_dir():
        require_safetensors(folder, field="model.path")
    if quantization is not None and hasattr(config, "quantization_config"):
        raise InputError(
            "the model is saved quantised already",
            file=source,
            field="model.quantization",
            mend="Leave it out: the model is taken as it is.",
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    # So that the callers can refuse them by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if quantization is not None:
        options |= {"quantization_config": quantization}
    if quantization is not None and device is not None:
        options |= {"device_map": {"": device}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model, found = kind.from_pretrained(source, config=config, dtype=dtype, **options)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise InputError(_first_line(error), file=source, field="model.path") from error
    use_exact_layers(model)
    # Of what has another shape, transformers says (name, found, expected).
    misshapen = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    return model, set(found["missing_keys"]), misshapen


def refuse_lacking(names: set[str], source: str | Path) -> None:
    """Raises InputError where a model's files lack tensors."""
    if names:
        some = ", ".join(sorted(names)[:3])
        raise InputError(
            f"the weights lack {len(names)} tensors or have them in other shapes: {some}",
            file=source,
            field="model.path",
            mend="transformers would fill them with random numbers; save the model again, whole.",
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
