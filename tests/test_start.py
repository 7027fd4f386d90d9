"""What a run starts from is gone on with only where it was made from the same."""

import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_candidates import TEXTS, make_recipe, save_policy

from dpo_kit import start
from dpo_kit.callbacks import Progress
from dpo_kit.errors import InputError, StoppedError
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import check_same_run, make_room
from dpo_kit.start import is_made, make_start


@pytest.fixture
def content(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    policy = save_policy(tmp_path / "policy")
    return make_recipe(tmp_path, policy, tmp_path / "texts.txt", prompts=3, held_out=0, evaluation=2)


def changed(content, section, **values):
    return Recipe.check(content | {section: (content.get(section) or {}) | values})


def resolved(recipe):
    return recipe.resolved(recipe.training_config())


def test_pairs_made_from_something_else_are_refused(content, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    figures = make_start(Recipe.check(content), folder, print)
    assert figures["candidates/texts_read"] == len(TEXTS)
    assert is_made(Recipe.check(content), folder)
    assert is_made(changed(content, "train", learning_rate=1.0), folder)
    assert is_made(changed(content, "candidates", temperature=1.0), folder)  # its default, written out
    for section, values, key in (
        ("candidates", {"per_prompt": 3}, "candidates.per_prompt"),
        ("candidates", {"reward": None}, "candidates.reward"),
        ("eval", {"prompts": "other.jsonl"}, "eval.prompts"),
        ("train", {"seed": 1}, "train.seed"),
        ("model", {"dtype": "float64"}, "model.dtype"),
    ):
        with pytest.raises(InputError, match=rf"{folder}/pairs: field '{key}': .* remove this folder"):
            make_start(changed(content, section, **values), folder, print)
    # A folder of an earlier version does not say what it was made from.
    (folder / "pairs" / start.ORIGIN_FILE).unlink()
    assert is_made(changed(content, "candidates", per_prompt=3), folder)


def test_a_policy_of_another_corpus_is_refused(content, tmp_path):
    content["sft"] = {"corpus": [str(tmp_path / "texts.txt")], "max_length": 8, "documents": 4}
    content["sft"]["train"] = {
        "max_steps": 1,
        "batch_size": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    make_start(Recipe.check(content), tmp_path / "run", print)
    assert is_made(Recipe.check(content), tmp_path / "run")
    quieter = content["sft"]["train"] | {"disable_tqdm": False}
    assert is_made(changed(content, "sft", train=quieter), tmp_path / "run")
    with pytest.raises(InputError, match=r"run/sft: field 'sft.documents': .* with 4 and the recipe says 3"):
        make_start(changed(content, "sft", documents=3), tmp_path / "run", print)


def test_a_stage_that_was_stopped_goes_on(content, tmp_path, monkeypatch):
    """With the weights that it would have had, to the bit; and only by the recipe that it began with."""
    train = {"max_steps": 4, "batch_size": 2, "disable_tqdm": True, "use_cpu": True, "bf16": False}
    content["sft"] = {"corpus": [str(tmp_path / "texts.txt")], "max_length": 8, "train": train}
    recipe = Recipe.check(content | {"candidates": None, "data": {"train": ["pairs.jsonl"]}})
    make_start(recipe, tmp_path / "whole", print)

    def terminated(self, args, state, control, **_):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "on_step_begin", terminated)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3"):
        make_start(recipe, tmp_path / "run", print)
    monkeypatch.undo()
    longer = changed(content, "sft", train=train | {"max_steps": 5})
    with pytest.raises(InputError, match=r"field 'sft.train.max_steps': .* with 4 and the recipe says 5"):
        is_made(longer, tmp_path / "run")
    make_start(recipe, tmp_path / "run", print)
    one, other = (load_file(tmp_path / name / "sft/model/model.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stopped_while_it_samples_is_a_run(content, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "make_pairs", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_start(Recipe.check(content), tmp_path / "run", print)
    now = resolved(Recipe.check(content))
    check_same_run(tmp_path / "run", now)
    assert make_room(tmp_path / "run") is not None
    (tmp_path / "other" / "pairs").mkdir(parents=True)
    (tmp_path / "other" / "pairs" / "mine.jsonl").touch()
    with pytest.raises(InputError, match="not a run folder"):
        check_same_run(tmp_path / "other", now)


def test_a_resume_with_other_candidates_is_refused(content, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    content["candidates"]["reward"] = None
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved(Recipe.check(content))))
    check_same_run(folder, resolved(Recipe.check(content)))
    check_same_run(folder, resolved(changed(content, "eval", every=7)))
    for section, values in (("candidates", {"prompts": 4}), ("eval", {"reward": "other.py:f"})):
        with pytest.raises(InputError, match=f"field '{section}.{next(iter(values))}'"):
            check_same_run(folder, resolved(changed(content, section, **values)))
