"""Which adapters of peft can be scored and trained here, by their fields, and why others cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dpo_kit.errors import InputError, nearest

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
# How LoRA may start; of data: by a pass over it, without which peft quietly starts otherwise, or fails.
_STARTS = ("gaussian", "orthogonal", "mica", "pissa", "olora")
_STARTS_OF_DATA = ("eva",)
# Those that take their first product out of the base model's weights.
_STARTS_IN_BASE = ("pissa", "olora")
_LOST_BASE = "it changes the base model's weights, and not in the same way when the saved adapter is loaded"
# Fields of LoraConfig that make another kind of adapter of it.
_LORA_VARIANTS = {
    "alora_invocation_tokens": "rows of a token tree do not tell from which token of a sequence on it acts",
    "arrow_config": "it mixes other adapters by what each token needs",
    "kasa_config": _LOST_BASE,
    "lora_ga_config": _LOST_BASE,
    "megatron_config": "it was never tried here",
    "monteclora_config": "it draws random numbers in training, the same for all that share a prefix",
    "use_bdlora": "it was never tried here",
    "use_qalora": "it was never tried here",
    "velora_config": "it was never tried here",
}


def check_supported(config: Any, *, field: str, file: str | Path | None = None) -> None:
    """Refuse the configuration of an adapter that cannot be scored here, nor trained.

    Raises:
        InputError: with the reason.
    """
    check_kind(_kind(config), type(config), field=field, file=file)
    for name, reason in _LORA_VARIANTS.items():
        if getattr(config, name, None):
            raise InputError(
                f"this variant of LoRA is not supported: {reason}",
                file=file,
                field=f"{field}.{name}",
                mend="Leave it out.",
            )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STARTS + _STARTS_OF_DATA:
        lost = start.lower().startswith(("pissa_niter_", "corda", "loftq", "lora_ga"))
        raise InputError(
            f"LoRA that starts by '{start}' is not supported: {_LOST_BASE if lost else 'it is not known'}",
            file=file,
            field=f"{field}.init_lora_weights",
            mend=f"Known: true, false, {', '.join(_STARTS)}.",
        )


def check_new(config: Any, *, field: str = "peft_config") -> None:
    """Refuse the configuration of an adapter that cannot be made and trained here.

    Raises:
        InputError: with the reason.
    """
    check_supported(config, field=field)
    start = getattr(config, "init_lora_weights", True)
    if start in _STARTS_OF_DATA:
        raise InputError(
            f"'{start}' takes a pass over data before training, which is not made here",
            field=f"{field}.init_lora_weights",
            mend="Leave it out, or make the adapter with peft and hand the model over, or name it as "
            "model.adapter.",
        )


def check_names(config: Any, model: nn.Module) -> None:
    """Refuse names of layers or parameters that a model does not have: peft passes over those among others.

    Args:
        config: of a new adapter.
        model: the base model.

    Raises:
        InputError: naming them.
    """
    layers = [name for name, _ in model.named_modules()]
    places = {
        "target_modules": layers,
        "modules_to_save": layers,
        "target_parameters": [name for name, _ in model.named_parameters()],
    }
    for field, known in places.items():
        asked = getattr(config, field, None)
        if asked is None or isinstance(asked, str):
            # A pattern, which peft refuses where nothing is like it.
            continue
        if lost := sorted(str(n) for n in asked if not any(f".{k}".endswith(f".{n}") for k in known)):
            last = {name.rpartition(".")[2] for name in known} - {""}
            raise InputError(
                f"the model has none of that name: {', '.join(lost)}",
                field=f"model.lora.{field}",
                mend=nearest(lost[0], sorted(name for name in last if not name.isdigit())),
            )


def check_leaves_base(config: Any, *, field: str, file: str | Path | None = None) -> None:
    """Refuse the configuration of an adapter without which the model is not the base it was made on.

    Raises:
        InputError: with the reason.
    """
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower() in _STARTS_IN_BASE:
        raise InputError(
            f"'{start}' takes the adapter's start out of the base model's weights: with the adapter switched "
            "off they are no model that there was before",
            file=file,
            field=field,
            mend="Set reference.mode to auto, cached or live.",
        )


def check_kind(kind: str, config_class: Any, *, field: str, file: str | Path | None = None) -> None:
    """Raises InputError where a kind (`peft_type`, and the class of its configuration) is not supported."""
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
