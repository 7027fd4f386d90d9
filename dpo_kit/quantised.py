"""Models whose frozen weights lie in 4 or 8 bits (bitsandbytes): their settings, and exact layers.

A quantised layer is here a linear layer whose matrix is stored rounded, and is otherwise as any other: its
result for a token depends on that token alone, is the same in training and in evaluation, and its gradient
is that of what was computed. bitsandbytes' own layers are not all that; `use_exact_layers` makes them so.
Adapters on such a model are peft's, and merging them is `merging`'s business.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig

from dpo_kit.errors import InputError

Quantization = str | Mapping[str, Any]

_FIELD = "model.quantization"
_NAMED: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
_KNOWN = (
    *("load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "bnb_4bit_compute_dtype"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
)
_TYPES = ("nf4", "fp4")
# Fields of BitsAndBytesConfig that are not taken, and why.
_WITHOUT_MEANING = {
    "llm_int8_threshold": "activations are not rounded here, so that no outliers are set apart",
    "llm_int8_has_fp16_weight": "weights of 16 bits are no quantised ones",
    "llm_int8_enable_fp32_cpu_offload": "the whole model must be on the device that trains it",
}
_LOW = (torch.bfloat16, torch.float16)


def quantization_fields(setting: Quantization) -> dict[str, Any]:
    """The fields of transformers' BitsAndBytesConfig that a recipe's `model.quantization` stands for.

    Args:
        setting: "4bit": nf4 whose scales are quantised too (QLoRA, arXiv 2305.14314); "8bit": a row of
            weights has one scale (the weights of LLM.int8, arXiv 2208.07339); or the fields themselves.

    Raises:
        InputError: an unknown word or field, or fields that say neither 4 nor 8 bits.
    """
    if isinstance(setting, str):
        if setting not in _NAMED:
            raise InputError(
                f"unknown quantisation '{setting}'",
                field=_FIELD,
                mend=f"Known: {', '.join(_NAMED)}, or fields of BitsAndBytesConfig.",
            )
        return dict(_NAMED[setting])
    for name in setting:
        if name in _WITHOUT_MEANING:
            raise InputError(_WITHOUT_MEANING[name], field=f"{_FIELD}.{name}", mend="Leave it out.")
        if name not in _KNOWN:
            raise InputError("unknown key", field=f"{_FIELD}.{name}", mend=f"Known: {', '.join(_KNOWN)}.")
    if bool(setting.get("load_in_4bit")) == bool(setting.get("load_in_8bit")):
        raise InputError(
            "the fields say neither 4 nor 8 bits, or both",
            field=_FIELD,
            mend="Set load_in_4bit or load_in_8bit to true.",
        )
    if (kind := setting.get("bnb_4bit_quant_type", "nf4")) not in _TYPES:
        field = f"{_FIELD}.bnb_4bit_quant_type"
        raise InputError(f"unknown type '{kind}'", field=field, mend=f"Known: {', '.join(_TYPES)}.")
    _config(dict(setting))
    return dict(setting)


def quantization_config(setting: Quantization | None, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """What `load_model` takes as `quantization`; None where the setting is None.

    Args:
        setting: see `quantization_fields`.
        compute: dtype that 4-bit weights are multiplied in, where the fields name none: that of the run's
            autocast, else of the other weights. (8-bit ones are multiplied in the dtype of what comes in.)

    Raises:
        InputError: as `quantization_fields`; or bitsandbytes is not installed, or has no such dtype.
    """
    if setting is None:
        return None
    fields = quantization_fields(setting)
    require_bitsandbytes()
    if compute == torch.float64:
        raise InputError(
            "bitsandbytes does not compute in float64", field="model.dtype", mend="Set it to float32."
        )
    return _config({"bnb_4bit_compute_dtype": compute} | fields)


def _config(fields: dict[str, Any]) -> BitsAndBytesConfig:
    try:
        return BitsAndBytesConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(str(error).strip().splitlines()[0], field=_FIELD) from error


def require_bitsandbytes() -> None:
    """Raises InputError where the library is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "quantised models need bitsandbytes, which is not installed",
            field=_FIELD,
            mend="pip install dpo-kit[quantisation]",
        )


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' linear layers of a model, by name."""
    # Nobody has made such a layer without the library.
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def quantised_bits(model: nn.Module) -> int | None:
    """4 or 8, the fewest of any layer; None where nothing is quantised."""
    bits = [4 if _is_4bit(layer) else 8 for layer in quantised_layers(model).values()]
    return min(bits, default=None)


