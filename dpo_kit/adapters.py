"""Adapters of peft: which can be trained here, new ones by their fields, those in a folder, and their bases.

Loading the base model is the caller's business (`models`), and so is merging (`merging`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_kit.errors import DpoKitWarning, InputError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Kinds that were measured to be right here, with peft 0.21: token trees and padded rows give the log-probs of
# separate sequences, training mode those of eval mode, the reference's key changes with every trained number,
# switched off they leave the base model, and saved and loaded they are the same bit for bit.
SUPPORTED = frozenset(
    {
        *("LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "C3A", "BEFT", "MISS", "ROAD", "FROD"),
        *("OSF", "DEFT", "HIRA", "GLORA", "SHIRA", "PSOFT", "VBLORA", "UNILORA", "DELORA", "GRALORA"),
        *("WAVEFT", "PEANUT", "RANDLORA", "TINYLORA", "FOURIERFT", "LN_TUNING", "SUPERTUNING"),
        "TRAINABLE_TOKENS",
    }
)
# Why the others are not.
_REFUSED = {
    "ADALORA": "its ranks are dealt out anew by a call in every step, which this trainer does not make",
    "ADAMSS": "its subspaces are chosen by a callback in every step, which this trainer does not have",
    "ADAPTION_PROMPT": "it hides in attention layers where the key of a cached reference cannot see it",
    "LILY": "what it adds to a token depends on the other sequences of a batch",
    "POLY": "it wants the number of a task with each sequence",
    "PVERA": "it draws random numbers in training, which sequences that share a prefix would have in common",
    "SHADOW": "its forward is not that of a causal LM",
    "XLORA": "it mixes other adapters by a second forward of its own",
}
# LoRA whose first values come of a pass over data; without it peft quietly starts from others, or fails.
_LORA_OF_DATA = ("eva", "corda")
# By whether a reward model is trained.
_TASKS = {True: "SEQ_CLS", False: "CAUSAL_LM"}


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
    given = {"peft_type": "LORA"} | dict(lora) if lora is not None else dict(other) if other else None
    if given is None:
        return None
    _require_peft(field)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: dict[str, Any] = {str(each.value): config for each, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if "peft_type" not in given:
        raise InputError("no peft_type", field=field, mend="Say which kind, e.g. peft_type: LOHA.")
    kind = str(given.pop("peft_type")).upper()
    if kind not in kinds:
        mend = _nearest(kind, kinds.keys() & SUPPORTED)
        raise InputError(f"peft has no '{kind}'", field=f"{field}.peft_type", mend=mend)
    made = kinds[kind]
    _check_kind(kind, made, field=f"{field}.peft_type")
    known = {each.name for each in dataclasses.fields(made) if each.init} - {"peft_type"}
    for name in given:
        if name not in known:
            raise InputError("unknown key", field=f"{field}.{name}", mend=_nearest(str(name), known))
    try:
        config = made(**({"task_type": _TASKS[rewards]} | given))
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(_in_a_line(error), field=field) from error
    check_new(config, field=field)
    return config


def check_supported(config: Any, *, field: str, file: str | Path | None = None) -> None:
    """Refuse the configuration of an adapter that cannot be scored here, nor trained.

    Raises:
        InputError: with the reason.
    """
    _check_kind(_kind(config), type(config), field=field, file=file)
    if getattr(config, "alora_invocation_tokens", None):
        raise InputError(
            "an activated LoRA acts from a token of each sequence on, which rows of a token tree do not tell",
            file=file,
            field=f"{field}.alora_invocation_tokens",
            mend="Leave it out.",
        )


def check_new(config: Any, *, field: str = "peft_config") -> None:
    """Refuse the configuration of an adapter that cannot be made and trained here.

    Raises:
        InputError: with the reason.
    """
    check_supported(config, field=field)
    start = getattr(config, "init_lora_weights", True)
    if start in _LORA_OF_DATA:
        raise InputError(
            f"'{start}' takes a pass over data before training, which is not made here",
            field=f"{field}.init_lora_weights",
            mend="Leave it out, or make the adapter with peft and hand the model over, or name it as "
            "model.adapter.",
        )


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


def is_adapter(source: Any) -> bool:
    """Whether this is a folder with an adapter, and not a model.

    Raises:
        InputError: it holds both, and what would be loaded from it is unclear.
    """
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not (folder / _CONFIG).is_file():
        return False
    if (folder / "config.json").is_file():
        raise InputError(
            "the folder holds a model and an adapter",
            file=folder,
            field="model.path",
            mend=f"Move the adapter ({_CONFIG} and {_WEIGHTS}) to a folder of its own.",
        )
    return True


def adapter_and_base(source: Any) -> tuple[Path | None, Any]:
    """An adapter's folder and where its base model is; or None and the source itself, where it is no adapter.

    Raises:
        InputError: see `is_adapter` and `base_of`.
    """
    return (Path(source), base_of(source)) if is_adapter(source) else (None, source)


def base_of(folder: str | Path) -> str:
    """Where the base model of an adapter in a folder is: another folder, or a hub id.

    A base that the adapter's own run made (RUN/sft/model) is looked for beside the adapter first, so that a
    run folder can be moved. Other relative names count from the working folder, or else from the adapter's.

    Raises:
        InputError: no whole adapter, one that names no base, or a base folder that is not there.
    """
    folder = Path(folder)
    fields = _fields(folder)
    named = fields.get("base_model_name_or_path")
    if not named:
        raise InputError(
            "the adapter does not say which model it belongs to",
            file=folder / _CONFIG,
            field="base_model_name_or_path",
            mend="Write the folder or hub id of its base model there.",
        )
    named = str(named)
    if Path(named).parts[-2:] == ("sft", "model"):
        # RUN/model, or RUN/checkpoints/step-N.
        for run in folder.absolute().parents[:2]:
            if (run / "sft" / "model" / "config.json").is_file():
                return str(run / "sft" / "model")
    for place in (Path(named).expanduser(), folder / named):
        if place.is_dir():
            return str(place)
    if named.startswith((".", "/", "~")) or named.count("/") != 1:
        raise InputError(
            f"its base model is not there: '{named}'",
            file=folder / _CONFIG,
            field="base_model_name_or_path",
            mend="Bring the model back there, or write there where it is now.",
        )
    return named


def put_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """A model with the adapter of a folder on it: a peft model around it, in place.

    Args:
        model: the base model.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapter's parameters are to be trained.

    Raises:
        InputError: no such adapter; one in a pickle; of a kind that cannot be scored here; numbers that are
            not finite; or an adapter of another base model.
    """
    _require_peft("model.adapter")
    folder = Path(folder)
    _fields(folder)
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError, ImportError) as error:
        raise _unusable(f"not a configuration of peft: {_in_a_line(error)}", folder) from error
    check_supported(config, field="model.adapter", file=folder)
    _check_finite(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise _unusable(f"the adapter does not fit the model: {_in_a_line(error)}", folder) from error
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise _unusable(f"the adapter is not whole: {str(warning.message)[:200]}", folder)
    if more := sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}")):
        message = (
            f"{folder}: there are more adapters in it ({', '.join(more)}), and they are left where they are"
        )
        warnings.warn(message, DpoKitWarning, stacklevel=3)
    return adapted


def load_adapters(model: Any, folder: Path) -> None:
    """Take over, bit for bit, what `save_pretrained` of a peft model with the same adapters has written.

    Which of them are switched on, and trained, stays as it is.

    Raises:
        InputError: there are others in the folder.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in model.peft_config:
        path = (folder if name == "default" else folder / name) / _WEIGHTS
        saved = load_file(path) if path.is_file() else {}
        own = get_peft_model_state_dict(model, adapter_name=name)
        if {key: value.shape for key, value in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(f"there is no adapter like '{name}' of the model", file=path, field="model")
        set_peft_model_state_dict(model, saved, adapter_name=name)


def saves(folder: str | Path, layer: str) -> bool:
    """Whether a folder's adapter holds its own copy of a layer of the base model, such as `score`."""
    from safetensors import safe_open

    with safe_open(Path(folder) / _WEIGHTS, "pt") as file:
        return any(f".{layer}." in name for name in file.keys())  # noqa: SIM118


def reads_rewards(folder: str | Path) -> bool:
    """Whether a folder's adapter is one for a reward model."""
    return _fields(Path(folder)).get("task_type") == _TASKS[True] or saves(folder, "score")


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


def _check_kind(kind: str, config_class: Any, *, field: str, file: str | Path | None = None) -> None:
    from peft.config import PromptLearningConfig

    if kind in SUPPORTED:
        return
    if issubclass(config_class, PromptLearningConfig):
        reason = "it puts virtual tokens before a prompt, for which token trees have no place"
    else:
        reason = _REFUSED.get(kind, "it was never tried here")
    raise InputError(
        f"adapters of kind {kind} are not supported: {reason}",
        file=file,
        field=field,
        mend=f"Known: {', '.join(sorted(SUPPORTED))}.",
    )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _fields(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, where the folder has a whole adapter that is no pickle."""
    if not folder.is_dir():
        raise _unusable("no such folder", folder)
    if not (folder / _CONFIG).is_file():
        raise _unusable(f"the folder has no adapter ({_CONFIG})", folder)
    if not (folder / _WEIGHTS).is_file():
        raise InputError(
            f"the folder has no adapter in safetensors ({_WEIGHTS})",
            file=folder,
            field="model.adapter",
            mend="Save the adapter with save_pretrained(); pickled weights (*.bin, *.pt) are never loaded.",
        )
    try:
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(f"{_CONFIG} cannot be read: {_in_a_line(error)}", folder) from error
    if not isinstance(found, dict):
        raise _unusable(f"{_CONFIG} holds no JSON object", folder)
    return found


def _check_finite(folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unusable(f"{_WEIGHTS} is damaged: {_in_a_line(error)}", folder) from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise _unusable(f"numbers of the adapter are not finite: {name}", folder)


def _unusable(problem: str, folder: Path) -> InputError:
    mend = "Name a folder that save_pretrained() of a peft model, or a run, has written."
    return InputError(problem, file=folder, field="model.adapter", mend=mend)


def _in_a_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."
