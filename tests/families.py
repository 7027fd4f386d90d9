"""Small models of many families, made from configurations, and pairs of random tokens for them."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_kit.examples import PairTokens

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that what a token sees matters to its log-probs
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TREE_FAMILIES = {
    "llama": _COMMON | {"tie_word_embeddings": True},
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "mistral": _COMMON | {"sliding_window": 7},
    "gemma2": _COMMON | {"sliding_window": 7, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": _COMMON | {"sliding_window": 7, "sliding_window_pattern": 2},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
    },
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "phi3": _COMMON | {"sliding_window": 7},
    "olmo2": _COMMON,
    "cohere": _COMMON | {"logit_scale": 0.25},
    "granite": _COMMON | {"logits_scaling": 3.0},
}

OTHER_FAMILIES = {
    "mamba": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "initializer_range": 0.2,
    },
    "qwen3_next": _COMMON
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def make_model(family, dtype=torch.float32, seed=0, **changes):
    """A small causal LM with random weights."""
    fields = (TREE_FAMILIES | OTHER_FAMILIES)[family] | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=dtype)


def make_pairs(count=6, seed=0, longest=20, vocabulary=VOCABULARY):
    """Pairs with shared prompts, replies that begin alike, and replies of one token."""
    generator = np.random.default_rng(seed)

    def tokens(low, high):
        return generator.integers(3, vocabulary, generator.integers(low, high))

    prompts = [tokens(1, longest) for _ in range((count + 1) // 2)]
    pairs = []
    for i in range(count):
        common = tokens(0, 4)
        chosen = np.concatenate([common, tokens(1, longest)])
        rejected = np.concatenate([common, tokens(1, longest)])
        pairs.append(PairTokens(prompts[i // 2], chosen, rejected, source=f"pairs:{i}"))
    return pairs
