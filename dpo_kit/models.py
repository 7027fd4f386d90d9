"""Causal language models and reward models: loading them, their heads, and their tree attention.

What differs between model families and matters here stands in this file and nowhere else: how the
logits are scaled or capped, and where the head is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dpo_kit.adapter_folders import adapter_and_base, saves
from dpo_kit.adapters import put_adapter
from dpo_kit.attention import TREE_ATTENTION
from dpo_kit.errors import InputError
from dpo_kit.foreign_code import refuse_kernels, refused_code, tell_of_code, untrusted_base
from dpo_kit.quantised import check_whole
from dpo_kit.weights import random_weights, refuse_lacking, refuse_quantised_random, saved_weights

# What transformers' decoders call the linear layer of a ...ForSequenceClassification.
_VALUE_HEAD = "score"


@dataclass(frozen=True)
class Head:
    """The output head of a causal LM: logits = cap(scale * (hidden @ weight.T + bias)).

    Attributes:
        module: the layer that the model's own forward calls.
        scale: factor on the logits.
        softcap: the cap of softcap * tanh(logits / softcap), or None.
    """

    module: Any
    scale: float
    softcap: float | None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def output_head(model: nn.Module) -> Head:
    """The head of a causal LM, with what the family does to its logits.

    Raises:
        InputError: the model has no output embeddings, or they are no plain matrix.
    """
    inner: Any = unwrap(model)
    module = inner.get_output_embeddings()
    if module is None or not hasattr(module, "weight") or module.weight.ndim != 2:
        raise InputError(
            f"{type(inner).__name__} has no output head with a weight matrix",
            field="model.path",
            mend="Give a causal language model (AutoModelForCausalLM).",
        )
    if hasattr(module, "base_layer"):
        # An adapter on the head adds to logits that are never made; see peft's BaseTunerLayer.
        raise InputError(
            "an adapter on the output head is not supported",
            field="model.lora",
            mend="Leave lm_head out of target_modules; modules_to_save may have it.",
        )
    check_whole(module)
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(module, float(scale), getattr(config, "final_logit_softcapping", None))


def is_reward_model(model: nn.Module) -> bool:
    """Whether a model has a value head in place of an output head."""
    return isinstance(getattr(unwrap(model), _VALUE_HEAD, None), nn.Module)


def value_head(model: nn.Module) -> nn.Module:
    """The layer of a reward model that turns [..., H] hidden states into [..., 1] rewards.

    Raises:
        InputError: the model has none, or one with several labels or with an adapter on it.
    """
    inner: Any = unwrap(model)
    labels = getattr(getattr(inner, "config", None), "num_labels", None)
    if not is_reward_model(inner):
        problem = "no value head that reads the last token"
    elif labels != 1:
        problem = f"a value head with {labels} labels"
    elif hasattr(getattr(inner, _VALUE_HEAD), "base_layer"):
        raise InputError(
            "an adapter on the value head is not supported",
            field="model.lora",
            mend=f"Leave {_VALUE_HEAD} out of target_modules; with task_type SEQ_CLS it is trained whole.",
        )
    else:
        check_whole(getattr(inner, _VALUE_HEAD))
        return getattr(inner, _VALUE_HEAD)
    raise InputError(
        f"{type(inner).__name__} has {problem}",
        field="model.path",
        mend="Give a decoder that has AutoModelForSequenceClassification with num_labels=1.",
    )


def load_config(source: str | Path | dict[str, Any], *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a folder or hub id (an adapter's: its base's), or of fields with `model_type`."""
    _, source = _taken_apart(source, trust_remote_code)
    if isinstance(source, dict):
        fields = dict(source)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise InputError(
                "no model_type", field="model.config", mend="Say which family, e.g. model_type: llama."
            )
        try:
            return AutoConfig.for_model(model_type, **fields)
        except Exception as error:
            raise InputError(f"not a configuration of transformers: {error}", field="model.config") from error
    _check_folder(source)
    try:
        if trust_remote_code:
            tell_of_code(source, PretrainedConfig.get_config_dict(source)[0])
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        refused = refused_code(error, source, "model.path")
        raise refused or InputError(_first_line(error), file=source, field="model.path") from error
    refuse_kernels(config, source, "model.path")
    return config


def _taken_apart(source: Any, trust_remote_code: bool) -> tuple[Path | None, Any]:
    """`adapter_and_base`, which trusts no model for its adapter's sake."""
    adapter, base = adapter_and_base(source)
    if trust_remote_code and adapter is not None:
        raise untrusted_base(adapter)
    return adapter, base


