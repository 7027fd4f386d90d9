"""Quantised models: loaded, exact in every mode, trained below an adapter, or refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import make_model, make_pairs
from quantised_models import BITS, adapted, quantised, saved
from test_trainer import first_rows, make_dataset, make_trainer, step_gradients
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from dpo_kit.errors import InputError
from dpo_kit.fingerprint import model_key
from dpo_kit.models import disable_dropout, load_model, load_reward_model, output_head
from dpo_kit.packing import pack_padded, pack_tree
from dpo_kit.quantised import (
    count_parameters,
    quantised_bits,
    quantised_layers,
    quantization_config,
    use_exact_layers,
    weight_bytes,
)
from dpo_kit.roofline import count_work
from dpo_kit.scoring import choose_layout, full_logit_logprobs, sequence_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
KINDS = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bases"))


def dequantised(layer: Any) -> Tensor:
    """By bitsandbytes' own functions, [O, I]."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)


def whole_twin(model: nn.Module, path: Path) -> nn.Module:
    """An ordinary model whose matrices are the quantised ones, as numbers."""
    twin = AutoModelForCausalLM.from_pretrained(path)
    layers = dict(twin.named_modules())
    for name, layer in quantised_layers(model).items():
        # GPT-2 has its matrices the other way round.
        whole = dequantised(layer).T if isinstance(layers[name], Conv1D) else dequantised(layer)
        assert torch.dist(layers[name].weight, whole) < 0.2 * whole.norm()
        layers[name].weight.data = whole.contiguous()
    disable_dropout(twin)
    return twin


