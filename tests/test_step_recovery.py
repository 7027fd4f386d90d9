"""A step that does not go well: memory runs out, a loss or gradient is not finite. Nothing counts twice."""

import json

import pytest
import torch
from families import make_model
from test_trainer import make_dataset, make_trainer

from dpo_kit.errors import DivergedError, DpoKitWarning, RankWarning, TrainingError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def run_out_of_memory(model, limit, in_backward=False):
    """Have passes over more than `limit` tokens fail, as a CUDA device without memory does."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def before(module, arguments, keywords):
        tokens = keywords["input_ids"].numel()
        module.model.layers[0]._backward_hooks.clear()
        if tokens > limit and torch.is_grad_enabled():
            if not in_backward:
                fail()
            # The first micro-batch of a step has its gradients then, and this one half of them.
            module.model.layers[0].register_full_backward_hook(fail)

    model.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("loss", ["dpo", "kto", "aot"])
def test_a_step_is_cut_again_where_memory_runs_out_and_the_numbers_stay(tmp_path, loss):
    """The reference: a run that had the smaller budget from the start, to the bit."""
    settings = {"loss": loss, "batch_size": 8, "reference_cache_dir": str(tmp_path / "cache")}
    whole = make_trainer(tmp_path / "a", tokens_per_micro_batch=4000, **settings)
    largest = max(b.input_ids.numel() for b in next(iter(whole.get_train_dataloader()))["micro_batches"])
    budget = largest // 2
    small = make_trainer(tmp_path / "b", tokens_per_micro_batch=budget, **settings)
    small.train()
    whole.fill_reference()
    run_out_of_memory(whole.model, largest - 1)
    with pytest.warns(RankWarning, match=f"memory ran out .*: micro-batches have {budget} tokens from here"):
        whole.train()
    assert whole.args.token_budget == budget
    assert equal(weights(whole), weights(small))
    for one, other in zip(whole.state.log_history[:-1], small.state.log_history[:-1], strict=True):
        left_out = "pairs_per_second"
        assert {k: v for k, v in one.items() if k != left_out} == {
            k: v for k, v in other.items() if k != left_out
        }


def test_memory_that_runs_out_in_a_backward_pass_leaves_no_gradient_behind(tmp_path):
    settings = {"batch_size": 8, "reference_cache_dir": str(tmp_path / "cache")}
    dataset = make_dataset(8)
    trainer = make_trainer(tmp_path / "a", dataset=dataset, tokens_per_micro_batch=150, **settings)
    trainer.fill_reference()
    inputs = next(iter(trainer.get_train_dataloader()))
    sizes = [batch.input_ids.numel() for batch in inputs["micro_batches"]]
    assert len(sizes) > 1
    run_out_of_memory(trainer.model, sorted(sizes)[-1] - 1, in_backward=True)
    # The pass that fails in backward must not be the first: something has been added to gradients then.
    inputs["micro_batches"].sort(key=lambda batch: batch.input_ids.numel())
    with pytest.warns(RankWarning, match="memory ran out"):
        trainer.training_step(trainer.model, inputs)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    assert len(inputs["micro_batches"]) > len(sizes)

    plain = make_trainer(tmp_path / "b", dataset=dataset, tokens_per_micro_batch=4000, **settings)
    plain.fill_reference()
    plain.training_step(plain.model, next(iter(plain.get_train_dataloader())))
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_one_example_that_does_not_fit_ends_the_run_with_advice(tmp_path):
    trainer = make_trainer(tmp_path, reference_cache_dir=str(tmp_path / "cache"))
    trainer.fill_reference()
    run_out_of_memory(trainer.model, 0)
    said = "memory ran out at step 1.*one example fills it.*train.tokens_per_micro_batch"
    with pytest.raises(TrainingError, match=said), pytest.warns(RankWarning):
        trainer.train()


def poisoned(folder, bad_rows, **settings):
    """A trainer some of whose pairs have a token whose embedding is not a number."""
    model = make_model("llama", tie_word_embeddings=False)
    token = model.config.vocab_size - 1
    rows = make_dataset(12).to_list()
    for i, row in enumerate(rows):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            row[name] = [min(t, token - 1) for t in row[name]]
        if i in bad_rows:
            row["chosen_ids"][0] = token
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    dataset = type(make_dataset(1)).from_list(rows)
    settings = {"layout": "padded", "train_sampling_strategy": "sequential"} | settings
    return make_trainer(
        folder, model=model, dataset=dataset, ref_model=make_model("llama", seed=9), **settings
    )


def written(folder):
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_pairs_are_written(tmp_path):
    trainer = poisoned(tmp_path, {6}, reference_mode="live")
    with pytest.raises(DivergedError, match="loss is not finite at step 2, on 1 of 4 pairs: pairs:6"):
        trainer.train()
    (line,) = written(tmp_path)
    assert (line["step"], line["what"], len(line["pairs"])) == (2, "loss", 4)
    by_source = {pair["source"]: pair for pair in line["pairs"]}
    bad, good = by_source.pop("pairs:6"), by_source["pairs:5"]
    assert bad["loss"] == "nan"
    assert bad["logps"][0] == "nan"
    # Chosen and rejected, of policy and reference.
    assert all(isinstance(value, float) for value in [*bad["reference_logps"], bad["logps"][1]])
    assert [len(good["logps"]), len(good["reference_logps"])] == [2, 2]
    assert all(isinstance(pair["loss"], float) for pair in by_source.values())


def test_such_a_step_is_left_out_where_that_is_asked_for(tmp_path):
    """Three steps of 4 pairs; the second is poisoned: the weights after it are those before it."""
    after = []
    trainer = poisoned(
        tmp_path, {6}, reference_mode="live", max_steps=3, on_nonfinite="skip", weight_decay=0.1
    )

    class Keep(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, *_, **__):
            after.append(weights(trainer))

    trainer.add_callback(Keep())
    with pytest.warns(DpoKitWarning, match="loss is not finite at step 2.*: the step is left out"):
        trainer.train()
    first, second, third = ({n: v.nan_to_num(7.0) for n, v in one.items()} for one in after)
    assert equal(first, second)
    assert not equal(second, third)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["grad_norm" in line for line in lines] == [True, False, True]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    # 4 pairs of each of the other two steps.
    assert trainer.pairs_seen == 8


def test_no_more_steps_in_a_row_are_left_out_than_stated(tmp_path):
    trainer = poisoned(
        tmp_path, set(range(12)), reference_mode="live", max_steps=3, on_nonfinite="skip", max_nonfinite=2
    )
    stops = pytest.raises(DivergedError, match=r"at step 3.*2 steps before it were left out already")
    with stops, pytest.warns(DpoKitWarning, match="left out"):
        trainer.train()
    assert [line["step"] for line in written(tmp_path)] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_is_treated_alike(tmp_path):
    """All losses are finite here: what is written are all pairs of the step."""
    trainer = make_trainer(tmp_path, on_nonfinite="skip", reference_mode="live", max_steps=3)
    steps = []

    def spoil(gradient):
        steps.append(0)
        return gradient * float("inf") if len(steps) == 2 else gradient

    trainer.model.model.norm.weight.register_hook(spoil)
    with pytest.warns(DpoKitWarning, match="gradient is not finite at step 2"):
        trainer.train()
    (line,) = written(tmp_path)
    assert line["what"] == "gradient"
    assert all(isinstance(pair["loss"], float) for pair in line["pairs"])
    assert len(line["pairs"]) == 4
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
