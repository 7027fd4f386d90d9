"""`dpo-kit merge`: a merged model says what the adapter on its base says; what would not is not written."""

import json

import pytest
import torch
from families import make_model, make_pairs
from safetensors.torch import load_file, save_file

from dpo_kit import cli, merging
from dpo_kit.errors import InputError
from dpo_kit.merging import MergeError, merge_adapter
from dpo_kit.models import load_model, load_reward_model
from dpo_kit.scoring import full_logit_logprobs, full_rewards
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def quiet(line):
    """Says nothing."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of base models, by name, with a tokenizer beside each."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = train_byte_level_bpe(["good cats and bad dogs"], 258)
    models = {
        "plain": make_model("llama", vocab_size=258, tie_word_embeddings=False),
        "tied": make_model("llama", vocab_size=258),
        "bfloat16": make_model("llama", torch.bfloat16, vocab_size=258),
        "wide": make_model("llama", vocab_size=258, hidden_size=64),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def save_adapter(base, folder, model=None, **settings):
    """An adapter as after training: all its numbers moved."""
    model = peft.get_peft_model(model or load_model(base), peft.LoraConfig(**LORA | settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def logprobs(model):
    return full_logit_logprobs(model.eval(), make_pairs(4))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("plain", {"modules_to_save": ["lm_head"]}),
        ("tied", {}),
        ("tied", {"modules_to_save": ["lm_head"]}),
        ("tied", {"use_dora": True, "use_rslora": True}),
        ("tied", {"init_lora_weights": "pissa"}),
    ],
)
def test_the_merged_model_gives_the_adapters_logprobs(base, settings, bases, tmp_path):
    adapter = save_adapter(bases / base, tmp_path / "adapter", **settings)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n' * 5)
    data = [str(tmp_path / "pairs.jsonl")]
    found = merge_adapter(adapter, tmp_path / "out", data=data, say=quiet)
    assert (found.sequences, found.dtype, found.quantised) == (4 + 2 * 4, "float32", False)
    assert found.difference < 1e-4 < 0.1 < found.effect
    merged = load_model(tmp_path / "out")
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logprobs(merged), logprobs(load_model(adapter)), rtol=1e-5, atol=1e-5)
    assert (logprobs(merged) - logprobs(load_model(bases / base))).abs().max() > 0.1
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(bases / base).get_vocab()
    assert sorted(path.suffix for path in (tmp_path / "out").glob("model*")) == [".safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_the_weights_are_written_as_the_base_has_them_or_as_asked(bases, tmp_path):
    adapter = save_adapter(bases / "bfloat16", tmp_path / "adapter")
    exact = merge_adapter(adapter, tmp_path / "exact", dtype="float64", say=quiet)
    assert exact.difference < 1e-11
    # Merged in fp32 and rounded once.
    found = merge_adapter(adapter, tmp_path / "out", say=quiet)
    assert found.dtype == "bfloat16"
    assert found.difference < 1e-4 < found.written < 1
    merge_adapter(adapter, tmp_path / "float", dtype="float32", say=quiet)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("float", "out")}
    for name, value in weights["float"].items():
        assert torch.equal(weights["out"][name], value.bfloat16())


def test_an_adapter_on_the_reward_model_it_was_trained_on(bases, tmp_path):
    adapter = save_adapter(
        None, tmp_path / "adapter", load_reward_model(bases / "plain")[0], task_type="SEQ_CLS"
    )
    merge_adapter(adapter, tmp_path / "out", say=quiet)
    merged, said = load_reward_model(tmp_path / "out")
    assert said == ""
    expected = full_rewards(load_reward_model(adapter)[0].eval(), make_pairs())
    torch.testing.assert_close(full_rewards(merged.eval(), make_pairs()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["not finite", "other base", "pickle", "no adapter", "there", "no base"])
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(fault, bases, tmp_path):
    adapter, base, out, message = save_adapter(bases / "plain", tmp_path / "adapter"), None, "out", None
    weights = adapter / "adapter_model.safetensors"
    if fault == "not finite":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)
        message = "not finite: base_model"
    elif fault == "other base":
        base, message = str(bases / "wide"), "does not fit the model.*size mismatch"
    elif fault == "pickle":
        weights.rename(adapter / "adapter_model.bin")
        message = "pickled weights .* are never loaded"
    elif fault == "no adapter":
        adapter, message = bases / "plain", "no adapter's folder"
    elif fault == "there":
        out, message = "adapter", "there already"
    else:
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "gone")
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        message = "base model is not there: '.*gone'"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=f"(?s){message}"):
        merge_adapter(adapter, tmp_path / out, base=base, say=quiet)
    assert sorted(tmp_path.iterdir()) == before


def test_a_merge_that_changes_the_model_is_refused_and_nothing_is_written(bases, tmp_path, capsys):
    # Layers that stand for two: merging one's adapter into weights that both have is wrong.
    adapter = save_adapter(bases / "plain", tmp_path / "adapter", layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(MergeError, match=r"a logit differs by \d"):
        merge_adapter(adapter, tmp_path / "out", say=quiet)
    # The embedding of a tied model is its head too, on which this adapter does not act.
    adapter = save_adapter(bases / "tied", tmp_path / "tied", target_modules=["embed_tokens"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(adapter), str(tmp_path / "out")])
    assert left.value.code == 1
    assert "merged, the model is another" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_read_back_as_another_is_removed(bases, tmp_path, monkeypatch):
    adapter = save_adapter(bases / "plain", tmp_path / "adapter")
    monkeypatch.setattr(merging, "load_model", lambda source, *more, **how: load_model(bases / "plain"))
    with pytest.raises(MergeError, match="what was written is another model"):
        merge_adapter(adapter, tmp_path / "out", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_kinds_that_peft_cannot_merge_are_refused(bases, tmp_path):
    adapter = save_adapter(bases / "plain", tmp_path / "adapter", lora_bias=True)
    with pytest.raises(InputError, match=r"peft cannot merge this adapter: .*lora_bias"):
        merge_adapter(adapter, tmp_path / "out", say=quiet)


def test_the_command_prints_what_it_came_to(bases, tmp_path, capsys):
    adapter = save_adapter(bases / "plain", tmp_path / "adapter")
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(adapter), str(tmp_path / "out"), "--dtype", "bfloat16", "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == str(bases / "plain")
    assert found["dtype"] == "bfloat16"
    assert found["difference"] < 1e-4 < found["effect"]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_of_a_quantised_base_is_merged_into_what_that_stands_for(bits, bases, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the quantisation extra)")
    from dpo_kit.quantised import quantization_config

    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"model: {{path: {bases / 'plain'}, quantization: {bits}, lora: {{r: 4}}}}\n"
        "data: {train: [pairs.jsonl]}\ntrain: {bf16: false}\n"
    )
    quantised = load_model(bases / "plain", quantization=quantization_config(bits, torch.float32))
    adapter = save_adapter(None, run / "model", quantised)
    found = merge_adapter(adapter, tmp_path / "out", say=quiet)
    assert found.quantised
    assert found.difference < 1e-4
    stands_for = load_model(
        bases / "plain", quantization=quantization_config(bits, torch.float32)
    ).dequantize()
    layer = "model.layers.0.self_attn.q_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{layer}.lora_{name}.weight"] for name in "AB")
    # Of LoraConfig: lora_alpha is 8.
    expected = stands_for.get_submodule(layer).weight.float() + 8 / 4 * up @ down
    merged = load_model(tmp_path / "out")
    torch.testing.assert_close(merged.get_submodule(layer).weight, expected, rtol=1e-5, atol=1e-6)
    whole = load_model(bases / "plain").get_submodule(layer).weight
    assert (stands_for.get_submodule(layer).weight - whole).abs().max() > 1e-3
