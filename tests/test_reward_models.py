"""Rewards on a tree or padded are those of separate sequences; what is no reward model is refused."""

import numpy as np
import pytest
import torch
from families import OTHER_FAMILIES, TREE_FAMILIES, make_model, make_pairs
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_kit.attention import TREE_ATTENTION
from dpo_kit.errors import InputError
from dpo_kit.examples import ScoredReplies
from dpo_kit.models import (
    is_reward_model,
    load_config,
    load_model,
    load_reward_model,
    output_head,
    tree_attention,
    value_head,
)
from dpo_kit.packing import pack_padded, pack_tree, plan_step
from dpo_kit.padding import padding_advice
from dpo_kit.scoring import backend_difference, choose_layout, full_rewards, sequence_rewards

# Those that transformers has a ...ForSequenceClassification of.
FAMILIES = [family for family in TREE_FAMILIES if family not in ("cohere", "granite")]


def make_reward_model(family, dtype=torch.float32, **changes):
    fields = (TREE_FAMILIES | OTHER_FAMILIES)[family] | {"model_type": family} | changes
    return load_reward_model(fields, dtype)[0]


def own_rewards(model, pairs):
    """By transformers alone: separate sequences, none of whose ends is taken for padding."""
    model.config.pad_token_id, before = None, model.config.pad_token_id
    sequences = [np.concatenate([p.prompt, p.replies[i]]) for i in range(2) for p in pairs]
    rewards = [model(input_ids=torch.tensor(sequence)[None]).logits[0, 0] for sequence in sequences]
    model.config.pad_token_id = before
    return torch.stack(rewards)


