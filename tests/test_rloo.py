"""RLOO through TRL: the run folder of the other methods, and a reward that goes up."""

import json

import numpy as np
import pytest
import torch
from families import make_model
from pair_files import write
from safetensors.torch import load_file

from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe
from dpo_kit.tokenizer import train_byte_level_bpe

pytest.importorskip("trl")
pytest.importorskip("requests", reason="TRL's RLOO imports it and does not declare it")
from dpo_kit.comparison.rloo_run import run_rloo

PROMPTS = ["the film", "a", "the other film was", "it"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_byte_level_bpe(["the film was good and the other was bad"] * 3, 280)
    tokenizer.save_pretrained(folder / "lm")
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(folder / "lm")
    rows = [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in PROMPTS]
    write(folder / "pairs.jsonl", *rows, *rows)
    write(folder / "prompts.jsonl", *({"prompt": p} for p in PROMPTS * 4))
    (folder / "reward.py").write_text("def e(text):\n    return -float(len(text))\n")
    return folder


def recipe_of(start, folder, **ppo):
    settings = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.01,
        "logging_steps": 4,
    }
    content = {
        "model": {"path": str(start / "lm")},
        "data": {"train": str(start / "pairs.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"output_dir": str(folder / "run"), "use_cpu": True},
        "report": {"enabled": False},
        "eval": {
            "prompts": str(start / "prompts.jsonl"),
            "reward": f"{start / 'reward.py'}:e",
            "max_new_tokens": 8,
            "every": 6,
        },
        "ppo": {"reward": "true", "settings": settings | ppo.pop("settings", {})} | ppo,
    }
    return Recipe.check(content)


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rloo")
    return run_rloo(recipe_of(start, folder, output_dir=str(folder / "run")), say=lambda line: None)


def test_the_reward_goes_up_and_the_folder_is_that_of_a_run(run):
    summary = run.summary
    assert summary["eval/reward_after"] > summary["eval/reward_before"] + 1
    assert summary["eval/kl"] > 0.1
    assert 0 < summary["tokens_sampled"] < summary["tokens"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_reward" in line]
    assert [line["step"] for line in measured] == [0, 6, 12]
    assert [line["eval_kl"] > 0 for line in measured] == [False, True, True]
    assert 0 == measured[0]["tokens"] < measured[1]["tokens"] < measured[2]["tokens"] <= summary["tokens"]
    assert [line["step"] for line in lines if "reward" in line] == [4, 8, 12]
    for name in ("recipe.yaml", "environment.json", "summary.json", "evaluations/step-12.jsonl"):
        assert (run.folder / name).exists()


def test_its_kl_penalty_is_against_the_policy_as_it_was(run, start, tmp_path):
    """A penalty that outweighs everything keeps the policy where it was."""
    recipe = recipe_of(start, tmp_path, settings={"beta": 100.0, "learning_rate": 1e-3, "max_steps": 6})
    held = run_rloo(recipe, say=lambda line: None)
    assert held.folder.name == "run-rloo"
    assert held.summary["eval/kl"] < run.summary["eval/kl"] / 5


def test_a_finished_run_is_left_as_it_is_and_the_same_seed_gives_the_same_model(run, start, tmp_path):
    recipe = Recipe.load(run.folder / "recipe.yaml")
    assert run_rloo(recipe, resume=True, say=lambda line: None).summary == run.summary
    again = run_rloo(recipe_of(start, tmp_path), say=lambda line: None)
    first, second = (
        load_file(folder / "model" / "model.safetensors") for folder in (run.folder, again.folder)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_learned_reward_and_an_adapter(start, tmp_path):
    pytest.importorskip("peft")
    recipe = recipe_of(start, tmp_path, reward="model", settings={"max_steps": 2})
    content = recipe.model_dump()
    content["model"]["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    content["reward_model"]["train"] = {"max_steps": 2, "batch_size": 4}
    found = run_rloo(Recipe.check(content), say=lambda line: None)
    assert (found.folder / "reward_model" / "summary.json").exists()
    assert (found.folder / "model" / "adapter_config.json").exists()
    assert np.isfinite(found.summary["eval/reward_after"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"settings": {"learning_rat": 1.0}}, "ppo.settings.learning_rat"),
        ({"settings": {"use_vllm": True}}, "ppo.settings.use_vllm"),
        ({"settings": {"num_generations": 3}}, "ppo.settings"),
        ({"target_kl": 3.0}, "ppo.target_kl"),
        ({"value": "policy"}, "ppo.value"),
        ({"reward": "nowhere.py:reward"}, "ppo.reward"),
    ],
)
def test_settings_that_cannot_be(changes, field, start, tmp_path):
    with pytest.raises(InputError) as caught:
        run_rloo(recipe_of(start, tmp_path, **changes), say=lambda line: None)
    assert caught.value.field == field
    assert not (tmp_path / "run-rloo").exists()


@pytest.mark.parametrize(
    ("section", "changes", "field"),
    [
        ("reference", {"path": "another"}, "reference.path"),
        ("data", {"max_length": 8}, "data.max_length"),
        ("loss", {"name": "bradley_terry"}, "loss"),
    ],
)
def test_what_is_refused_leaves_an_earlier_run_where_it_is(section, changes, field, start, tmp_path):
    content = recipe_of(start, tmp_path).model_dump()
    content[section] = changes if section == "loss" else content[section] | changes
    earlier = tmp_path / "run-rloo" / "metrics.jsonl"
    earlier.parent.mkdir()
    write(earlier, {"step": 0})
    with pytest.raises(InputError) as caught:
        run_rloo(Recipe.check(content), say=lambda line: None)
    assert caught.value.field == field
    assert [path for path in tmp_path.rglob("*") if path.name == "metrics.jsonl"] == [earlier]


def test_in_bf16_a_policy_that_does_not_learn_has_no_kl(start, tmp_path):
    recipe = recipe_of(start, tmp_path, settings={"learning_rate": 0.0, "max_steps": 2})
    found = run_rloo(
        recipe.model_copy(update={"train": recipe.train | {"bf16": True}}), say=lambda line: None
    )
    assert found.summary["eval/kl"] == 0


def test_measuring_in_full_precision_leaves_training_in_bf16(start, tmp_path):
    """What is trained and sampled is the same whether or not the policy is measured on the way."""
    found = []
    for every in (0, 1):
        recipe = recipe_of(start, tmp_path / str(every), settings={"max_steps": 4, "logging_steps": 1})
        section = recipe.eval.model_copy(update={"every": every})
        changes = {"train": recipe.train | {"bf16": True}, "eval": section}
        folder = run_rloo(recipe.model_copy(update=changes), say=lambda line: None).folder
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["loss"], line["reward"], line["kl"]) for line in lines if "loss" in line])
    assert found[0] == found[1]
    assert len(found[0]) == 4
