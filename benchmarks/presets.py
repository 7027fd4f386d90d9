"""The models that the benchmark trains: Llama-shaped configurations, random weights.

`section10` is the one whose figures stand in the README: DESIGN.md section 10. The small ones are for the
scaling curves and the tests, the large ones (the shapes of Llama 3.2 1B and Llama 3 8B) for GPUs.
"""

from __future__ import annotations

from typing import Any

from dpo_kit.errors import InputError

DEFAULT = "section10"
HEAD_SIZE = 64


def _llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    tied: bool = True,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    DEFAULT: _llama(8, 576, 1536, 9, 3, 49152),
    "tiny": _llama(2, 64, 170, 1, 1, 512),
    "small": _llama(2, 128, 341, 2, 2, 16384),
    "llama-1b": _llama(16, 2048, 8192, 32, 8, 128256),
    "llama-8b": _llama(32, 4096, 14336, 32, 8, 128256, tied=False),
}
# Weights, gradients, optimiser state and reference of 8B in fp32 are larger than any one GPU's memory.
_BF16_WEIGHTS = {"llama-8b"}


def model_fields(
    preset: str, layers: int | None = None, hidden: int | None = None, vocabulary: int | None = None
) -> dict[str, Any]:
    """Configuration of a preset, with its size changed where a number is given.

    A changed hidden size keeps the default's proportions: heads of 64, three per key-value head where they
    divide, an intermediate size of 8/3.
    """
    fields = dict(PRESETS[preset])
    if hidden is not None:
        heads = hidden // HEAD_SIZE
        if heads < 1 or hidden % HEAD_SIZE:
            raise InputError(f"hidden size {hidden} is not a multiple of {HEAD_SIZE}", field="--hidden")
        fields |= {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
            "intermediate_size": hidden * 8 // 3,
        }
    if layers is not None:
        fields["num_hidden_layers"] = layers
    if vocabulary is not None:
        fields["vocab_size"] = vocabulary
    return fields


def default_weights(preset: str) -> str:
    """dtype of the weights where the command line leaves it open."""
    return "bf16" if preset in _BF16_WEIGHTS else "fp32"