def gradients(model, rewards):
    model.zero_grad()
    (rewards * torch.linspace(-1, 1, len(rewards), dtype=rewards.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_rewards_and_gradients_equal_those_of_separate_sequences(family, layout):
    model, pairs = make_reward_model(family, torch.float64).eval(), make_pairs()
    pad = model.config.pad_token_id
    expected = own_rewards(model, pairs)
    wanted = gradients(model, expected)
    batch = pack_tree(pairs) if layout == "tree" else pack_padded(pairs)
    found = sequence_rewards(model, batch)
    got = gradients(model, found)
    # Where there is a soft cap, transformers takes the softmax in fp32 whatever the dtype.
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(full_rewards(model, pairs), expected.detach(), rtol=1e-9, atol=1e-9)
    assert found.std() > 0.1, "rewards that are all alike show nothing"
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert model.config.pad_token_id == pad


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_within_1e_5_and_the_tree_is_trusted(family):
    model, pairs = make_reward_model(family).eval(), make_pairs(12)
    assert choose_layout(model, pairs) == ("tree", "")
    assert backend_difference(model, pairs, "gathered") == ""
    assert model.config._attn_implementation != TREE_ATTENTION
    with torch.no_grad():
        found = sequence_rewards(model, pack_tree(pairs))
        torch.testing.assert_close(found, own_rewards(model, pairs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, sequence_rewards(model, pack_padded(pairs)), rtol=1e-5, atol=1e-5)


def test_bf16_gives_fp32_rewards_near_those_of_fp32():
    model, pairs = make_reward_model("qwen3").eval(), make_pairs()
    exact = full_rewards(model, pairs)
    model.bfloat16()
    assert choose_layout(model, pairs) == ("tree", "")
    with torch.no_grad():
        found = sequence_rewards(model, pack_tree(pairs))
    assert found.dtype == torch.float32
    # The error that the model itself makes in bf16, and as much again.
    allowed = 2 * (full_rewards(model, pairs) - exact).abs().max() + 0.01
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_value_head_is_fp32_on_a_bf16_body(weights):
    """Rewards and every gradient: those of the same body, run in bf16, with a head in fp32 after it."""
    model = make_reward_model("llama", weights).eval()
    batch = pack_tree(make_pairs())
    with torch.autocast("cpu", torch.bfloat16), tree_attention(model):
        where = {"position_ids": batch.position_ids, "tree": batch.tree, "use_cache": False}
        body = model.model(input_ids=batch.input_ids, **where)
    rows = body.last_hidden_state[0, batch.last_rows]
    expected = rows.float() @ model.score.weight.float().T[:, 0]
    wanted = gradients(model, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = sequence_rewards(model, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found.bfloat16() != found).any(), "these rewards fit into bf16, and show nothing"
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pad_token_id", [None, 0, 5])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_whatever_the_padding_token_the_last_token_is_read(pad_token_id, layout):
    """Also where the replies end with it, as they do where it is the end-of-text token."""
    model = make_reward_model("llama", torch.float64, pad_token_id=pad_token_id).eval()
    pairs = [ScoredReplies(np.array([7, 8]), [np.array([9, 5]), np.array([5])], [1.0, 0.0])]
    batch = plan_step(pairs, 100, layout, pad_token_id=5)[0]
    torch.testing.assert_close(sequence_rewards(model, batch), own_rewards(model, pairs))
    assert model.config.pad_token_id == pad_token_id


def test_replies_that_end_with_the_padding_token_are_told_of():
    model = make_reward_model("llama", pad_token_id=5)
    assert "token 5" in padding_advice(model, {3, 5})
    assert padding_advice(model, {3, 4}) == ""
    assert "no pad_token_id" in padding_advice(make_reward_model("gpt2"), {3, 5})


def test_lists_of_replies_share_one_tree():
    model = make_reward_model("llama", torch.float64).eval()
    generator = np.random.default_rng(1)

    def tokens(count):
        return generator.integers(3, 90, count)

    lists = [ScoredReplies(tokens(9), [tokens(n + 1) for n in range(k)], list(range(k))) for k in (3, 6)]
    torch.testing.assert_close(sequence_rewards(model, pack_tree(lists)), full_rewards(model, lists))
    assert choose_layout(model, lists) == ("tree", "")


@pytest.mark.parametrize("head", ["random", "zero"])
def test_a_recurrent_reward_model_is_caught_and_served_padded(head):
    model = make_reward_model("qwen3_next", initializer_range=0.02).eval()
    if head == "zero":
        nn.init.zeros_(model.score.weight)
    layout, reason = choose_layout(model, make_pairs())
    assert layout == "padded"
    assert "cannot be trusted with token trees" in reason


def test_a_model_whose_tokens_see_what_follows_is_refused():
    model = make_reward_model("llama").eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    model.model.forward = _without_mask(model.model.forward)
    with pytest.raises(InputError, match="see what comes after"):
        choose_layout(model, make_pairs())


def _without_mask(forward):
    def everything_is_seen(input_ids, attention_mask=None, **keywords):
        rows, length = input_ids.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        return forward(input_ids, attention_mask=mask, **keywords)

    return everything_is_seen


def test_a_causal_lm_gets_a_new_head_of_the_seed_and_says_so(tmp_path):
    lm = make_model("qwen2")
    lm.save_pretrained(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, said = load_reward_model(tmp_path, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert "no value head" in said
    assert "seed 3" in said
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, lm.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(load_reward_model(tmp_path, seed=3)[0].score.weight, model.score.weight)
    assert not torch.equal(load_reward_model(tmp_path, seed=4)[0].score.weight, model.score.weight)
    assert is_reward_model(model)
    assert not is_reward_model(lm)
    with pytest.raises(InputError, match="no output head"):
        output_head(model)
    with pytest.raises(InputError, match="Qwen2ForCausalLM has no value head"):
        value_head(lm)


def test_a_saved_value_head_is_loaded_whole(tmp_path):
    model = make_reward_model("gpt2")
    model.save_pretrained(tmp_path)
    again, said = load_reward_model(tmp_path, seed=9)
    assert said == ""
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_missing_weights_and_other_shapes_are_refused_by_name(tmp_path):
    model = make_model("llama")
    state = {n: v for n, v in model.state_dict().items() if "layers.1.mlp" not in n and n != "lm_head.weight"}
    model.save_pretrained(tmp_path / "torn", state_dict=state)
    for load in (load_model, load_reward_model):
        with pytest.raises(InputError, match=r"lack 3 tensors.*layers\.1\.mlp\.down_proj"):
            load(tmp_path / "torn")
    config = load_config({"model_type": "llama", **TREE_FAMILIES["llama"], "num_labels": 3})
    two = AutoModelForSequenceClassification.from_config(config)
    two.save_pretrained(tmp_path / "labels")
    with pytest.raises(InputError, match=r"num_labels 3, and .* was trained with num_labels=1"):
        load_reward_model(tmp_path / "labels")
    with pytest.raises(InputError, match="3 labels"):
        sequence_rewards(two, pack_tree(make_pairs()))


def test_what_has_no_value_head_at_the_last_token_is_refused(tmp_path):
    bert = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="BertForSequenceClassification has no value head"):
        load_reward_model(bert)
    with pytest.raises(InputError, match="no reward model can be made"):
        load_reward_model({"model_type": "granite", **TREE_FAMILIES["granite"]})
    make_model("llama").save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no weights"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("wrapping", ["checkpointing", "ddp"])
def test_wrapped_models_have_the_same_gradients(wrapping, tmp_path):
    pairs = make_pairs()
    batch = pack_tree(pairs)
    plain, model = (make_reward_model("qwen2", torch.float64).train() for _ in range(2))
    expected = gradients(plain, sequence_rewards(plain, batch))
    if wrapping == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with tree_attention(model):
            found = gradients(model, sequence_rewards(model, batch))
    else:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            found = gradients(model, sequence_rewards(wrapped, batch))
        finally:
            torch.distributed.destroy_process_group()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_and_hooks_are_kept():
    """A LoRA reward model: the wrapped, trained copy of the head is read, and hooks on it fire."""
    peft = pytest.importorskip("peft")
    model, pairs = make_reward_model("llama").eval(), make_pairs()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    ).eval()
    with torch.no_grad():
        wrapped.base_model.model.score.modules_to_save["default"].weight.mul_(2)
    seen = []
    value_head(wrapped).register_forward_hook(lambda *_: seen.append(1))
    rewards = sequence_rewards(wrapped, pack_tree(pairs))
    assert seen == [1]
    with wrapped.disable_adapter():
        torch.testing.assert_close(rewards, 2 * sequence_rewards(wrapped, pack_tree(pairs)))
    rewards.sum().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("modules_to_save" in name for name in trained)
    assert any("lora_B" in name for name in trained)


def test_nothing_is_left_after_an_error():
    model = make_reward_model("llama")
    batch = pack_tree(make_pairs())
    batch.last_rows[0] = 10**6
    with pytest.raises((IndexError, RuntimeError)):
        sequence_rewards(model, batch)
    assert not model.score._forward_hooks
    assert "forward" not in vars(model.score)
    assert model.config.pad_token_id == 0
    assert model.config._attn_implementation != TREE_ATTENTION


def test_the_config_of_a_folder_stays_as_it_is(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    load_reward_model(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before
