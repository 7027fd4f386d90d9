"""The trainer: same loss and gradients as TRL, whatever the cut; exact resume; it stops when it must."""

import json

import pytest
import torch
from datasets import Dataset
from families import make_model, make_pairs
from safetensors.torch import load_file

from dpo_kit.attention import ATTENTION_BACKENDS, flex
from dpo_kit.attention.gathered import GatheredAttention
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError
from dpo_kit.trainer import PreferenceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def make_dataset(count=12, seed=0, **columns):
    pairs = make_pairs(count, seed)
    rows = {
        "prompt_ids": [p.prompt.tolist() for p in pairs],
        "chosen_ids": [p.chosen.tolist() for p in pairs],
        "rejected_ids": [p.rejected.tolist() for p in pairs],
        "source": [p.source for p in pairs],
    }
    return Dataset.from_dict(rows | columns)


def make_trainer(folder, model=None, dataset=None, ref_model=None, eval_dataset=None, **settings):
    settings = {
        "batch_size": 4,
        "max_steps": 4,
        "bf16": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | settings
    return PreferenceTrainer(
        model=model or make_model("llama"),
        ref_model=ref_model,
        args=PreferenceConfig(output_dir=str(folder), **settings),
        train_dataset=dataset or make_dataset(),
        eval_dataset=eval_dataset,
    )


def step_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, batch)
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def first_rows(dataset, count):
    return [dataset[i] for i in range(count)]


