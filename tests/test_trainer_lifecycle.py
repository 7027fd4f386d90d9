"""What users do around a training run: again, elsewhere, with other models, with their own losses."""

import json

import pytest
import torch
from datasets import Dataset
from families import make_model
from test_trainer import first_rows, make_dataset, make_trainer, step_gradients

from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError
from dpo_kit.losses import loss_names, make_objective, register_loss, registry
from dpo_kit.run_folder import digest_recipe, is_finished
from dpo_kit.trainer import PreferenceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_model_is_itself_again_after_training(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    assert trainer.model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_a_trained_model_enters_another_trainer(tmp_path):
    first = make_trainer(tmp_path / "1", bf16=True)
    first.train()
    second = make_trainer(tmp_path / "2", model=first.model, bf16=True)
    assert second.layout == "tree"
    second.train()
    assert second.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_an_adapter_can_be_merged_and_trained_on(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")
    config = PreferenceConfig(str(tmp_path / "1"), batch_size=4, max_steps=2, bf16=False, disable_tqdm=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3)
    with pytest.warns(DpoKitWarning, match="dropout is off"):
        trainer = PreferenceTrainer(make_model("llama"), None, config, make_dataset(), peft_config=lora)
    batch = trainer.data_collator(first_rows(trainer.train_dataset, 4))
    assert step_gradients(trainer, batch)[0] == step_gradients(trainer, batch)[0]
    trainer.train()
    merged = trainer.model.merge_and_unload()
    assert make_trainer(tmp_path / "2", model=merged).layout == "tree"


def test_an_adapter_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")
    config = PreferenceConfig(str(tmp_path), bf16=False)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = make_model("llama", tie_word_embeddings=False)
    with pytest.raises(InputError, match="adapter on the output head"):
        PreferenceTrainer(model, None, config, make_dataset(), peft_config=lora)


def test_the_policy_cannot_be_its_own_reference(tmp_path):
    model = make_model("llama")
    with pytest.raises(InputError, match="very object that is trained"):
        make_trainer(tmp_path, model=model, ref_model=model)


def test_a_second_run_in_the_same_folder_leaves_its_own_checkpoints(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=6, model=make_model("llama", seed=1), **settings).train()
    again = make_trainer(tmp_path, max_steps=4, save_total_limit=1, **settings)
    again.train()
    assert {p.name for p in (tmp_path / "checkpoints").glob("step-*")} == {"step-4"}
    assert len(list((tmp_path / "checkpoints.1").glob("step-*"))) == 3
    saved = make_model("llama").from_pretrained(tmp_path / "checkpoints" / "step-4")
    assert same_weights(saved, again.model)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(6, seed=5),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_training_goes_on_when_train_is_called_again(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()


def test_resume_from_the_newest_checkpoint_counts_on(tmp_path):
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    whole = make_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    resumed = make_trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]
    assert resumed.tokens_saved_share == whole.tokens_saved_share
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        make_trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_an_evaluation_leaves_the_metrics_of_a_finished_run(tmp_path):
    make_trainer(tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    make_trainer(tmp_path, eval_dataset=make_dataset(4)).evaluate()
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def test_evaluation_without_training_data_settles_the_layout_first(tmp_path):
    data = make_dataset(4)
    for family, layout in (("llama", "tree"), ("mamba", "padded")):
        model, reference = make_model(family), make_model(family, seed=3)
        trainer = PreferenceTrainer(model, reference, PreferenceConfig(str(tmp_path), bf16=False))
        if layout == "tree":
            trainer.evaluate(data)
        else:
            with pytest.warns(DpoKitWarning, match="cannot be trusted"):
                trainer.evaluate(data)
        assert trainer.layout == layout


def test_a_tree_that_cannot_be_trusted_is_refused_when_asked_for(tmp_path):
    with pytest.raises(InputError, match="cannot be trusted with token trees"):
        make_trainer(tmp_path, model=make_model("mamba"), layout="tree")


def test_several_evaluation_sets_by_name(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": make_dataset(3), "b": make_dataset(4, seed=2)})
    assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())


def test_what_is_no_data_set_is_refused(tmp_path):
    for data in (make_dataset(2).to_iterable_dataset(), Dataset.from_dict({"prompt_ids": []})):
        with pytest.raises(InputError, match="expected a datasets"):
            make_trainer(tmp_path, dataset=None, eval_dataset=data)


def test_positions_that_depend_on_the_batch_are_refused_where_they_do(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=24)
    with pytest.raises(InputError, match="dynamic positions"):
        make_trainer(tmp_path, model=model)


def test_a_gradient_that_is_not_finite_stops_without_clipping_too(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0.0, loss=[{"name": "dpo", "weight": 1e38}], max_steps=1)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_weight_that_is_no_number_names_its_row(tmp_path):
    data = make_dataset(4, weight=[1.0, float("nan"), 1.0, 1.0])
    with pytest.raises(InputError, match=r"pairs:1: field 'weight'"):
        make_trainer(tmp_path, dataset=data).train()


def test_losses_of_ones_own_are_checked_before_a_run(monkeypatch):
    # Other tests know the package's own.
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))

    @register_loss("column_of_values")
    def column(logps):
        return logps.chosen[:, None]

    @register_loss("says_it_needs_no_reference", reference=False)
    def undeclared(logps):
        return logps.chosen_logratios

    with pytest.raises(InputError, match=r"one value per pair, \[2\] here; this one gave \(2, 1\)"):
        make_objective("column_of_values")
    with pytest.raises(InputError, match="needs `reference`"):
        make_objective("says_it_needs_no_reference")
    with pytest.raises(ValueError, match="one by one"):
        register_loss("open_ended")(lambda logps, **options: logps.chosen)
    for name in ("column_of_values", "says_it_needs_no_reference"):
        assert name in loss_names()


def test_metrics_are_json(tmp_path):
    make_trainer(tmp_path).train()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"data_seed": 5},
        {"group_by_prompt": True},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 1},
    ],
)
def test_the_rows_that_a_short_run_comes_to_are_known_ahead(tmp_path, settings):
    """All that it is dealt is in the cache before the first step: nothing is computed on the way."""
    settings |= {"max_steps": 2, "batch_size": 4, "reference_mode": "cached"}
    trainer = make_trainer(
        tmp_path, dataset=make_dataset(32), reference_cache_dir=str(tmp_path / "cache"), **settings
    )
    trainer.fill_reference()
    known = len(trainer.reference)
    trainer.train()
    assert len(trainer.reference) == known
    assert known < 64 or "accelerator_config" in settings


def test_a_resume_that_was_cut_off_is_not_finished(tmp_path):
    """It writes its recipe first; summary and model are those of the run before."""
    short, longer = ({"train": {"max_steps": n}} for n in (6, 60))
    (tmp_path / "model").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps({"recipe": digest_recipe(short)}))
    (tmp_path / "recipe.yaml").write_text(json.dumps(longer))
    assert not is_finished(tmp_path, longer)
    assert is_finished(tmp_path, short)
