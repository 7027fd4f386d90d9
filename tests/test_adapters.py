"""Adapters: those that peft has by configuration, those that are trained further, and their resume."""

import pytest
import torch
from families import make_model, make_pairs
from test_trainer import make_dataset

from dpo_kit.adapter_kinds import SUPPORTED
from dpo_kit.adapters import new_adapter, put_adapter
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.fingerprint import model_key
from dpo_kit.models import load_reward_model
from dpo_kit.packing import pack_tree
from dpo_kit.preparation import prepared_policy
from dpo_kit.reference import CachedReference, LiveReference, StartReference, make_reference
from dpo_kit.scoring import choose_layout, full_logit_logprobs, head_inputs, sequence_logprobs
from dpo_kit.trainer import PreferenceTrainer

peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

PAIRS = make_pairs(4)
LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
# What kinds need beside the layers, for layers of 32 by 32 and less.
FIELDS = {
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VERA": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 16, "target_modules": ["q_proj", "o_proj"]},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "C3A": {"block_size": 8},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
}


def untied():
    return make_model("llama", tie_word_embeddings=False)


def moved(model, seed=1):
    """The same model, its trained numbers changed as by training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make_trainer(folder, model, *, peft_config=None, dataset=None, **settings):
    settings = {
        "batch_size": 4,
        "max_steps": 4,
        "bf16": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | settings
    config = PreferenceConfig(output_dir=str(folder), **settings)
    return PreferenceTrainer(model, None, config, dataset or make_dataset(), peft_config=peft_config)


ORDINARY = {"IA3", "LOHA", "OFT", "VERA", "LN_TUNING", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ORDINARY else pytest.mark.slow) for k in sorted(SUPPORTED - {"LORA"})],
)
def test_a_supported_kind_is_right_on_trees_in_training_and_when_loaded_again(kind, tmp_path):
    fields = {"target_modules": ["q_proj", "v_proj", "up_proj"]} | FIELDS.get(kind, {})
    if kind == "TRAINABLE_TOKENS":
        del fields["target_modules"]
    config = new_adapter(None, {"peft_type": kind} | fields)
    torch.manual_seed(0)
    model = peft.get_peft_model(untied(), config).eval()
    before, key = full_logit_logprobs(model, PAIRS), model_key(model)
    moved(model)
    after = full_logit_logprobs(model, PAIRS)
    assert (after - before).abs().max() > 1e-2
    assert model_key(model) != key
    assert choose_layout(model, PAIRS, "gathered") == ("tree", "")
    loss = sequence_logprobs(model.train(), pack_tree(PAIRS)).sequences.sum()
    loss.backward()
    torch.testing.assert_close(float(loss.detach()), float(after.sum()), rtol=1e-4, atol=1e-3)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.eval().disable_adapter():
        bare = full_logit_logprobs(model, PAIRS)
    torch.testing.assert_close(bare, full_logit_logprobs(untied().eval(), PAIRS), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = put_adapter(untied(), tmp_path, trainable=True)
    assert torch.equal(full_logit_logprobs(loaded.eval(), PAIRS), after)
    assert same(trained(loaded), trained(model))


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": start} for start in ("gaussian", "orthogonal", "mica", "pissa", "olora")),
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [5, 6]},
        {"layer_replication": [[0, 2], [0, 2]]},
    ],
    ids=str,
)
def test_lora_of_every_start_is_the_same_when_loaded_again(fields, tmp_path):
    policy = moved(prepared_policy(untied(), new_adapter(LORA | fields), rewards=False, seed=3)).eval()
    policy.save_pretrained(tmp_path)
    loaded = put_adapter(untied(), tmp_path).eval()
    logps = full_logit_logprobs(policy, PAIRS)
    torch.testing.assert_close(full_logit_logprobs(loaded, PAIRS), logps, rtol=1e-4, atol=1e-4)
    assert (full_logit_logprobs(untied().eval(), PAIRS) - logps).abs().max() > 1e-2


def test_a_start_in_the_bases_weights_has_no_base_to_switch_to(tmp_path):
    """With the adapter off it would be a model that never was; on the policy, its weights would be others."""
    config = new_adapter(LORA | {"init_lora_weights": "pissa"})
    policy = prepared_policy(untied(), config, rewards=False, seed=3)
    with pytest.raises(
        InputError, match=r"reference\.mode.*'pissa' takes .* out of the base model's weights"
    ):
        make_reference("adapter_off", policy, needed=True)
    policy.save_pretrained(tmp_path / "pissa")
    plain = prepared_policy(untied(), peft.LoraConfig(**LORA), rewards=False, seed=3)
    before = full_logit_logprobs(plain.eval(), PAIRS)
    with pytest.raises(InputError, match=r"reference\.adapter.*'pissa' takes"):
        make_reference("adapter", plain, needed=True, adapter=str(tmp_path / "pissa"))
    assert torch.equal(full_logit_logprobs(plain, PAIRS), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["lm_heat"]}, r"modules_to_save.*none of that name: lm_heat.*'lm_head'"),
        ({"target_modules": ["q_proj", "v_prj"]}, r"target_modules.*v_prj.*'v_proj'"),
        ({"target_parameters": ["experts.up"]}, r"target_parameters.*experts\.up"),
        ({"target_modules": "("}, r"model\.lora.*peft cannot make this adapter: .*unterminated"),
        ({"trainable_token_indices": [9999]}, r"model\.lora.*out of bounds"),
        ({"r": "8"}, r"model\.lora.*peft cannot make this adapter"),
        ({"inference_mode": True}, "its adapter is frozen"),
        ({"task_type": "SEQ_CLS"}, r"model\.lora\.task_type.*a causal LM is trained.*CAUSAL_LM"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(fields, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        prepared_policy(untied(), new_adapter(LORA | fields), rewards=False, seed=0)


@pytest.mark.parametrize(
    ("lora", "other", "message"),
    [
        (None, {}, r"model\.peft.*no peft_type"),
        (LORA | {"modules_to_save": "norm"}, None, r"model\.lora\.modules_to_save.*expected a list"),
        (LORA | {"init_lora_weights": "pissa_niter_4"}, None, "not in the same way when the saved adapter"),
        (LORA | {"init_lora_weights": "bogus"}, None, r"init_lora_weights.*not known.*gaussian"),
        (LORA | {"kasa_config": {}}, None, r"kasa_config.*changes the base model's weights"),
        (None, {"peft_type": "LOHAA", "r": 2}, r"peft_type.*peft has no 'LOHAA'.*'LOHA'"),
        (None, {"r": 2}, r"model\.peft.*no peft_type"),
        (None, {"peft_type": "loha", "rr": 2}, r"model\.peft\.rr.*unknown key.*'r'"),
        ({"target_module": ["q_proj"]}, None, r"model\.lora\.target_module'.*'target_modules'"),
        (None, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "virtual tokens"),
        (None, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "virtual tokens"),
        (None, {"peft_type": "ADALORA", "total_step": 9}, "a call in every step"),
        (None, {"peft_type": "LILY"}, "the other sequences of a batch"),
        (LORA | {"alora_invocation_tokens": [3]}, None, r"alora_invocation_tokens.*from which token"),
        (LORA | {"init_lora_weights": "eva"}, None, r"init_lora_weights.*pass over data"),
        (LORA | {"task_type": "POEMS"}, None, r"model\.lora.*POEMS"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_fields(lora, other, message):
    with pytest.raises(InputError, match=message):
        new_adapter(lora, other)


def test_the_trainer_refuses_what_the_recipe_does(tmp_path):
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=r"PREFIX_TUNING are not supported: .*virtual tokens"):
        make_trainer(tmp_path, untied(), peft_config=prefix)
    adapted = peft.get_peft_model(untied(), peft.LoraConfig(**LORA))
    with pytest.raises(InputError, match="has an adapter already"):
        make_trainer(tmp_path, adapted, peft_config=peft.LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"its adapter is frozen.*is_trainable=True"):
        make_trainer(tmp_path, peft.PeftModel.from_pretrained(untied(), tmp_path / "adapter"))


def test_what_is_trained_beside_an_adapter_must_be_saved_with_it(tmp_path):
    adapted = peft.get_peft_model(untied(), peft.LoraConfig(**LORA))
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        InputError, match=r"1 parameters of the base model .* not be saved .*: model\.norm\.weight"
    ):
        make_trainer(tmp_path, adapted)
    biased = peft.get_peft_model(
        make_model("gpt2", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
        peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"),
    )
    assert make_trainer(tmp_path, biased).layout == "tree"


def test_adapters_of_reward_models_and_of_causal_ones_are_not_mixed_up(tmp_path):
    continued(tmp_path / "causal", task_type="CAUSAL_LM")
    value = load_reward_model(untied().config.to_dict())[0]
    config = new_adapter(LORA, rewards=True)
    prepared_policy(value, config, rewards=True, seed=0).save_pretrained(tmp_path / "rewards")
    with pytest.raises(InputError, match="of a reward model, and is put on a causal LM"):
        put_adapter(untied(), tmp_path / "rewards", trainable=True)
    with pytest.raises(InputError, match="of a causal LM, and is put on a reward model"):
        put_adapter(load_reward_model(untied().config.to_dict())[0], tmp_path / "causal")


def test_of_several_adapters_in_a_folder_the_one_at_its_top_is_loaded(tmp_path):
    model, _ = ways("two loaded", tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.warns(DpoKitWarning, match=r"more adapters in it \(second\)"):
        loaded = put_adapter(untied(), tmp_path, trainable=True)
    assert same(trained(loaded), trained(model))


def continued(folder, **settings):
    """A model with an adapter that was trained and saved, to be trained further."""
    model = peft.get_peft_model(untied(), peft.LoraConfig(**LORA | settings))
    moved(model).save_pretrained(folder)
    return put_adapter(untied(), folder, trainable=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_start_of_an_adapter_is_the_reference_of_a_copy(autocast, tmp_path):
    policy = continued(tmp_path, modules_to_save=["lm_head"])
    batch = pack_tree(PAIRS)
    copied, start = LiveReference.copy_of(policy), StartReference(policy)
    kept, names = policy.state_dict(), trained(policy)
    moved(policy.train(), seed=2)
    modes = {name: module.training for name, module in policy.named_modules()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # First the policy, so that autocast holds its weights.
        logps = sequence_logprobs(policy, batch).sequences
        expected, found = copied.logprobs(batch), start.logprobs(batch)
        assert torch.equal(found.sequences, expected.sequences)
        assert (found.sequences - logps).abs().max() > 0.1
        inputs = [reference.head_inputs(batch) for reference in (copied, start)]
        assert torch.equal(inputs[0].hidden, inputs[1].hidden)
        assert torch.equal(inputs[0].weight, inputs[1].weight)
        assert not torch.equal(inputs[1].weight, head_inputs(policy, batch).weight)
    logps.sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = sequence_logprobs(policy, batch).sequences
    logps.sum().backward()
    assert same(gradients, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients.keys() == names.keys() == trained(policy).keys()
    assert kept.keys() == policy.state_dict().keys()
    assert modes == {name: module.training for name, module in policy.named_modules()}


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_an_adapter_is_trained_further_with_its_start_as_reference(loss, tmp_path):
    policy = continued(tmp_path / "adapter")
    start = trained(policy)
    trainer = make_trainer(tmp_path / "run", policy, loss=loss, save_strategy="steps", save_steps=4)
    kind = {"dpo": CachedReference, "tdpo2": StartReference}[loss]
    assert isinstance(trainer.reference, kind)
    assert trainer.reference.is_policy
    trainer.train()
    first, *_, last = (entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(last["rewards/margins"]) > 1e-3
    assert not same(start, trained(trainer.model))
    saved = tmp_path / "run" / "checkpoints" / "step-4"
    if loss == "dpo":
        start_again = put_adapter(untied(), tmp_path / "adapter", trainable=True)
        again = make_trainer(tmp_path / "again", start_again)
        again.fill_reference()
        assert (trainer.filled.computed, again.filled.computed) == (24, 0)
    # One adapter, and nothing of the base or of the start.
    loaded = put_adapter(untied(), saved, trainable=True)
    assert same(trained(loaded), trained(trainer.model))
    assert not [path for path in saved.rglob("*.safetensors") if path.parent != saved]


def ways(name, folder):
    """The model, and the adapter to be put on it, of each way to a policy with adapters."""
    if name == "modules_to_save":
        return untied(), peft.LoraConfig(**LORA, modules_to_save=["lm_head"])
    if name == "ia3":
        return untied(), new_adapter(None, {"peft_type": "IA3"} | FIELDS["IA3"])
    if name == "continued":
        return continued(folder / "adapter"), None
    policy = peft.get_peft_model(untied(), peft.LoraConfig(**LORA, init_lora_weights=False))
    policy.add_adapter("second", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    if name == "two active":
        policy.base_model.set_adapter(["default", "second"])
    elif name == "the second":
        policy.set_adapter("second")
    return policy, None


@pytest.mark.parametrize(
    "name", ["modules_to_save", "ia3", "continued", "two loaded", "the second", "two active"]
)
def test_a_stopped_run_ends_with_the_same_adapter_bit_for_bit(name, tmp_path):
    def make(part, **settings):
        torch.manual_seed(7)
        model, config = ways(name, tmp_path)
        return make_trainer(
            tmp_path / part, model, peft_config=config, save_strategy="steps", save_steps=2, **settings
        )

    whole = make("whole")
    start = trained(whole.model)
    whole.train()
    make("cut").train()
    checkpoints = tmp_path / "cut" / "checkpoints"
    saved = list((checkpoints / "step-2").rglob("adapter_model.safetensors"))
    assert len(saved) == (1 if name in ("modules_to_save", "ia3", "continued") else 2)
    assert not list(checkpoints.rglob("model.safetensors"))
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=str(checkpoints / "step-2"))
    found, expected = trained(resumed.model), trained(whole.model)
    assert same(found, expected)
    assert not any(torch.equal(found[key], start[key]) for key in found if "lora_A" not in key)
