"""The table of docs/guide.md: what QLoRA on a model of 8 billion parameters takes of one GPU's memory.

`python docs/plan_one_gpu.py` writes it into the page. Parameters are counted on the meta device; what a layer
keeps for its backward pass, on a layer of an eighth of the widths that is really quantised. No GPU is used.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from plan_large_run import gb, size_of, table, with_table
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_kit.models import load_model
from dpo_kit.quantised import quantization_config

PAGE = Path(__file__).parent / "guide.md"

# The shape of Llama 3 8B (arXiv 2407.21783, table 3).
SHAPE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# nf4, and 0.127 bits for the constants of its blocks, quantised themselves (arXiv 2305.14314, section 3).
BITS = 4.127
# CUDA's context and what the allocator cannot use. Assumed.
OVERHEAD = 1.5e9
BUDGETS = (2048, 4096, 8192, 16_384)
_SMALLER = 8


@cache
def parts() -> dict[str, int]:
    """Parameters: quantised, kept in bf16, and trained."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        quantised = sum(size_of(layer) for layer in layers)
        whole = size_of(model)
        trained = get_peft_model(model, LoraConfig(**LORA)).get_nb_trainable_parameters()[0]
    return {"quantised": quantised, "whole": whole - quantised, "trained": trained}


@cache
def layer_bytes_a_token() -> int:
    """Bytes that a layer with quantised matrices and LoRA keeps for its backward pass, for each token."""
    small = {name: size // _SMALLER for name, size in SHAPE.items() if name.endswith("_size")}
    heads = {name: SHAPE[name] // _SMALLER for name in ("num_attention_heads", "num_key_value_heads")}
    config = LlamaConfig(**SHAPE | small | heads | {"num_hidden_layers": 1, "vocab_size": 64})
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        quantization = quantization_config("4bit", torch.bfloat16)
        model = load_model(folder, torch.bfloat16, quantization=quantization)
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}
    tokens, body = 256, model.get_base_model().model

    def pack(saved: torch.Tensor) -> torch.Tensor:
        # Held, so that no other one gets its place in memory.
        if saved.untyped_storage().data_ptr() not in weights and tokens in saved.shape:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    angles = body.rotary_emb(hidden, torch.arange(tokens)[None])
    hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        body.layers[0](hidden, position_embeddings=angles)
    return _SMALLER * sum(saved.untyped_storage().nbytes() for saved in kept.values()) // tokens


def memory_rows(budget: int) -> list[tuple[str, float]]:
    """(part, bytes) at a budget of so many tokens a micro-batch."""
    count = parts()
    widest = SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    return [
        ("linear layers, nf4 (4.127 bits a weight)", count["quantised"] * BITS / 8),
        ("embedding, head, norms, bf16", 2 * count["whole"]),
        ("LoRA of rank 16, and its gradient, fp32", 8 * count["trained"]),
        ("AdamW's two moments, 8 bits each", 2 * count["trained"]),
        ("the matrix that is multiplied by, bf16, and its copy", 4 * widest),
        (
            "layers' inputs, bf16 (gradient checkpointing)",
            2 * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"] * budget,
        ),
        ("one layer computed again, and as much for its gradients", 2 * layer_bytes_a_token() * budget),
        ("CUDA and the allocator (assumed)", OVERHEAD),
    ]


def memory() -> str:
    columns = [memory_rows(budget) for budget in BUDGETS]
    rows = [(name, *(gb(column[i][1]) for column in columns)) for i, (name, _) in enumerate(columns[0])]
    sums = [sum(size for _, size in column) for column in columns]
    rows.append(("**all**", *(f"**{gb(total)}**" for total in sums)))
    return table(("tokens a micro-batch:", *(f"{budget:,}" for budget in BUDGETS)), rows)


if __name__ == "__main__":
    page = with_table(PAGE.read_text(encoding="utf-8"), "memory", memory(), by="plan_one_gpu.py")
    written = PAGE.with_suffix(".writing")
    written.write_text(page, encoding="utf-8")
    os.replace(written, PAGE)
