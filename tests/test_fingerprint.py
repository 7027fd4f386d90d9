"""What a model is known by: its key changes with all that a log-prob depends on, and with nothing else."""

import pytest
import torch
from families import make_model
from peft import PromptTuningConfig, get_peft_model
from test_reference_cache import lora

from dpo_kit.fingerprint import active_adapters, digest_weights, files_key, model_key


def test_the_key_changes_with_all_that_a_value_depends_on():
    def one_weight(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6

    def one_buffer(model):
        model.model.rotary_emb.inv_freq[-1] *= 1.0001

    def swapped(model):
        one, other = model.model.layers
        one.mlp.up_proj.weight, other.mlp.up_proj.weight = other.mlp.up_proj.weight, one.mlp.up_proj.weight

    def theta(model):
        model.config.rope_parameters["rope_theta"] = 5e5

    def epsilon(model):
        model.config.rms_norm_eps = 1e-5

    def unknown_field(model):
        model.config.new_in_some_release = True

    def half(model):
        model.bfloat16()

    keys = [model_key(make_model("llama"))]
    for change in (one_weight, one_buffer, swapped, theta, epsilon, unknown_field, half):
        model = make_model("llama")
        change(model)
        keys.append(model_key(model))
    keys += [model_key(make_model("llama"), autocast=dtype) for dtype in (torch.bfloat16, torch.float16)]
    keys.append(model_key(make_model("qwen2")))
    for settings in ({"seed": 1}, {"seed": 2}, {"seed": 1, "lora_alpha": 16}):
        keys.append(model_key(lora(make_model("llama"), **settings)))
    scaled = lora(make_model("llama"), seed=1)
    scaled.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    keys.append(model_key(scaled))
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_what_no_value_depends_on(tmp_path):
    key = model_key(make_model("llama"))
    model = make_model("llama", attention_dropout=0.5, bos_token_id=7, use_cache=False)
    model.config._attn_implementation = "sdpa"
    model.config._name_or_path = "somewhere/else"
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert model_key(model) == key
    model.save_pretrained(tmp_path)
    assert model_key(type(model).from_pretrained(tmp_path)) == key
    assert model_key(torch.nn.parallel.DataParallel(model)) == key
    assert model_key(torch.compile(model)) == key


def test_a_peft_model_without_its_adapter_has_the_key_of_the_base_model():
    key = model_key(make_model("llama"))
    adapted = lora(make_model("llama"), seed=1, modules_to_save=["lm_head"])
    assert model_key(adapted) != key
    assert model_key(adapted, adapters=[]) == key
    with adapted.disable_adapter():
        assert model_key(adapted) == key
    # The name of an adapter is no part of it; what it is, is.
    renamed = get_peft_model(make_model("llama"), adapted.peft_config["default"], adapter_name="other")
    renamed.load_state_dict(
        {name.replace(".default", ".other"): value for name, value in adapted.state_dict().items()}
    )
    assert model_key(renamed) == model_key(adapted)


def test_weights_digest_sees_blocks_ties_and_empty_tensors():
    class Holder(torch.nn.Module):
        def __init__(self, **values):
            super().__init__()
            for name, value in values.items():
                self.register_buffer(name, value)

    large = torch.zeros(3 << 20)
    changed = large.clone()
    changed[-1] = 1
    digests = {
        digest_weights(Holder(a=value, b=torch.zeros(()), c=torch.zeros(0, 3)))
        for value in (large, changed, large.view(3, -1), large.int(), large[:-1])
    }
    assert len(digests) == 5
    assert digest_weights(Holder(a=large)) != digest_weights(Holder(b=large))
    assert digest_weights(Holder(a=large, b=large)) == digest_weights(Holder(a=large, b=large.clone()))


def test_files_are_known_by_their_bytes(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    lora(make_model("llama"), seed=1).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    key = files_key(tmp_path / "base", "float32")
    assert key != files_key(tmp_path / "base", "bfloat16")
    # An adapter on a model that is not there.
    assert files_key(tmp_path / "adapter") is None
    config.write_text(
        config.read_text().replace(
            '"base_model_name_or_path": null', '"base_model_name_or_path": "%s"' % (tmp_path / "base")
        )
    )
    adapter = files_key(tmp_path / "adapter")
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert files_key(tmp_path / "base", "float32") != key
    assert files_key(tmp_path / "adapter") != adapter


@pytest.mark.parametrize("sharded", [False, True])
def test_files_say_nothing_before_all_weights_are_there(tmp_path, sharded):
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base, max_shard_size="20KB" if sharded else "1GB")
    weights = sorted(base.glob("*.safetensors"))
    assert len(weights) > 2 if sharded else len(weights) == 1
    key = files_key(base)
    assert key is not None
    lora(make_model("llama"), seed=1).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    named = '"base_model_name_or_path": '
    config.write_text(config.read_text().replace(f"{named}null", f'{named}"{base}"'))
    assert files_key(tmp_path / "adapter") is not None
    for path in weights:
        path.rename(tmp_path / "away")
        assert files_key(base) is None
        assert files_key(tmp_path / "adapter") is None
        (tmp_path / "away").rename(path)
    assert files_key(base) == key
    for path in base.glob("*.index.json"):
        path.write_text("{")
        assert files_key(base) is None


def test_the_key_knows_the_release_of_transformers(monkeypatch):
    model, keys = make_model("llama"), []
    for version in ("5.23.0", "5.23.1", "5.24.0", "6.23.0"):
        monkeypatch.setattr("dpo_kit.fingerprint.transformers.__version__", version)
        keys.append(model_key(model))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_prompt_that_is_learnt_is_an_adapter():
    base = make_model("llama")
    key = model_key(base)
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    assert active_adapters(adapted) == ["default"]
    assert model_key(adapted) != key
    assert model_key(adapted, adapters=[]) == key
