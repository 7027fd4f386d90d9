"""Causal language models and reward models: loading them, their heads, and their tree attention.

What differs between model families and matters here stands in this file and nowhere else: how the
logits are scaled or capped, and where the head is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from dpo_kit.attention import TREE_ATTENTION
from dpo_kit.errors import InputError

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
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
        return getattr(inner, _VALUE_HEAD)
    raise InputError(
        f"{type(inner).__name__} has {problem}",
        field="model.path",
        mend="Give a decoder that has AutoModelForSequenceClassification with num_labels=1.",
    )


@contextlib.contextmanager
def no_padding_token(model: nn.Module) -> Iterator[None]:
    """Within: a reward model takes no token for padding; after: as before.

    So its own pooling reads the very last token of a row, and refuses no batch for want of such a token.
    """
    configs = [config for config in _configs(model) if hasattr(config, "pad_token_id")]
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = -1
        yield
    finally:
        for config, token in zip(configs, before, strict=True):
            config.pad_token_id = token


def set_padding_token(model: nn.Module, token: int) -> None:
    """Have a model's configurations, which are saved with it, name this token as the one for padding."""
    for config in _configs(model):
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = token


def padding_advice(model: nn.Module, last_tokens: Collection[int]) -> str:
    """What to tell the user of a reward model whose padding token is none, or one that replies end with.

    Empty where it is right. dpo_kit reads the value at a reply's last token; whoever loads the model into
    transformers gets that of the last token that is no padding.

    Args:
        model: a reward model.
        last_tokens: of some of the run's replies.
    """
    token = unwrap(model).config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
    if token is not None and token not in last_tokens:
        return ""
    problem = (
        "the model has no pad_token_id: transformers would refuse to score several replies at once"
        if token is None
        else f"replies end with token {token}, which is the model's pad_token_id: transformers would read "
        "their reward one token before the end"
    )
    return (
        f"{problem}. Set pad_token_id, in the config and in the tokenizer, to a token that no reply ends "
        "with, such as the one that begins a text"
    )


def load_config(source: str | Path | dict[str, Any]) -> PretrainedConfig:
    """The configuration of a folder or hub id, or from fields (`{"model_type": "llama", ...}`)."""
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
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        raise InputError(
            "the folder holds an adapter, not a model",
            file=source,
            field="model.path",
            mend="Merge the adapter into its model with peft's merge_and_unload(), and save that.",
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_first_line(error), file=source, field="model.path") from error


def load_model(
    source: str | Path | dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A causal LM with the weights of a folder or hub id, or random ones from a configuration's fields.

    Args:
        source: folder, hub id, or configuration fields with `model_type`.
        dtype: dtype of the weights.
        seed: for random weights; the global generator is left as it was.

    Raises:
        InputError: no such folder, no configuration, no safetensors weights, or not a causal LM.
    """
    config = load_config(source)
    if isinstance(source, dict):
        return _random(AutoModelForCausalLM, "causal LM", config, dtype, seed)
    model, missing, misshapen = _saved(AutoModelForCausalLM, source, config, dtype, seed)
    _refuse_lacking(missing | misshapen, source)
    return model


def load_reward_model(
    source: str | Path | dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, str]:
    """A reward model, that is a body with a value head (AutoModelForSequenceClassification, one label).

    Args:
        source: folder or hub id of a reward model, or of a causal LM, which gets a new value head; or
            configuration fields with `model_type`.
        dtype: dtype of the weights.
        seed: for random weights, a new value head's among them; the global generator is left as it was.

    Returns:
        The model, and what a run should say of its value head where that is new, else "".

    Raises:
        InputError: as `load_model`; or the family has no such class; or the head has several labels.
    """
    config = load_config(source)
    labels, config.num_labels = config.num_labels, 1
    if isinstance(source, dict):
        model = _random(AutoModelForSequenceClassification, "reward model", config, dtype, seed)
        value_head(model)
        return model, f"the reward model is new: random weights of seed {seed}"
    model, missing, misshapen = _saved(AutoModelForSequenceClassification, source, config, dtype, seed)
    of_head = {f"{_VALUE_HEAD}.{name}" for name, _ in value_head(model).named_parameters()}
    if of_head & misshapen:
        problem = f"the value head has num_labels {labels}, and that of a reward model 1"
        mend = "Give a model that was trained with num_labels=1, or a causal language model."
        raise InputError(problem, file=source, field="model.path", mend=mend)
    is_new = of_head <= missing
    _refuse_lacking((missing - of_head if is_new else missing) | misshapen, source)
    return model, f"{source} has no value head: a new one is trained, random of seed {seed}" if is_new else ""


def _random(kind: Any, name: str, config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return kind.from_config(config, dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            problem = _first_line(error)[:300]
            raise InputError(f"no {name} can be made: {problem}", field="model.config") from error


def _saved(
    kind: Any, source: str | Path, config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """A model of a folder or hub id, and the names of the tensors that it lacks, and has in other shapes.

    Both are filled with random numbers of the seed.
    """
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise InputError(
            "the model folder has no weights (*.safetensors)",
            file=folder,
            field="model.path",
            mend="Save the model with save_pretrained(); pickled weights (*.bin, *.pt) are never loaded.",
        )
    options = {"trust_remote_code": False, "use_safetensors": True}
    # So that the callers can refuse them by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model, found = kind.from_pretrained(source, config=config, dtype=dtype, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(_first_line(error), file=source, field="model.path") from error
    # Of what has another shape, transformers says (name, found, expected).
    misshapen = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    return model, set(found["missing_keys"]), misshapen


def _refuse_lacking(names: set[str], source: str | Path) -> None:
    if names:
        some = ", ".join(sorted(names)[:3])
        raise InputError(
            f"the weights lack {len(names)} tensors or have them in other shapes: {some}",
            file=source,
            field="model.path",
            mend="transformers would fill them with random numbers; save the model again, whole.",
        )


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


def _configs(model: nn.Module) -> list[PretrainedConfig]:
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
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        # Not set_attn_implementation(): it asks the hub for names that it does not know.
        for config, _ in before:
            config._attn_implementation = TREE_ATTENTION
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