def test_gradient_checkpointing_keeps_loss_and_gradients(tmp_path):
    dataset, reference = make_dataset(), make_model("llama", seed=9)
    results = []
    for settings in ({}, {"gradient_checkpointing": True, "tokens_per_micro_batch": 60}):
        trainer = make_trainer(tmp_path, dataset=dataset, ref_model=reference, batch_size=8, **settings)
        if settings:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        results.append(step_gradients(trainer, trainer.data_collator(first_rows(dataset, 8))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_loss_and_gradients_do_not_depend_on_the_cut_or_the_layout(tmp_path):
    dataset, reference = make_dataset(weight=[1.0, 2.0, 0.5] * 4), make_model("llama", seed=9)
    results = []
    for settings in ({}, {"tokens_per_micro_batch": 40}, {"tokens_per_micro_batch": 1}, {"layout": "padded"}):
        trainer = make_trainer(tmp_path, dataset=dataset, ref_model=reference, batch_size=12, **settings)
        batch = trainer.data_collator(first_rows(dataset, 12))
        results.append((len(batch["micro_batches"]), *step_gradients(trainer, batch)))
    assert [cuts for cuts, _, _ in results] == [1, results[1][0], 12, 1]
    assert results[1][0] > 2
    for _, loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, results[0][2], rtol=1e-4, atol=1e-6)


def test_equals_trl(tmp_path):
    """Loss and parameter gradients of TRL's DPOTrainer on the same pairs."""
    trl = pytest.importorskip("trl", reason="trl is not installed (the ppo extra)")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i): i for i in range(97)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", pad_token="0", bos_token="1")
    pairs = make_pairs(8)

    def text(ids):
        return " ".join(map(str, ids.tolist()))

    rows = {"prompt": [text(p.prompt) + " " for p in pairs]}
    rows["chosen"] = [text(p.chosen) for p in pairs]
    rows["rejected"] = [text(p.rejected) for p in pairs]
    dataset = Dataset.from_dict(rows)
    policy, reference = make_model("llama"), make_model("llama", seed=9)
    ours = PreferenceTrainer(
        policy,
        reference,
        PreferenceConfig(str(tmp_path / "ours"), batch_size=8, bf16=False, loss={"name": "dpo", "beta": 0.3}),
        dataset,
        processing_class=tokenizer,
    )
    batch = ours.data_collator(first_rows(ours.train_dataset, 8))
    loss, gradients = step_gradients(ours, batch)

    peer = trl.DPOTrainer(
        make_model("llama"),
        make_model("llama", seed=9),
        trl.DPOConfig(str(tmp_path / "trl"), beta=0.3, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    peer.model.eval()
    inputs = peer.data_collator([peer.train_dataset[i] for i in range(8)])
    peer_loss = peer.compute_loss(peer.model, inputs)
    peer_loss.backward()
    torch.testing.assert_close(loss, peer_loss.detach(), rtol=1e-4, atol=1e-6)
    for name, parameter in peer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_first_step_starts_at_log_2_and_the_margin_grows(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=20, eval_dataset=make_dataset(), reference_mode="live")
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[0]["rewards/accuracies"] == 0.5
    assert lines[-1]["rewards/margins"] > 0.1
    assert lines[-1]["rewards/margins"] == pytest.approx(
        lines[-1]["rewards/chosen"] - lines[-1]["rewards/rejected"], abs=1e-5
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] > 0.9


@pytest.mark.parametrize(
    "loss", ["sft", "unlikelihood", "log_ratio", "dpo", [{"name": "dpo"}, {"name": "sft"}]]
)
def test_every_loss_falls_and_holds_a_reference_only_where_it_needs_one(tmp_path, loss):
    needed = loss not in ("sft", "unlikelihood", "log_ratio")
    mode = "live" if needed else "auto"
    trainer = make_trainer(tmp_path, max_steps=9, loss=loss, dataset=make_dataset(4), reference_mode=mode)
    trainer.train()
    assert (trainer.reference.model is not None) == needed
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_resume_is_bit_equal(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    step_3 = tmp_path / "whole" / "checkpoints" / "step-3"
    resumed = make_trainer(tmp_path / "resumed", max_steps=6, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(step_3))
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step-6" / "model.safetensors")
        for name in ("whole", "resumed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    start = load_file(step_3 / "model.safetensors")
    assert any(not torch.equal(first[k], start[k]) for k in first)


def test_old_checkpoints_are_rotated_and_none_is_half_written(tmp_path):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if not p.name.startswith("."))
    assert found == ["step-3", "step-4"]
    assert not list((tmp_path / "checkpoints").glob(".writing/*"))


def test_metrics_of_a_resumed_run_go_on_where_the_checkpoint_was(tmp_path):
    make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=3).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    trainer = make_trainer(tmp_path, max_steps=7, save_strategy="steps", save_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-3"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model=model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"not finite at step 1, on \d+ of \d+ pairs: pairs:\d+"):
        trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "model.norm.weight"


def test_a_reference_that_is_not_the_policy_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, reference_mode="live")
    with torch.no_grad():
        trainer.reference.model.lm_head.weight[5] += 1
    with pytest.raises(TrainingError, match=r"at step 0 the policy must be the reference.*-\d.*-\d"):
        trainer.train()


def test_lora_trains_the_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")
    model, dataset = make_model("llama"), make_dataset()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = PreferenceTrainer(
        model,
        args=PreferenceConfig(
            str(tmp_path), batch_size=4, max_steps=6, learning_rate=1e-2, bf16=False, logging_steps=1
        ),
        train_dataset=dataset,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    )
    trainer.train()
    assert trainer.layout == "tree"
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < losses[0]
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        kept = after.get(name, after.get(name.replace("_proj.weight", "_proj.base_layer.weight")))
        assert torch.equal(kept, value)


def test_dropout_is_off_and_says_so(tmp_path):
    with pytest.warns(DpoKitWarning, match="dropout is off"):
        make_trainer(tmp_path, model=make_model("llama", attention_dropout=0.1)).train()


def test_a_recurrent_model_trains_on_the_padded_path_with_a_warning(tmp_path):
    with pytest.warns(DpoKitWarning, match="cannot be trusted with token trees"):
        trainer = make_trainer(tmp_path, model=make_model("mamba"))
    trainer.train()
    assert trainer.layout == "padded"


def test_batch_size_from_trls_settings(tmp_path):
    config = PreferenceConfig(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert config.batch_size == 16


def test_rows_of_text_need_a_tokenizer(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    with pytest.raises(InputError, match="processing_class"):
        make_trainer(tmp_path, dataset=rows)


def test_grouped_pairs_of_one_prompt_meet_and_every_pair_is_trained_on_once(tmp_path):
    prompts = [[5, 6, 7, i] for i in range(4)]
    rows = [(prompts[i % 4], [10 + i, 3], [40 + i, 3]) for i in range(16)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    tokens = {}
    for grouped in (False, True):
        trainer = make_trainer(
            tmp_path, dataset=dataset, group_by_prompt=grouped, max_steps=-1, num_train_epochs=1
        )
        batches = [inputs["micro_batches"][0] for inputs in trainer.get_train_dataloader()]
        seen = sorted(batch.prediction_targets[batch.prediction_targets < 40].tolist() for batch in batches)
        assert sorted(t for step in seen for t in step if t >= 10) == list(range(10, 26))
        tokens[grouped] = [batch.num_tokens for batch in batches]
    # One prompt of four tokens and eight replies of two; its pairs are dealt to one step.
    assert tokens[True] == [20] * 4
    assert sum(tokens[False]) > 80


def test_a_worker_that_plans_ahead_changes_nothing(tmp_path):
    weights = []
    for workers in (0, 1):
        trainer = make_trainer(tmp_path / str(workers), dataloader_num_workers=workers, max_steps=3)
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class WrongInBf16(GatheredAttention):
    """A backend with a fault that raises nothing, and that no check in fp32 would find."""

    def to(self, device):
        return self

    def attend(self, query, key, value, **options):
        fault = {"window": 1} if query.dtype == torch.bfloat16 else {}
        return super().attend(query, key, value, **(options | fault))


def test_a_backend_that_is_wrong_on_the_model_is_replaced(tmp_path, monkeypatch):
    plan = GatheredAttention.plan
    monkeypatch.setitem(ATTENTION_BACKENDS, "wrong", lambda tree: WrongInBf16(**vars(plan(tree))))
    with pytest.warns(DpoKitWarning, match="'wrong' is not right here .* 'gathered' is used"):
        trainer = make_trainer(tmp_path, attention="wrong", bf16=True)
    assert trainer.args.backend == "gathered"


@pytest.mark.skipif(not flex.available(), reason="this torch has no FlexAttention with a log-sum-exp")
def test_a_backend_that_is_right_is_kept(tmp_path):
    assert make_trainer(tmp_path, attention="flex", bf16=True).args.backend == "flex"


def test_unknown_attention_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"auto, gathered, varlen, flex"):
        PreferenceConfig(output_dir=str(tmp_path), attention="flash")
    with pytest.raises(InputError, match=r"train\.dataloader_num_workers"):
        PreferenceConfig(output_dir=str(tmp_path), dataloader_num_workers=-1)
