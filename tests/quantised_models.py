"""Small saved models and what is loaded from them in fewer bits, with an adapter to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dpo_kit.models import load_model
from dpo_kit.quantised import quantization_config

# Whole blocks of 64 weights, which bitsandbytes can pack for a processor.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
BITS = ("4bit", "8bit")


def saved(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A folder with a small model."""
    path = folder / family
    if not path.exists():
        make_model(family, **(SIZES | changes)).save_pretrained(path)
    return path


def quantised(
    path: Path, bits: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """It, with the weights of its layers in 4 or 8 bits."""
    config = quantization_config(bits, dtype)
    return load_model(path, dtype, quantization=config, device=torch.device(device))


def adapted(model: PreTrainedModel, seed: int = 0, rank: int = 4) -> PeftModel:
    """A model with a fresh LoRA on all its layers."""
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)
