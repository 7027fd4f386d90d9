"""What a token takes of the memory, and how many fit."""

import pytest
import torch
from families import make_model, make_pairs
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_kit import capacity
from dpo_kit.capacity import bytes_per_token, kept_bytes, tokens_that_fit, training_bytes
from dpo_kit.models import tree_attention
from dpo_kit.packing import pack_tree

GIB = 2**30


def llama(layers):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config)


def per_token(model, pairs):
    return bytes_per_token(model, pack_tree(pairs[:6]), pack_tree(pairs))


def test_each_layer_keeps_the_same_for_each_token():
    pairs = make_pairs(12)
    two, four, six = (per_token(llama(layers), pairs) for layers in (2, 4, 6))
    assert four - two == pytest.approx(six - four, rel=0.01)
    # At least the inputs of the seven matrices, the outputs of gate and up, queries, keys and values.
    assert (four - two) / 2 >= 4 * (64 + 64 + 64 + 128 + 128 + 128 + 64 + 32 + 32)


def test_parameters_are_not_counted_and_nothing_is_left():
    model = make_model("llama")
    wide, batch = llama(2), pack_tree(make_pairs(2))
    wide.resize_token_embeddings(100_000)
    assert 0 < kept_bytes(wide, batch) < wide.lm_head.weight.nbytes / 10
    first = kept_bytes(model, batch)
    assert kept_bytes(model, batch) == first
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_leaves_room_for_more_tokens():
    pairs, model = make_pairs(12), llama(6).train()
    plain = per_token(model, pairs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with tree_attention(model):
        assert per_token(model, pairs) < plain / 3


def test_tokens_that_fit():
    # 0.75 of 21 - 4 - 1 GiB at 1 MiB a token.
    assert tokens_that_fit(21 * GIB, 4 * GIB, 2**20) == 12 * 1024
    assert tokens_that_fit(2 * GIB, 4 * GIB, 2**20) == 1024
    assert tokens_that_fit(140 * GIB, 4 * GIB, 2**10) == 65536


def test_the_budget_is_what_fits_beside_gradients_and_moments(monkeypatch):
    model, pairs = llama(2), make_pairs(12)
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 4 * GIB)
    found = capacity.measured_budget(model, pack_tree, pairs)
    assert found == tokens_that_fit(4 * GIB, training_bytes(model), per_token(model, pairs))

    def full(_):
        raise torch.OutOfMemoryError

    assert capacity.measured_budget(model, full, pairs) == capacity.LEAST_TOKENS


def test_only_what_is_trained_needs_gradients_and_moments():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 7, bias=False))
    model[0].requires_grad_(False)
    assert training_bytes(model) == 3 * 4 * 35
