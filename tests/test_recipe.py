"""Recipes: what they resolve to, and how each mistake is named."""
# ruff: noqa: E501 - the table of mistakes is read line by line

from pathlib import Path

import pytest
import yaml

from dpo_kit.comparison.frontier import load_comparison
from dpo_kit.comparison.runs import runs_of
from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

MINIMAL = """\
model:
  path: some-model
data:
  train: [a.jsonl]
train:
  output_dir: OUT
  learning_rate: 1e-5
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "out")))
    return path


def test_defaults_and_overrides(tmp_path):
    recipe = Recipe.load(
        write(tmp_path, MINIMAL), ["train.max_steps=7", "loss.name=unlikelihood", "data.eval=b.jsonl"]
    )
    config = recipe.training_config()
    assert config.learning_rate == 1e-5
    assert config.max_steps == 7
    assert config.loss == {"name": "unlikelihood"}
    assert config.max_length == 1024
    assert recipe.data.eval == ["b.jsonl"]
    assert recipe.model.dtype == "float32"


def test_the_resolved_recipe_is_a_recipe_and_means_the_same(tmp_path):
    recipe = Recipe.load(write(tmp_path, MINIMAL))
    config = recipe.training_config()
    again = Recipe.check(yaml.safe_load(yaml.safe_dump(recipe.resolved(config))))
    assert again.training_config().to_dict() == config.to_dict()
    assert again.resolved(again.training_config()) == recipe.resolved(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_are_sound(path, tmp_path):
    """Each loads whole, and so do its quick form and every run of its comparison."""
    recipe = Recipe.load(path)
    assert recipe.training_config(output_dir=str(tmp_path)).batch_size == recipe.train["batch_size"]
    if recipe.frontier is None:
        return
    for quick in (False, bool(recipe.frontier.quick)):
        runs = runs_of(load_comparison(path, [], quick), tmp_path)
        assert {run.method for run in runs} == set(recipe.frontier.methods)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "los: {name: dpo}\n", r"recipe.yaml:8: field 'los': unknown key. Did you mean 'loss'\?"),
        (MINIMAL + "  lerning_rate: 1\n", r":8: field 'train.lerning_rate': unknown key. Did you mean 'learning_rate'"),
        (MINIMAL + "  max_length: 9\n", r":8: field 'train.max_length': this is not set here. Set data.max_length"),
        (MINIMAL + "  max_steps: many\n", r":8: field 'train.max_steps': .*integer.*'many'"),
        (MINIMAL + "  max_steps: 3\n  max_steps: 4\n", r":9: field 'train.max_steps': the key stands twice, first in line 8"),
        (MINIMAL + "reference: {adapter: x}\n", r":8: field 'reference.adapter': it belongs to mode adapter, and the mode is auto"),
        (MINIMAL + "reference: {update_every: 5}\n", r":8: field 'reference.update_every': it belongs to mode moving"),
        (MINIMAL + "reference: {path: x}\nloss: {name: simpo}\n", r":8: field 'reference.path': the loss looks at no reference"),
        (MINIMAL + "reference: {mode: live}\nloss: {name: bradley_terry}\n", r":8: field 'reference.mode': a reward model has no reference"),
        (MINIMAL + "reference: {mode: lve}\n", r":8: field 'reference.mode'"),
        (MINIMAL + "loss: {name: dpoo}\n", r":8: field 'loss.name': unknown loss 'dpoo'. Did you mean 'dpo'"),
        (MINIMAL + "loss:\n  name: dpo\n  betta: 1\n", r":10: field 'loss.betta': 'dpo' has no such hyper-parameter. Did you mean 'beta'"),
        (MINIMAL + "loss:\n  - name: dpo\n  - name: sftt\n", r"unknown loss 'sftt'. Did you mean 'sft'"),
        (MINIMAL.replace("  path: some-model", "  pth: x"), r":2: field 'model.pth': unknown key. Did you mean 'path'"),
        (MINIMAL.replace("  train: [a.jsonl]", "  train: []"), r":4: field 'data.train': no training data"),
        (MINIMAL.replace("  path: some-model", "  config: {model_type: llama}"), r"field 'model.tokenizer'"),
        (MINIMAL.replace("some-model", "{a"), r"recipe.yaml:3: this is not YAML"),
        ("- a\n- b\n", r"a recipe is a mapping of sections"),
        ("data: {train: x.jsonl}\n", r"field 'model': this key is needed"),
        (MINIMAL + "reference: {mode: frozen}\n", r":8: field 'reference.mode': .*'frozen'"),
        (MINIMAL + "eval: {temperature: -1}\n", r":8: field 'eval.temperature'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path, text, expected):
    with pytest.raises(InputError, match=expected):
        Recipe.load(write(tmp_path, text))


@pytest.mark.parametrize(
    "override", ["train.max_steps", "=3", "train..x=1", "train.max_steps=[", "model.path.x=1"]
)
def test_a_wrong_override_is_named(tmp_path, override):
    with pytest.raises(InputError):
        Recipe.load(write(tmp_path, MINIMAL), [override])


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.yaml: the recipe cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_settings_that_trainingarguments_refuses_are_input_errors(tmp_path):
    recipe = Recipe.load(write(tmp_path, MINIMAL + "  eval_strategy: sometimes\n"))
    with pytest.raises(InputError, match=r"field 'train': .*sometimes"):
        recipe.training_config()
