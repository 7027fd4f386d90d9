"""Adapters of peft: new ones by their fields, and those of a folder on a model.

Which kinds there are is told by `adapter_kinds`. Loading the base model is the caller's business (`models`),
and so is merging (`merging`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_kit.adapter_folders import (
    CONFIG_FILE,
    REWARD_TASK,
    WEIGHTS_FILE,
    in_a_line,
    read_adapter,
    reads_rewards,
    trained_quantization,
    unusable,
)
from dpo_kit.adapter_kinds import SUPPORTED, check_kind, check_new, check_supported
from dpo_kit.errors import DpoKitWarning, InputError, nearest
from dpo_kit.quantised import quantised_layers

# By whether a reward model is trained.
_TASKS = {True: REWARD_TASK, False: "CAUSAL_LM"}


def new_adapter(
    lora: Mapping[str, Any] | None, other: Mapping[str, Any] | None = None, *, rewards: bool = False
) -> Any:
    """peft's configuration of a new adapter; None where neither is given.

    Args:
        lora: fields of LoraConfig.
        other: `peft_type`, such as LOHA, and the fields of that kind's configuration.
        rewards: whether a reward model is trained; it sets the default of `task_type`.

    Raises:
        InputError: an unknown kind or field, with the nearest known one; a kind that cannot be trained here,
            with the reason; a value that peft refuses; or peft is not there.
    """
    field = "model.lora" if lora is not None else "model.peft"
    if lora is None and other is None:
        return None
    given = {"peft_type": "LORA"} | dict(lora) if lora is not None else dict(other or {})
    _require_peft(field)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: dict[str, Any] = {str(each.value): config for each, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if "peft_type" not in given:
        raise InputError("no peft_type", field=field, mend="Say which kind, e.g. peft_type: LOHA.")
    kind = str(given.pop("peft_type")).upper()
    if kind not in kinds:
        mend = nearest(kind, sorted(kinds.keys() & SUPPORTED))
        raise InputError(f"peft has no '{kind}'", field=f"{field}.peft_type", mend=mend)
    made = kinds[kind]
    check_kind(kind, made, field=f"{field}.peft_type")
    if isinstance(given.get("modules_to_save"), str):
        # peft would take it for a list of letters.
        raise InputError("expected a list", field=f"{field}.modules_to_save", mend="As in [lm_head].")
    known = {each.name for each in dataclasses.fields(made) if each.init} - {"peft_type"}
    for name in given:
        if name not in known:
            raise InputError("unknown key", field=f"{field}.{name}", mend=nearest(str(name), sorted(known)))
    try:
        config = made(**({"task_type": _TASKS[rewards]} | given))
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(in_a_line(error), field=field) from error
    check_new(config, field=field)
    return config


def check_one_adapter(fields: Mapping[str, Any], *, has_sft: bool) -> None:
    """Refuse a recipe's `model` section that asks for more than one adapter.

    Args:
        fields: of the section.
        has_sft: whether the recipe trains the base model first.

    Raises:
        InputError: naming what excludes what.
    """
    asked = [name for name in ("lora", "peft", "adapter") if fields.get(name) is not None]
    if len(asked) > 1:
        raise InputError(
            f"{' and '.join(asked)} are each an adapter, and one is trained",
            field=f"model.{asked[1]}",
            mend="Leave one of them.",
        )
    if has_sft and "adapter" in asked:
        raise InputError(
            "SFT would change the base model that the adapter was trained on",
            field="model.adapter",
            mend="Leave sft out, or train a new adapter (model.lora).",
        )


def put_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, as_trained: bool = False
) -> Any:
    """A model with the adapter of a folder on it: a peft model around it, in place.

    Args:
        model: the base model.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapter's parameters are to be trained.
        as_trained: the model has the weights that the adapter was trained on, quantised or not; without it a
            whole model is warned of, where the recipe beside the adapter says that it was trained on another.

    Raises:
        InputError: no such adapter; one in a pickle; of a kind that cannot be scored here; numbers that are
            not finite; or an adapter of another base model.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_purpose(config, folder, model)
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise unusable(f"the adapter does not fit the model: {in_a_line(error)}", folder) from error
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise unusable(f"the adapter is not whole: {str(warning.message)[:200]}", folder)
    if not (as_trained or quantised_layers(model)) and (bits := trained_quantization(folder)):
        message = (
            f"{folder}: the adapter was trained on a base in {bits}, and is put on the whole one, on which "
        )
        message += "its log-probs are others; dpo-kit merge gives the model that was trained"
        warnings.warn(message, DpoKitWarning, stacklevel=3)
    if more := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")):
        message = (
            f"{folder}: there are more adapters in it ({', '.join(more)}), and they are left where they are"
        )
        warnings.warn(message, DpoKitWarning, stacklevel=3)
    return adapted


