"""Compiled decoder layers against the same layers run eagerly."""

import contextlib
import copy
import shutil

import numpy as np
import pytest
import torch

from dpo_kit.compilation import compile_blocks
from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens
from dpo_kit.models import load_model, tree_attention
from dpo_kit.packing import pack_padded, pack_tree
from dpo_kit.scoring import sequence_logprobs

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def pairs(seed, length):
    draw = np.random.default_rng(seed)
    return [PairTokens(*(draw.integers(0, 97, length // part) for part in (1, 2, 3))) for _ in range(2)]


def scores_and_gradients(model, batch):
    model.zero_grad()
    # Checkpointing computes the forward pass again in the backward pass.
    with contextlib.nullcontext() if batch.tree is None else tree_attention(model):
        entries = sequence_logprobs(model, batch).entries
        (entries * torch.linspace(-1, 1, len(entries))).sum().backward()
    return entries.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_alike(model, eager, batch):
    (ours, our_gradients), (theirs, their_gradients) = (
        scores_and_gradients(m, batch) for m in (model, eager)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(our_gradients) == len(their_gradients) > 0
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_names_and_class_stay():
    model = load_model(LLAMA)
    names, kind = list(model.state_dict()), type(model.model.layers[0])
    assert compile_blocks(model) == 2
    assert compile_blocks(model) == 2
    layer = model.model.layers[0]
    assert list(model.state_dict()) == names
    assert isinstance(layer, kind)
    assert type(layer).__name__ == kind.__name__
    assert type(layer).__mro__.count(kind) == 1
    assert type(layer) is type(model.model.layers[1]) is type(copy.deepcopy(model).model.layers[0])
    # Models made later are not touched.
    assert type(load_model(LLAMA).model.layers[0]) is kind


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(InputError, match="Linear has no decoder layers"):
        compile_blocks(torch.nn.Linear(2, 2))


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("wrapping", ["plain", "checkpointing", "peft"])
def test_compiled_blocks_keep_the_numbers_and_compile_once(wrapping):
    eager, model = (load_model(LLAMA, seed=1).train() for _ in range(2))
    if wrapping == "checkpointing":
        model.gradient_checkpointing_enable()
    if wrapping == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        eager = copy.deepcopy(model)
    compile_blocks(model)
    assert_alike(model, eager, pack_tree(pairs(0, 20)))
    graphs = compiled_graphs()
    assert graphs > 0
    for seed, length in ((1, 33), (2, 57), (3, 91)):
        assert_alike(model, eager, pack_tree(pairs(seed, length)))
    assert compiled_graphs() == graphs


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("_fresh_compiler")
def test_padded_sequences_and_scoring_without_gradients_too():
    eager, model = (load_model(LLAMA, seed=1) for _ in range(2))
    compile_blocks(model)
    for length in (20, 31):
        assert_alike(model, eager, pack_padded(pairs(0, length)))
        with torch.no_grad():
            ours, theirs = (
                sequence_logprobs(m, pack_tree(pairs(1, length))).sequences for m in (model, eager)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    graphs = compiled_graphs()
    assert_alike(model, eager, pack_padded(pairs(0, 47)))
    assert compiled_graphs() == graphs