def use_exact_layers(model: nn.Module) -> None:
    """Have the quantised layers of a model compute the same in every mode and for every batch; in place.

    - 4 bits: on processors with avx512_bf16 a layer that has once run in eval mode without gradients keeps
      its weights in another order, computes in bf16, and passes no gradient any more (bitsandbytes 0.48 to
      0.50; it only warns). It is told that the processor has no such instructions.
    - 8 bits: activations would be rounded to 8 bits too, their outliers set apart by what else is in the
      batch; on a processor so in eval mode only. So a policy would differ from itself as the reference, a
      tree from padded sequences, and a gradient from its function. The activations are left whole.

    Does nothing where it was done, and nothing to a model that is not quantised.
    """
    for layer in quantised_layers(model).values():
        if _is_4bit(layer):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                # Saving brings the weights back into their order, in place.
                layer.state_dict()
        else:
            layer.forward = MethodType(_forward_8bit, layer)


def check_trainable(policy: nn.Module) -> None:
    """Refuse a quantised policy that cannot be trained.

    Raises:
        InputError: there is no adapter to train, or one that is no LoRA; or another library than
            bitsandbytes quantised it.
    """
    settings: Any = getattr(getattr(policy, "config", None), "quantization_config", None)
    layers = quantised_layers(policy)
    if settings is not None and not layers:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise InputError(
            f"the model is quantised by {getattr(method, 'value', method)}, which was not tested",
            field="model.path",
            mend="Give the model as it was before, and set model.quantization.",
        )
    if not layers:
        return
    if not hasattr(policy, "peft_config"):
        raise InputError(
            "quantised weights cannot be trained: a step is smaller than the distance between two of them",
            field="model.lora",
            mend="Train an adapter: model.lora={r: 16, target_modules: all-linear}; or leave out "
            "model.quantization.",
        )
    inner: Any = policy
    kinds = {str(inner.peft_config[name].peft_type.value) for name in inner.active_adapters}
    if others := sorted(kinds - {"LORA"}):
        raise InputError(
            f"of a quantised base only LoRA is trained; {', '.join(others)} was not tested there",
            field="model.peft",
            mend="Take model.lora, or leave out model.quantization.",
        )


def check_whole(head: nn.Module) -> None:
    """Raises InputError where a head's matrix is quantised: log-probs and rewards are computed from it."""
    if quantised_layers(head):
        raise InputError(
            "the model's head is quantised, and it is needed whole",
            field=_FIELD,
            mend="Name it in llm_int8_skip_modules, such as [lm_head].",
        )


def is_low_precision(model: nn.Module) -> bool:
    """Whether a model computes in 16 bits, whatever autocast says."""
    if next(model.parameters()).dtype in _LOW:
        return True
    return any(_is_4bit(layer) and layer.compute_dtype in _LOW for layer in quantised_layers(model).values())


@contextlib.contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within: 4-bit weights are multiplied in fp32, so that small errors can be told from rounding."""
    layers = [layer for layer in quantised_layers(model).values() if _is_4bit(layer)]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, tied ones once; of packed 4-bit weights those that they stand for."""
    packed = {id(layer.weight) for layer in quantised_layers(model).values() if _is_4bit(layer)}
    parameters: list[Any] = list(model.parameters())
    return sum(p.quant_state.shape.numel() if id(p) in packed else p.numel() for p in parameters)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, and of the scales beside quantised ones."""
    tensors = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    return sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))


def _is_4bit(layer: nn.Module) -> bool:
    return hasattr(layer, "support_avx512bf16_for_cpu")


def _forward_8bit(layer: Any, x: Tensor) -> Tensor:
    """[..., I] -> [..., O], in the dtype of autocast, else of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    # The codes are the weight's data from the start; the scales move from it into the state at some time.
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    out = _Linear8bit.apply(x, layer.weight.data, scales.to(x.device))
    return out if layer.bias is None else out + layer.bias.to(x.dtype)


class _Linear8bit(torch.autograd.Function):
    """x @ weight.T for a frozen matrix, which is made from its codes and let go in both directions.

    Shapes: I inputs, O outputs; codes_OI int8, scales_O fp32, the largest absolute value of each row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
        ctx.save_for_backward(codes_OI, scales_O)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, _dequantised(codes_OI, scales_O, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes_OI, scales_O = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ _dequantised(codes_OI, scales_O, grad.dtype), None, None


def _dequantised(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    return codes_OI.to(dtype).mul_((scales_O / 127).unsqueeze(1))