def _check_purpose(config: Any, folder: Path, model: nn.Module) -> None:
    """Raises InputError where one of model and adapter is to give rewards and the other is not."""
    rewards = isinstance(getattr(model, "score", None), nn.Module)
    if reads_rewards(folder) and not rewards:
        raise unusable("it is an adapter of a reward model, and is put on a causal LM", folder)
    if rewards and config.task_type == _TASKS[False]:
        raise unusable("it is an adapter of a causal LM, and is put on a reward model", folder)


def read_config(folder: Path, field: str = "model.adapter") -> Any:
    """peft's configuration of a folder's adapter, which is whole, of a kind that is known here, and finite.

    Raises:
        InputError: it is not.
    """
    _require_peft(field)
    try:
        read_adapter(folder)
        from peft import PeftConfig

        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (TypeError, ValueError, KeyError, ImportError) as error:
            raise unusable(f"not a configuration of peft: {in_a_line(error)}", folder) from error
        check_supported(config, field="model.adapter", file=folder)
        _check_finite(folder)
    except InputError as error:
        named = (error.field or "").replace("model.adapter", field)
        raise InputError(error.problem, file=error.file, field=named, mend=error.mend) from error
    return config


def saved_adapters(model: Any) -> list[str]:
    """Names of a peft model's adapters that are saved: all but frozen ones that it is compared with."""
    on = model.active_adapters
    return [name for name, config in model.peft_config.items() if name in on or not config.inference_mode]


def load_adapters(model: Any, folder: Path) -> None:
    """Take over, bit for bit, `saved_adapters` as a peft model with the same adapters has written them.

    Which of them are switched on, and trained, stays as it is.

    Raises:
        InputError: there are others in the folder.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in saved_adapters(model):
        path = (folder if name == "default" else folder / name) / WEIGHTS_FILE
        saved = load_file(path) if path.is_file() else {}
        own = get_peft_model_state_dict(model, adapter_name=name)
        if {key: value.shape for key, value in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(f"there is no adapter like '{name}' of the model", file=path, field="model")
        set_peft_model_state_dict(model, saved, adapter_name=name)


def name_base(model: nn.Module) -> None:
    """Have a peft model's adapters name their base by its whole path, so that it is found from anywhere."""
    for config in model.peft_config.values():  # type: ignore[operator]
        named = config.base_model_name_or_path
        if named and Path(named).is_dir():
            config.base_model_name_or_path = str(Path(named).absolute())


def check_trains(model: nn.Module) -> None:
    """Refuse a peft model that is handed over for training, and cannot be trained.

    Raises:
        InputError: it has no adapter switched on, nothing of it is trained, or its kind is not supported.
    """
    inner: Any = model
    for name in inner.active_adapters:
        check_supported(inner.peft_config[name], field="model.adapter")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "nothing of the model is trained: its adapter is frozen",
            field="model.adapter",
            mend="Name its folder as model.adapter, or load it with PeftModel.from_pretrained(base, folder, "
            "is_trainable=True).",
        )


def _require_peft(field: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        mend = "Install it: pip install 'dpo-kit[peft]'."
        raise InputError("adapters need peft, which is not installed", field=field, mend=mend) from error


def _check_finite(folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise unusable(f"{WEIGHTS_FILE} is damaged: {in_a_line(error)}", folder) from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise unusable(f"numbers of the adapter are not finite: {name}", folder)