def load_model(
    source: str | Path | dict[str, Any],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM with the weights of a folder or hub id, or random ones from a configuration's fields.

    Args:
        source: folder, hub id, or configuration fields with `model_type`; of an adapter's folder it is the
            peft model on the base that the adapter names, with nothing to be trained.
        dtype: dtype of the weights.
        seed: for random weights; the global generator is left as it was.
        quantization: of the linear layers but for the head; see `dpo_kit.quantised.quantization_config`.
        device: where quantised weights are made, and stay; default: the GPU where there is one.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no such folder, no configuration, no safetensors weights, or not a causal LM; or it
            cannot be quantised.
    """
    adapter, source = _taken_apart(source, trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    if isinstance(source, dict):
        refuse_quantised_random(quantization)
        return random_weights(AutoModelForCausalLM, "causal LM", config, dtype, seed)
    options: dict[str, Any] = {"quantization": quantization, "device": device}
    options |= {"trust_remote_code": trust_remote_code}
    model, missing, misshapen = saved_weights(AutoModelForCausalLM, source, config, dtype, seed, **options)
    refuse_lacking(missing | misshapen, source)
    return model if adapter is None else put_adapter(model, adapter)


def load_reward_model(
    source: str | Path | dict[str, Any],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, str]:
    """A reward model, that is a body with a value head (AutoModelForSequenceClassification, one label).

    Args:
        source: folder or hub id of a reward model, or of a causal LM, which gets a new value head; or
            configuration fields with `model_type`; or an adapter's folder, as for `load_model`.
        dtype: dtype of the weights.
        seed: for random weights, a new value head's among them; the global generator is left as it was.
        quantization: as for `load_model`.
        device: likewise.
        trust_remote_code: likewise.

    Returns:
        The model, and what a run should say of its value head where that is new, else "".

    Raises:
        InputError: as `load_model`; or the family has no such class; or the head has several labels.
    """
    adapter, source = _taken_apart(source, trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    labels, config.num_labels = config.num_labels, 1
    if isinstance(source, dict):
        refuse_quantised_random(quantization)
        model = random_weights(AutoModelForSequenceClassification, "reward model", config, dtype, seed)
        value_head(model)
        return model, f"the reward model is new: random weights of seed {seed}"
    options: dict[str, Any] = {"quantization": quantization, "device": device}
    options |= {"trust_remote_code": trust_remote_code}
    kind = AutoModelForSequenceClassification
    model, missing, misshapen = saved_weights(kind, source, config, dtype, seed, **options)
    of_head = {f"{_VALUE_HEAD}.{name}" for name, _ in value_head(model).named_parameters()}
    if of_head & misshapen:
        problem = f"the value head has num_labels {labels}, and that of a reward model 1"
        mend = "Give a model that was trained with num_labels=1, or a causal language model."
        raise InputError(problem, file=source, field="model.path", mend=mend)
    is_new = of_head <= missing
    refuse_lacking((missing - of_head if is_new else missing) | misshapen, source)
    about = f"{source} has no value head: a new one is trained, random of seed {seed}" if is_new else ""
    if adapter is None:
        return model, about
    return put_adapter(model, adapter), "" if saves(adapter, _VALUE_HEAD) else about


def embedded_tokens(model: nn.Module) -> int:
    """Number of token ids that a model has an embedding for."""
    embeddings: Any = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def check_length(
    model: nn.Module, max_length: int | None, longest: int, field: str = "data.max_length"
) -> None:
    """Refuse sequences that the model has no positions for.

    Args:
        model: a causal LM.
        max_length: the run's limit, for the message.
        longest: tokens of the longest sequence.
        field: what sets the limit.

    Raises:
        InputError: the positions are a learned table (GPT-2, OPT), and it is shorter; or they are rotary
            and scaled by the longest sequence in the batch (dynamic, longrope), beyond where that begins.
            Other rotary positions go on; whether that is wise is the user's decision.
    """
    config: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type") in ("dynamic", "longrope") and original and longest > original:
        raise InputError(
            f"a sequence has {longest} tokens; beyond {original} the {rope['rope_type']} positions of this "
            "model make each log-prob depend on the other sequences of the batch",
            field=field,
            mend=f"Set it to {original} or less.",
        )
    words = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in unwrap(model).modules() if isinstance(m, nn.Embedding) and m is not words]
    if limit is not None and longest > limit and any(t.num_embeddings >= limit for t in tables):
        raise InputError(
            f"a sequence has {longest} tokens (limit {max_length}), and the model has {limit} positions",
            field=field,
            mend=f"Set it to {limit} or less.",
        )


def _check_folder(source: str | Path) -> None:
    """A path that looks local and is not there is a typing error, not a hub id."""
    text = str(source)
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_local and not Path(text).is_dir():
        raise InputError("no such model folder", file=text, field="model.path", mend="Correct the path.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def disable_dropout(model: nn.Module) -> bool:
    """Turn every dropout of a model off, in place; True where there was one.

    Rows that several sequences share would get one draw for all of them, and the reference's
    log-probs would not be the policy's.
    """
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found, module.p = found or module.p > 0, 0.0
        for name, value in vars(module).items():
            # Attention layers hand a plain number to their attention function.
            if name.endswith(("dropout", "dropout_p")) and isinstance(value, float) and value > 0:
                found = True
                setattr(module, name, 0.0)
    return found


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Every distinct configuration that a layer of the model reads its attention function from."""
    found: dict[int, PretrainedConfig] = {}
    for module in unwrap(model).modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
            text = config.get_text_config()
            found[id(text)] = text
    return list(found.values())


@contextlib.contextmanager
def tree_attention(model: nn.Module) -> Iterator[None]:
    """Within: the model reads token trees; after: as it was before. Nothing is left on the model.

    The backward pass belongs inside where gradient checkpointing computes the forward again.
    """
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    try:
        # Not set_attn_implementation(): it asks the hub for names that it does not know.
        for config, _ in before:
            config._attn_implementation = TREE_ATTENTION
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
