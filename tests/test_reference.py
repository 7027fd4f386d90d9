"""References that run a forward pass: a second model, the policy without its adapter or with another, a
moving copy; and which of them a run gets."""

import copy

import pytest
import torch
from families import make_model, make_pairs
from peft import IA3Config, LoraConfig, get_peft_model

from dpo_kit.errors import InputError
from dpo_kit.packing import pack_tree
from dpo_kit.reference import (
    AdapterOffReference,
    AdapterReference,
    CachedReference,
    LiveReference,
    MovingReference,
    NoReference,
    StartReference,
    make_reference,
)
from dpo_kit.reference.choice import starts_as_base
from dpo_kit.scoring import head_inputs, sequence_logprobs

BATCH = pack_tree(make_pairs())


def adapt(model, **settings):
    """A peft model with a fresh adapter; with `trained`, one whose weights are random."""
    trained = settings.pop("trained", False)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    if trained:
        randomise(adapted, "default")
    return adapted


def randomise(model, adapter, seed=3):
    """Random weights for an adapter, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def entries_of(model):
    with torch.no_grad():
        return sequence_logprobs(model.eval(), BATCH).entries


def state_of(model):
    """All that switching adapters could leave changed."""
    return (
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(name, m.training) for name, m in model.named_modules()],
        list(model.base_model.active_adapters),
        model.active_adapter,
    )


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_with_its_adapters_off_the_policy_is_the_base_model_bit_for_bit(saved):
    base = make_model("llama", tie_word_embeddings=False)
    policy = adapt(copy.deepcopy(base), trained=True, modules_to_save=saved)
    assert not torch.equal(entries_of(policy), entries_of(base))
    policy.train()
    before = state_of(policy)
    reference = AdapterOffReference(policy, is_policy=False)
    found = reference.logprobs(BATCH)
    assert torch.equal(found.entries, entries_of(base))
    assert torch.equal(found.sequences, sequence_logprobs(base, BATCH).sequences.detach())
    inputs, expected = reference.head_inputs(BATCH), head_inputs(base, BATCH)
    assert torch.equal(inputs.hidden, expected.hidden)
    assert torch.equal(inputs.weight, expected.weight)
    assert state_of(policy) == before
    assert reference.model is None
    assert not found.entries.requires_grad


def test_another_adapter_is_the_reference_and_the_trained_one_is_left_as_it_was():
    policy = adapt(make_model("llama"), trained=True)
    policy.add_adapter("first", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(policy, "first", seed=4)
    alone = copy.deepcopy(policy)
    alone.set_adapter("first")
    # A state that set_adapter by itself would not give back.
    frozen = next(p for name, p in policy.named_parameters() if "lora_A.default" in name)
    frozen.requires_grad_(False)
    policy.train()
    before, own = state_of(policy), entries_of(policy)
    policy.train()
    reference = AdapterReference(policy, "first")
    assert torch.equal(reference.logprobs(BATCH).entries, entries_of(alone))
    assert torch.equal(reference.head_inputs(BATCH).hidden, head_inputs(alone, BATCH).hidden)
    assert state_of(policy) == before
    assert torch.equal(entries_of(policy), own)


def test_adapters_stay_as_they_were_when_the_forward_fails():
    policy = adapt(make_model("llama"))
    policy.add_adapter("first", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = state_of(policy.train())
    for reference in (AdapterOffReference(policy, is_policy=True), AdapterReference(policy, "first")):
        with pytest.raises(AttributeError):
            reference.logprobs(None)
        assert state_of(policy) == before


def test_the_gradient_of_the_policy_is_the_same_beside_an_adapter_that_is_off():
    policy = adapt(make_model("llama"), trained=True)
    gradients = []
    for reference in (None, AdapterOffReference(policy, is_policy=False)):
        policy.zero_grad()
        if reference is not None:
            reference.logprobs(BATCH)
        sequence_logprobs(policy.train(), BATCH).sequences.sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())


def test_adapter_modes_refuse_what_cannot_be():
    bare, policy = make_model("llama"), adapt(make_model("llama"))
    for mode in ("adapter_off", "adapter"):
        with pytest.raises(InputError, match="no adapters to switch"):
            make_reference(mode, bare, needed=True, adapter="first")
    with pytest.raises(InputError, match=r"has no adapter 'first'.*Known: default"):
        make_reference("adapter", policy, needed=True, adapter="first")
    with pytest.raises(InputError, match="'default' is the one that is trained"):
        make_reference("adapter", policy, needed=True, adapter="default")
    with pytest.raises(InputError, match=r"reference\.adapter.*needs the name"):
        make_reference("adapter", policy, needed=True)
    with pytest.raises(InputError, match="does not go with mode adapter_off"):
        make_reference("adapter_off", policy, needed=True, given=bare)


def test_auto_takes_the_cheapest_that_serves():
    bare, fresh = make_model("llama"), adapt(make_model("llama"))
    trained, pissa = (
        adapt(make_model("llama"), trained=True),
        adapt(make_model("llama"), init_lora_weights="pissa"),
    )

    def auto(policy, **settings):
        return make_reference("auto", policy, **({"needed": True} | settings))

    assert isinstance(auto(bare, needed=False, cacheable=True), NoReference)
    for policy in (bare, fresh, trained, pissa):
        assert isinstance(auto(policy, cacheable=True), CachedReference)
        assert auto(policy, cacheable=True).is_policy
    assert isinstance(auto(bare), LiveReference)
    assert isinstance(auto(fresh), AdapterOffReference)
    assert auto(fresh).is_policy
    assert isinstance(auto(fresh, given=bare), LiveReference)
    for policy in (trained, pissa):
        # Without its adapter it is not what it starts from.
        assert isinstance(auto(policy), StartReference)
    assert not make_reference("adapter_off", trained, needed=True).is_policy
    own = NoReference()
    assert auto(bare, given=own, cacheable=True) is own
    with pytest.raises(InputError, match="whole distributions"):
        make_reference("cached", bare, needed=True)
    with pytest.raises(InputError, match="unknown reference mode 'frozen'"):
        make_reference("frozen", bare, needed=True)
    with pytest.raises(InputError, match="there is none"):
        make_reference("none", bare, needed=True)


def test_an_adapter_is_fresh_where_its_parameters_say_so():
    def untied(**settings):
        return adapt(make_model("llama", tie_word_embeddings=False), **settings)

    def with_one_weight(name, **settings):
        policy = untied(**settings)
        next(p for n, p in policy.named_parameters() if name in n).data[-1, -1] += 1e-7
        return policy

    for settings in (
        {},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
    ):
        assert starts_as_base(untied(**settings))
    # Rows that no few tokens would meet, or weights too small to see in their logits.
    tokens = {"trainable_token_indices": {"embed_tokens": [95, 96]}}
    assert not starts_as_base(with_one_weight("trainable_tokens_delta", **tokens))
    assert not starts_as_base(with_one_weight("lm_head.modules_to_save", modules_to_save=["lm_head"]))
    assert not starts_as_base(with_one_weight("lora_B"))
    embedding = untied(target_modules=["embed_tokens"], trained=True)
    assert not starts_as_base(embedding)
    for name in ("pissa", "olora", False):
        assert not starts_as_base(untied(init_lora_weights=name))
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert not starts_as_base(get_peft_model(make_model("llama"), ia3))
    assert not starts_as_base(make_model("llama"))


def unfreeze(policy, part):
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    return policy


def test_a_base_that_is_trained_too_is_no_reference():
    biases = adapt(make_model("qwen2"), bias="all")
    norms = unfreeze(adapt(make_model("llama")), "layernorm")
    layer = unfreeze(adapt(make_model("llama")), "layers.1.mlp")
    for policy, named in ((biases, r"q_proj\.base_layer\.bias"), (norms, "layernorm"), (layer, "mlp")):
        for mode in ("adapter_off", "adapter"):
            with pytest.raises(InputError, match=rf"reference\.mode.*{named}.*cached or live"):
                make_reference(mode, policy, needed=True, adapter="first")
        assert isinstance(make_reference("auto", policy, needed=True), StartReference)
        assert isinstance(make_reference("auto", policy, needed=True, cacheable=True), CachedReference)
    # A copy that is trained in place of the base's own is an adapter's.
    saved = adapt(make_model("llama", tie_word_embeddings=False), modules_to_save=["lm_head", "norm"])
    assert isinstance(make_reference("auto", saved, needed=True), AdapterOffReference)


class OwnReference:
    """As a user writes it."""

    is_policy, model, needs_keys = False, None, False

    def __init__(self, model):
        self.scored = model

    def logprobs(self, batch):
        with torch.no_grad():
            return sequence_logprobs(self.scored, batch)

    def head_inputs(self, batch):
        return head_inputs(self.scored, batch)


class OldReference(OwnReference):
    """Gives a tensor, as references once did."""

    def logprobs(self, batch):
        return super().logprobs(batch).sequences


def test_a_reference_of_ones_own_is_checked():
    policy, model = adapt(make_model("llama")), make_model("llama", seed=4)
    reference = make_reference("auto", policy, needed=True, given=OwnReference(model))
    assert torch.equal(reference.logprobs(BATCH).entries, entries_of(model))
    assert torch.equal(reference.head_inputs(BATCH).hidden, head_inputs(model, BATCH).hidden)
    assert (reference.is_policy, reference.model, reference.needs_keys) == (False, None, False)
    old = make_reference("auto", policy, needed=True, given=OldReference(model))
    with pytest.raises(InputError, match=r"ref_model.*gave a Tensor.*SequenceLogProbs"):
        old.logprobs(BATCH)
    with pytest.raises(InputError, match=r"ref_model.*object has no is_policy.*reference\.Reference"):
        make_reference("auto", policy, needed=True, given=object())


@pytest.mark.parametrize("mode", ["moving", "adapter_off", "adapter", "none"])
@pytest.mark.parametrize("kind", [OwnReference, copy.copy, lambda model: "some/where"])
def test_what_is_given_goes_with_no_mode_that_has_its_own(mode, kind):
    policy, given = adapt(make_model("llama")), kind(make_model("llama"))
    with pytest.raises(InputError, match=rf"reference\.mode.*not go with mode {mode}.*ref_model out"):
        make_reference(mode, policy, needed=mode != "none", given=given, adapter="first", update_weight=1.0)


def test_a_path_can_be_the_reference(tmp_path):
    model = make_model("llama", seed=5)
    model.save_pretrained(tmp_path)
    reference = make_reference("live", make_model("llama"), needed=True, given=str(tmp_path))
    assert torch.equal(reference.logprobs(BATCH).entries, entries_of(model))
    assert not reference.is_policy


def shift(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


def test_a_moving_reference_mixes_by_hand_worked_numbers():
    policy = make_model("llama", tie_word_embeddings=False)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    reference = make_reference("moving", policy, needed=True, update_every=2, update_weight=0.25)
    assert reference.is_policy
    assert reference.model is not policy
    for step, moved in ((1, False), (2, True), (3, False), (4, True)):
        shift(policy, 1.0)
        assert reference.after_step(policy, step) is moved
    # After step 2: 0.75 * 0 + 0.25 * 2; after step 4: 0.75 * 0.5 + 0.25 * 4.
    for name, value in reference.model.named_parameters():
        torch.testing.assert_close(value, start[name] + 1.375)
        assert not value.requires_grad


def test_a_hard_update_is_the_policy_and_a_resumed_reference_goes_on_bit_for_bit(tmp_path):
    for weight in (1.0, 0.3):
        policy = make_model("llama", dtype=torch.bfloat16)
        straight = MovingReference(policy, update_every=1, weight=weight)
        shift(policy, 0.01)
        straight.after_step(policy, 1)
        straight.save(tmp_path)
        resumed = MovingReference(make_model("llama", dtype=torch.bfloat16), update_every=1, weight=weight)
        resumed.load(tmp_path)
        shift(policy, 0.02)
        for reference in (straight, resumed):
            reference.after_step(policy, 2)
        pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        same = [
            torch.equal(a, b) for a, b in zip(straight.model.parameters(), policy.parameters(), strict=True)
        ]
        assert all(same) is (weight == 1.0)


def test_a_moving_reference_of_an_adapter_moves_it_whole_and_keeps_no_more(tmp_path):
    policy = adapt(make_model("llama"))
    with pytest.raises(InputError, match="adapters are factors"):
        MovingReference(policy, update_every=1, weight=0.5)
    reference = MovingReference(policy, update_every=1, weight=1.0)
    assert all("lora_" in name for name in reference.state_dict())
    randomise(policy, "default")
    reference.after_step(policy, 1)
    assert torch.equal(reference.logprobs(BATCH).entries, entries_of(policy))
    reference.save(tmp_path)
    other = MovingReference(adapt(make_model("llama"), r=2), update_every=1, weight=1.0)
    with pytest.raises(InputError, match="of another model"):
        other.load(tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        reference.load(tmp_path)


@pytest.mark.parametrize(("every", "weight"), [(0, 0.5), (1, 0.0), (1, 1.1), (1, float("nan"))])
def test_a_moving_reference_refuses_what_is_out_of_range(every, weight):
    with pytest.raises(InputError, match="expected"):
        MovingReference(make_model("llama"), update_every=every, weight=weight)


def test_an_adapter_from_a_folder_is_the_reference(tmp_path):
    saved = adapt(make_model("llama"), trained=True)
    saved.save_pretrained(tmp_path / "adapter")
    policy = adapt(make_model("llama"), target_modules=["v_proj"])
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    reference = make_reference("adapter", policy, needed=True, adapter=str(tmp_path / "adapter"))
    expected = sequence_logprobs(saved.eval(), BATCH).sequences.detach()
    torch.testing.assert_close(reference.logprobs(BATCH).sequences, expected, rtol=1e-5, atol=1e-5)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    with pytest.raises(InputError, match=r"reference\.adapter.*has no adapter"):
        make_reference("adapter", policy, needed=True, adapter=str(tmp_path))
