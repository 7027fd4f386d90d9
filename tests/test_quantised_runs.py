"""Recipes with `model.quantization`: whole runs, resumed ones, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_world

from dpo_kit.errors import InputError
from dpo_kit.quantised import quantised_layers
from dpo_kit.recipe import Recipe
from dpo_kit.run import load_start, run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_of(world: Path, folder: Path, model: dict[str, Any], **train: Any) -> Recipe:
    settings = {
        "output_dir": str(folder),
        "batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": False,
        "disable_tqdm": True,
    }
    content = {
        "model": {"path": str(world / "policy")} | model,
        "data": {"train": [str(world / "train.jsonl")], "eval": [str(world / "heldout.jsonl")]},
        "eval": {
            "prompts": str(world / "prompts.jsonl"),
            "reward": f"{world / 'reward.py'}:reward",
            "max_new_tokens": 4,
        },
        "report": {"enabled": False},
        "train": settings | train,
    }
    return Recipe.check(content)


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_recipe_trains_and_goes_on_where_it_was_stopped(world: Path, tmp_path: Path, bits: str) -> None:
    model = {"quantization": bits, "lora": LORA}
    settings = {"optim": "adamw_bnb_8bit", "gradient_checkpointing": True}
    whole = run_recipe(recipe_of(world, tmp_path / "whole", model, **settings), say=quiet)
    assert whole.summary["eval/kl"] > 0
    saved = {path.name for path in (tmp_path / "whole" / "model").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert len(losses) == 4

    stopped = recipe_of(world, tmp_path / "part", model, **settings)
    run_recipe(stopped, say=quiet)
    for path in ("summary.json", "checkpoints/step-4"):
        (tmp_path / "part" / path).rename(tmp_path / path.replace("/", "-"))
    run_recipe(stopped, resume=True, say=quiet)
    ends = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "part")]
    assert max(float(value.abs().max()) for name, value in ends[0].items() if "lora_B" in name) > 1e-3
    environment = json.loads((tmp_path / "whole" / "environment.json").read_text())
    base = sum(value.numel() for value in load_file(world / "policy" / "model.safetensors").values())
    assert environment["model"]["parameters"] == base + sum(value.numel() for value in ends[0].values())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_4_bit_weights_are_multiplied_in_the_runs_precision(world: Path, tmp_path: Path) -> None:
    model = {"quantization": "4bit", "lora": LORA}
    for settings, expected in (
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
    ):
        recipe = recipe_of(world, tmp_path, model, **settings)
        layers = quantised_layers(load_start(recipe)[0]).values()
        assert {layer.compute_dtype for layer in layers} == {expected}
    named = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4"}
    recipe = recipe_of(world, tmp_path, model | {"quantization": named}, bf16=True)
    layers = quantised_layers(load_start(recipe)[0])
    assert {layer.compute_dtype for layer in layers.values()} == {torch.float32}
    assert {layer.weight.quant_state.quant_type for layer in layers.values()} == {"fp4"}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_under_bf16_autocast(world: Path, tmp_path: Path, bits: str) -> None:
    """The check of step zero holds there too, with cached log-probs of other micro-batches."""
    recipe = recipe_of(world, tmp_path / "run", {"quantization": bits, "lora": LORA}, bf16=True)
    found = run_recipe(recipe, say=quiet)
    assert 0 < found.summary["train_loss"] < 0.8


def test_of_a_quantised_base_only_lora_is_trained(world: Path, tmp_path: Path) -> None:
    other = {"peft_type": "LOHA", "target_modules": ["q_proj"]}
    recipe = recipe_of(world, tmp_path / "run", {"quantization": "4bit", "peft": other})
    with pytest.raises(InputError, match=r"model\.peft.*only LoRA is trained; LOHA was not tested"):
        run_recipe(recipe, say=quiet)
    assert not (tmp_path / "run").exists()


def test_recipes_that_cannot_be_are_refused_at_once(world: Path, tmp_path: Path) -> None:
    for model, field, problem in (
        ({"quantization": "4bit"}, "", "no adapter"),
        ({"quantization": {"load_in_4bit": True, "lowd": 1}, "lora": LORA}, ".lowd", "unknown"),
        ({"quantization": {}, "lora": LORA}, "", "neither"),
        (
            {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "lora": LORA},
            ".bnb_4bit_quant_type",
            "unknown type 'nf5'",
        ),
    ):
        with pytest.raises(InputError, match=problem) as caught:
            recipe_of(world, tmp_path, model)
        assert caught.value.field == f"model.quantization{field}"
    # Fields of LoraConfig that are all left as they are make an adapter too.
    recipe_of(world, tmp_path, {"quantization": "4bit", "lora": {}})
    with pytest.raises(InputError) as caught:
        recipe_of(world, tmp_path, {"quantization": "3bit", "lora": LORA})
    assert caught.value.field.startswith("model.quantization")