@pytest.mark.parametrize("bits", BITS)
def test_the_layers_are_quantised_and_nothing_else(base: Path, bits: str) -> None:
    model, whole = quantised(base, bits), load_model(base)
    assert quantised_bits(model) == int(bits[0])
    layers = quantised_layers(model)
    assert len(layers) == 7 * 2
    assert all(isinstance(layer, KINDS[bits]) for layer in layers.values())
    assert type(output_head(model).module) is nn.Linear
    now = dict(model.named_parameters())
    for name, value in whole.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(now[name], value), name
    if bits == "4bit":
        state = next(iter(layers.values())).weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
    assert count_parameters(model) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_is_an_ordinary_one_with_rounded_matrices(
    tmp_path: Path, family: str, bits: str
) -> None:
    """Log-probs of both layouts and in both modes, and the gradient of what goes in, of a model with the same
    matrices."""
    sizes = {"n_embd": 64} if family == "gpt2" else {}
    path = saved(tmp_path, family, **sizes)
    pairs = make_pairs(4)
    model = quantised(path, bits)
    disable_dropout(model)
    twin = whole_twin(model, path)
    expected = full_logit_logprobs(twin, pairs)
    for training in (True, False):
        model.train(training)
        for pack in (pack_tree, pack_padded):
            found = sequence_logprobs(model, pack(pairs)).entries
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    gradients = []
    for each in (model, twin):
        words = each.get_input_embeddings().weight
        words.requires_grad_(True)
        sequence_logprobs(each, pack_tree(pairs)).entries.sum().backward()
        gradients.append(words.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_train_evaluate_train(tmp_path: Path, base: Path, bits: str) -> None:
    """On processors with avx512_bf16 bitsandbytes' 4-bit layers lose their gradients in the middle.

    Nothing here runs in eval mode before the first step: no reference, and no check of a tree.
    """
    dataset = make_dataset()
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization_config(bits, torch.float32)
    )
    settings = {"loss": "simpo", "layout": "padded", "eval_dataset": make_dataset(4, seed=1)}
    trainer = make_trainer(tmp_path, model=adapted(model), dataset=dataset, **settings)
    batch = trainer.data_collator(first_rows(dataset, 4))
    before = step_gradients(trainer, batch)
    trainer.evaluate()
    after = step_gradients(trainer, batch)
    assert len(before[1]) == 28
    assert max(float(g.abs().max()) for g in before[1].values()) > 1e-3
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_layer_that_was_packed_before_is_mended_by_the_cure(base: Path) -> None:
    """A model that was evaluated before it is handed over has its weights in the other order already."""
    model, pairs = load_model(base, quantization=quantization_config("4bit", torch.float32)), make_pairs(2)
    expected = full_logit_logprobs(model, pairs)
    layers = quantised_layers(model).values()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    full_logit_logprobs(model.eval(), pairs)
    use_exact_layers(model)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    # Their scales were rounded once more, by bitsandbytes.
    torch.testing.assert_close(full_logit_logprobs(model.train(), pairs), expected, rtol=0, atol=0.05)
    words = model.get_input_embeddings().weight
    sequence_logprobs(model, pack_tree(pairs)).entries.sum().backward()
    assert float(words.grad.abs().max()) > 0.1


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpointed_forward_has_the_same_gradients(tmp_path: Path, base: Path, bits: str) -> None:
    dataset, results = make_dataset(), []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path,
            model=adapted(quantised(base, bits)),
            dataset=dataset,
            gradient_checkpointing=checkpointing,
            reference_mode="adapter_off",
        )
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        results.append(step_gradients(trainer, trainer.data_collator(first_rows(dataset, 4))))
    assert len(results[0][1]) == 28
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_keys_tell_quantised_models_apart_and_do_not_change_by_use(base: Path) -> None:
    keys = [model_key(load_model(base))]
    for setting in (*BITS, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        config = quantization_config(setting, torch.float32)
        model = load_model(base, quantization=config)
        keys.append(model_key(model))
        sequence_logprobs(model, pack_tree(make_pairs(2)))
        assert model_key(model) == keys[-1]
        assert model_key(load_model(base, quantization=config)) == keys[-1]
        assert model_key(copy.deepcopy(model)) == keys[-1]
        wrapped = adapted(model)
        assert model_key(wrapped, adapters=[]) == keys[-1]
        layer = next(iter(quantised_layers(model).values()))
        scales = layer.weight.quant_state.absmax if "4bit" in type(layer).__name__ else layer.weight.SCB
        scales[0] += 1
        assert model_key(wrapped, adapters=[]) != keys[-1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_up_check_takes_them(base: Path, bits: str, dtype: torch.dtype) -> None:
    model = quantised(base, bits, dtype)
    assert choose_layout(model, make_pairs(4)) == ("tree", "")
    assert quantised_bits(model) == int(bits[0])
    if bits == "4bit":
        assert all(layer.compute_dtype == dtype for layer in quantised_layers(model).values())


@pytest.mark.parametrize("bits", BITS)
def test_work_and_bytes(base: Path, bits: str) -> None:
    pairs = make_pairs(4)
    whole, model = adapted(load_model(base)), adapted(quantised(base, bits))
    assert count_work(pairs, 4, model).flops == count_work(pairs, 4, whole).flops
    inside = sum(layer.in_features * layer.out_features for layer in quantised_layers(model).values())
    saving = weight_bytes(whole) - weight_bytes(model)
    # Of four bytes half a one or a whole one is left, and scales and tables: 0.1 a weight where it is small.
    assert saving == pytest.approx(inside * (3.4 if bits == "4bit" else 3), rel=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_model_saved_quantised_is_taken_as_it_is(tmp_path: Path, base: Path, bits: str) -> None:
    model, pairs = quantised(base, bits), make_pairs(2)
    model.save_pretrained(tmp_path / "q")
    again = load_model(tmp_path / "q")
    assert quantised_bits(again) == int(bits[0])
    expected = full_logit_logprobs(model, pairs)
    torch.testing.assert_close(full_logit_logprobs(again, pairs), expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="saved quantised already"):
        quantised(tmp_path / "q", bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_reward_model_keeps_its_head(base: Path, bits: str) -> None:
    model, about = load_reward_model(base, quantization=quantization_config(bits, torch.float32))
    assert "no value head" in about
    assert type(model.score) is nn.Linear
    assert len(quantised_layers(model)) == 14


def test_whole_training_and_a_quantised_head_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="cannot be trained") as caught:
        make_trainer(tmp_path, model=quantised(base, "4bit"))
    assert "model.lora" in str(caught.value)
    headless = {"load_in_4bit": True, "llm_int8_skip_modules": ["q_proj"]}
    untied = saved(tmp_path, "qwen2")
    with pytest.raises(InputError, match="head is quantised"):
        output_head(load_model(untied, quantization=quantization_config(headless, torch.float32)))


def test_settings_that_cannot_be_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, problem in (
        ("2bit", "unknown quantisation"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "neither 4 nor 8 bits, or both"),
        ({"bnb_4bit_quant_type": "nf4"}, "neither 4 nor 8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "unknown key"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "not rounded here"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": "yes"}, "boolean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf17"}, "bf17"),
    ):
        with pytest.raises(InputError, match=problem):
            quantization_config(setting, torch.float32)
    with pytest.raises(InputError, match="float64"):
        quantization_config("4bit", torch.float64)
    with pytest.raises(InputError, match="random weights"):
        load_model({"model_type": "llama"}, quantization=BitsAndBytesConfig(load_in_4bit=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="not installed") as caught:
        quantization_config("4bit", torch.float32)
    assert "dpo-kit[quantisation]" in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_optimisers_of_8_bits_and_paged_ones_train(tmp_path: Path, optim: str) -> None:
    """Those of Adam take the steps of torch's, but for the rounding of the moments; Lion goes that way."""
    trainers = {name: make_trainer(tmp_path, optim=name, max_steps=3) for name in (optim, "adamw_torch")}
    start = make_model("llama").state_dict()
    moves = {}
    for name, trainer in trainers.items():
        trainer.train()
        kind = type(trainer.optimizer.optimizer).__module__
        assert kind.startswith("bitsandbytes" if name == optim else "torch")
        now = trainer.model.state_dict()
        moves[name] = torch.cat([(now[key] - start[key]).flatten() for key in sorted(start)])
    alike = float(torch.cosine_similarity(moves[optim], moves["adamw_torch"], dim=0))
    assert alike > (0.5 if "lion" in optim else 0.98)


def test_an_optimiser_that_does_not_run_here_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "torchao" not in sys.modules:
        with pytest.raises(InputError, match="torchao"):
            make_trainer(tmp_path, optim="adamw_torch_8bit")

    def broken(self: Any, closure: Any = None) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(bnb.optim.AdamW, "step", broken)
    with pytest.raises(InputError, match="no kernel for this device") as caught:
        make_trainer(tmp_path, optim="adamw_bnb_8bit")
    assert caught.value.field == "train.optim"
