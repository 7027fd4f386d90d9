"""The least arithmetic, counted by hand for small models; the rate of products, on a stopped clock."""

import copy

import numpy as np
import pytest
import torch
from families import TREE_FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_kit import roofline
from dpo_kit.examples import PairTokens
from dpo_kit.roofline import count_work, largest_sizes, matmul_rates, shapes_in_use, share_of_limit

# Tree: 1 2 3 4, then 5, then 6 7; they see 1 + 2 + 3 + 4, 5, and 5 + 6 tokens.
PAIR = PairTokens(np.array([1, 2, 3]), chosen=np.array([4, 5]), rejected=np.array([4, 6, 7]))
TOKENS, PREDICTIONS, VISIBLE = 7, 4, 26
# The Llama of families.py: queries and output 32 x 32, keys and values 32 x 16, feed-forward 3 of 32 x 48,
# two layers; the head 32 x 97. A token that sees another: 2 products of 32 in each layer.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
BODY, HEAD, ATTENTION = 2 * LAYER, 32 * 97, 2 * 2 * 32


def flops(*pairs, **named):
    return count_work(list(pairs), 8, **named).flops


def test_all_of_a_llama_is_trained_beside_a_reference():
    found = count_work([PAIR], 8, make_model("llama"))
    multiply_adds = 4 * (TOKENS * BODY + PREDICTIONS * HEAD + VISIBLE * ATTENTION)
    assert found == roofline.Work(
        distinct_tokens=7, separate_tokens=11, padded_tokens=12, predictions=4, flops=2 * multiply_adds
    )
    assert count_work([PAIR], 8, TREE_FAMILIES["llama"] | {"model_type": "llama"}) == found
    assert 4 * flops(PAIR, model=make_model("llama"), reference=False) == 3 * found.flops


def test_steps_share_nothing_and_a_single_reply_has_a_single_branch():
    model = make_model("llama")
    assert count_work([PAIR] * 3, 2, model).distinct_tokens == 2 * TOKENS
    alone = count_work([PairTokens(PAIR.prompt, PAIR.chosen, None)], 2, model, reference=False)
    assert (alone.distinct_tokens, alone.predictions) == (5, 2)
    assert alone.flops == 2 * 3 * (5 * BODY + 2 * HEAD + 15 * ATTENTION)


def test_gpt2_has_matrices_that_are_no_linear_layers():
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    expected = TOKENS * 2 * layer + PREDICTIONS * HEAD + VISIBLE * ATTENTION
    model = make_model("gpt2", bos_token_id=1, eos_token_id=2)
    assert flops(PAIR, model=model) == 2 * 4 * expected
    assert largest_sizes(model) == (32, 128, 97)


def test_adapters_train_and_what_is_frozen_gets_no_gradient_of_its_own():
    peft = pytest.importorskip("peft")
    base = make_model("llama")
    reference = copy.deepcopy(base)
    policy = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    # Nothing is trained before the first layer's queries: their frozen matrix is only multiplied by, and
    # the first half of their adapter needs no gradient of its input.
    adapters = 2 * 64 + 3 * 64 + 3 * (64 + 64)
    body = 32 * 32 + 2 * (BODY - 32 * 32) + adapters + BODY
    multiply_adds = TOKENS * body + PREDICTIONS * 3 * HEAD + VISIBLE * 4 * ATTENTION
    assert flops(PAIR, model=policy, reference=reference) == 2 * multiply_adds


def test_below_the_first_trained_layer_there_is_no_backward_pass():
    model = make_model("llama", tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    # The second layer's queries come first and pass no gradient on.
    body = LAYER + 3 * LAYER - 32 * 32
    multiply_adds = TOKENS * body + PREDICTIONS * 3 * HEAD + VISIBLE * 3 * ATTENTION
    assert flops(PAIR, model=model, reference=False) == 2 * multiply_adds


def test_a_window_limits_what_is_seen():
    model = make_model("mistral", sliding_window=2)
    seen = 1 + 6 * 2
    assert flops(PAIR, model=model) == 2 * 4 * (TOKENS * BODY + PREDICTIONS * HEAD + seen * ATTENTION)


def test_of_many_experts_those_are_counted_that_a_token_is_sent_to():
    fields = TREE_FAMILIES["llama"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 32 + 2 * 3 * 32 * 48
    found = count_work([PAIR], 8, model)
    assert found.flops == 2 * 4 * (TOKENS * 2 * layer + PREDICTIONS * HEAD + VISIBLE * ATTENTION)
    assert not found.uncounted


def test_layers_that_are_not_understood_are_named():
    assert "MambaMixer" in count_work([PAIR], 8, make_model("mamba")).uncounted


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", torch.float64])
def test_rates_are_two_operations_per_multiply_add(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(roofline, "_seconds_of", lambda call, _: calls.append(call()) or 0.5)
    assert matmul_rates(dtype, [(3, 4, 5), (7, 8, 9)], seconds=3.0) == {
        "3 x 4 x 5": 240.0,
        "7 x 8 x 9": 2016.0,
    }
    assert len(calls) == 2 * 6


def test_share_of_the_limit():
    assert share_of_limit(flops=6e12, rate=2e12, seconds=4.0) == 0.75
    assert shapes_in_use(576, 1536, 49152)[1:] == [(4096, 576, 1536), (4096, 1536, 576), (512, 576, 49152)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_device_is_faster_than_launching_its_work():
    rates = matmul_rates("bf16", [(4096, 4096, 4096)], device="cuda")
    assert rates["4096 x 4096 x 4096"] > 1e13
