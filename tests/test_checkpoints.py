"""Checkpoints: bit-exact, without pickles, known to be whole or not; the newest good one is found."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model
from test_trainer import make_dataset, make_trainer
from transformers import get_scheduler

from dpo_kit.checkpoint_files import (
    damage,
    join_tree,
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    random_states,
    read_json,
    read_tensors,
    set_random_states,
    split_tree,
    write_json,
    write_tensors,
)
from dpo_kit.checkpoint_folders import check_whole, newest_checkpoint, remove_old
from dpo_kit.errors import DpoKitWarning, InputError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

SAVING = {"save_strategy": "steps", "save_steps": 2}
OPTIMISERS = {
    "adamw_torch_fused": {},
    "adamw_torch": {"optim_args": "foreach=True"},
    "sgd": {"optim_args": "momentum=0.9"},
    "adafactor": {},
    "adamw_8bit": {},
    "lion_8bit": {},
}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(first, second):
    """Bit for bit, dtypes and types too, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        alike = type(first) is type(second) and len(first) == len(second)
        return alike and all(map(same, first, second))
    return type(first) is type(second) and (first == second or first != first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that left checkpoints of the second and the fourth; nobody changes it."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, **SAVING)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_a_resumed_run_ends_bit_equal(tmp_path, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings = SAVING | {"optim": optim, "max_steps": 6, "lr_scheduler_type": "cosine"} | OPTIMISERS[optim]
    ended = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoints" / "step-4"))):
        # Of 8 bits are the states of matrices of 4096 numbers and more.
        model = make_model("llama", hidden_size=64, intermediate_size=128)
        trainer = make_trainer(tmp_path / name, model, **settings)
        trainer.train(resume_from_checkpoint=resume)
        state = optimizer_state(trainer.optimizer, parameter_names(trainer.model))
        ended.append((weights(trainer), state, trainer.lr_scheduler.state_dict(), random_states()))
    assert ended[0][1]["state"]
    for before, after in zip(*ended, strict=True):
        assert same(before, after)
    if "8bit" in optim:
        held = [
            value.dtype
            for value in read_tensors(tmp_path / "whole/checkpoints/step-4/optimizer.safetensors").values()
        ]
        assert torch.uint8 in held


def test_an_adapter_is_resumed_from_its_own_weights_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")
    from dpo_kit.config import PreferenceConfig
    from dpo_kit.trainer import PreferenceTrainer

    ended = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoints" / "step-2"))):
        settings = SAVING | {"batch_size": 4, "max_steps": 4, "seed": 3, "learning_rate": 1e-2}
        config = PreferenceConfig(str(tmp_path / name), bf16=False, disable_tqdm=True, **settings)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        trainer = PreferenceTrainer(make_model("llama"), None, config, make_dataset(), peft_config=lora)
        trainer.train(resume_from_checkpoint=resume)
        ended.append(weights(trainer))
    assert same(*ended)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-2"
    assert not (checkpoint / "model.safetensors").exists()
    assert all("lora" in name for name in read_tensors(checkpoint / "adapter_model.safetensors"))


def test_nothing_that_a_run_writes_is_a_pickle(whole, tmp_path):
    folder, _ = whole
    make_trainer(tmp_path / "again").save_model(str(tmp_path / "model"))
    written = [p for place in (folder, tmp_path) for p in place.rglob("*") if p.is_file()]
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= {p.name for p in written}
    assert {p.suffix for p in written} == {".json", ".jsonl", ".safetensors"}
    # torch.save writes a zip, pickle a protocol byte.
    assert not any(p.read_bytes().startswith((b"PK", b"\x80")) for p in written)


def test_a_tree_of_states_comes_back_as_it_was(tmp_path):
    shared, base = torch.randn(3), torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tree = {
        "numbers": [1, 0.1, float("inf"), -0.0, True, None, "text"],
        "betas": (0.9, 0.999),
        "by step": {3: "three", (1, 2): ["pair"]},
        "$odd": {"nothing": {}, "empty": ()},
        "same": [shared, shared],
        "views": {"row": base[1], "column": base[:, 1], "bytes": torch.tensor([1, 255], dtype=torch.uint8)},
        "one": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 3),
        "from numpy": np.float64(0.3),
    }
    written, tensors = split_tree(tree, "state")
    write_json(tmp_path / "tree.json", written)
    write_tensors(tmp_path / "tree.safetensors", tensors)
    back = join_tree(read_json(tmp_path / "tree.json"), read_tensors(tmp_path / "tree.safetensors"))
    assert same(back, tree | {"from numpy": 0.3})
    assert back["same"][0] is back["same"][1]
    with pytest.raises(InputError, match="state/schedule/0 is a function, which only a pickle could keep"):
        split_tree({"schedule": [same]}, "state")


def test_an_optimiser_goes_by_names_and_keeps_its_dtypes():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    names = parameter_names(model)
    first = torch.optim.AdamW([model.weight, model.bias])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    first.state[model.weight]["exp_avg"] = torch.randn(2, 3)
    second = torch.optim.AdamW([model.bias, model.weight])
    load_optimizer_state(second, names, optimizer_state(first, names))
    assert all(same(first.state[p], second.state[p]) for p in model.parameters())
    assert second.state[model.weight]["exp_avg"].dtype == torch.float32
    with pytest.raises(InputError, match=r"of other parameters than the run's \(bias"):
        load_optimizer_state(torch.optim.AdamW([model.weight]), names, optimizer_state(first, names))


@pytest.mark.parametrize(
    "kind", ["linear", "cosine_with_restarts", "reduce_lr_on_plateau", "warmup_stable_decay"]
)
def test_schedules_and_scalers_are_json(tmp_path, kind):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    more = {"num_decay_steps": 3} if kind == "warmup_stable_decay" else {}
    schedules = [get_scheduler(kind, optimiser, 2, 9, scheduler_specific_kwargs=more) for _ in range(2)]
    for _ in range(3):
        optimiser.step()
        schedules[0].step(*([0.5] if kind == "reduce_lr_on_plateau" else []))
    scaler = torch.amp.GradScaler("cpu", init_scale=3.7)
    for state, other in (
        (schedules[0].state_dict(), schedules[1]),
        (scaler.state_dict(), torch.amp.GradScaler("cpu")),
    ):
        write_json(tmp_path / "state.json", split_tree(state, "state")[0])
        other.load_state_dict(join_tree(read_json(tmp_path / "state.json"), {}))
        assert same(other.state_dict(), state)


def test_random_states_come_back(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    write_tensors(tmp_path / "random.safetensors", random_states())

    def draws():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(3).tolist(),  # noqa: NPY002
            torch.randn(3).tolist(),
        )

    before = draws()
    draws()
    set_random_states(read_tensors(tmp_path / "random.safetensors"))
    assert draws() == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "removed": lambda path: path.unlink(),
}
FILES = [
    *("model.safetensors", "config.json", "optimizer.safetensors", "optimizer.json", "scheduler.json"),
    *("random-0.safetensors", "counts.json", "trainer_state.json", "manifest.json", "generation_config.json"),
]


def test_every_file_is_in_the_manifest(whole):
    checkpoint = whole[0] / "checkpoints" / "step-4"
    assert {p.name for p in checkpoint.iterdir()} == set(FILES)
    named = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(named) == set(FILES) - {"manifest.json"}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_checkpoint_before_it_used(run, name, how):
    newest = run / "checkpoints" / "step-4"
    assert newest_checkpoint(run) == newest
    DAMAGE[how](newest / name)
    with pytest.raises(InputError, match=f"damaged: {name} ") as caught:
        check_whole(newest)
    assert caught.value.file == str(newest)
    with pytest.warns(DpoKitWarning, match=rf"step-4 is damaged: {name} .*It is now step-4\.damaged"):
        assert newest_checkpoint(run) == run / "checkpoints" / "step-2"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-2", "step-4.damaged"}


def test_a_run_goes_on_from_before_the_damage_and_ends_bit_equal(run, whole):
    DAMAGE["cut"](run / "checkpoints" / "step-4" / "optimizer.safetensors")
    trainer = make_trainer(run, save_total_limit=1, **SAVING)
    with pytest.warns(DpoKitWarning, match="step-4 is damaged"):
        trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer), whole[1])
    # Set aside is not deleted, and is none of those that count.
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-4", "step-4.damaged"}


@pytest.mark.filterwarnings("ignore:.* is damaged")
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run):
    flip(run / "checkpoints" / "step-2" / "counts.json")
    (run / "checkpoints" / "step-4" / "manifest.json").unlink()
    named = r"step-2\.damaged: counts\.json is not as it was.*step-4\.damaged: manifest\.json is missing"
    for _ in range(2):
        with pytest.raises(InputError, match=named):
            newest_checkpoint(run)
    # Mended by hand.
    flip(run / "checkpoints" / "step-2.damaged" / "counts.json")
    (run / "checkpoints" / "step-2.damaged").rename(run / "checkpoints" / "step-2")
    assert newest_checkpoint(run) == run / "checkpoints" / "step-2"


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "rng_state.pth", "inner/state.PKL"])
def test_a_pickle_in_a_checkpoint_is_refused(run, name):
    newest = run / "checkpoints" / "step-4"
    (newest / name).parent.mkdir(exist_ok=True)
    torch.save({}, newest / name)
    for look in (lambda: newest_checkpoint(run), lambda: check_whole(newest)):
        with pytest.raises(InputError, match=rf"step-4: .* holds pickles \({name}\).*begin the run anew"):
            look()
    assert newest.exists()


def test_a_damaged_checkpoint_that_is_named_is_not_resumed_from(run):
    newest = run / "checkpoints" / "step-4"
    flip(newest / "optimizer.safetensors")
    trainer = make_trainer(run, max_steps=6)
    with pytest.raises(
        InputError, match=r"damaged: optimizer\.safetensors .*--resume takes the newest good one"
    ):
        trainer.train(resume_from_checkpoint=str(newest))
    with pytest.raises(InputError, match="there is no such checkpoint"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoints" / "step-3"))
    assert trainer.state.global_step == 0


def test_what_a_killed_run_was_writing_is_no_checkpoint_and_is_removed(run):
    torn = run / "checkpoints" / ".writing" / "checkpoint-6"
    shutil.copytree(run / "checkpoints" / "step-4", torn)
    assert newest_checkpoint(run) == run / "checkpoints" / "step-4"
    make_trainer(run, max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-2", "step-4", "step-6"}


def test_the_newest_and_the_best_outlive_the_limit(tmp_path):
    for name in ("step-2", "step-4", "step-6", "step-8", "step-10.damaged", "other"):
        (tmp_path / name).mkdir()
    remove_old(tmp_path / "step-6", 3, str(tmp_path / "step-2"))
    # A run that went on from an earlier step has just written step-6.
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-6", "step-8", "step-10.damaged", "other"}
    remove_old(tmp_path / "step-6", 1, None)
    assert {p.name for p in tmp_path.iterdir()} == {"step-6", "step-10.damaged", "other"}


def test_a_checkpoint_without_an_optimiser_says_so(tmp_path):
    make_trainer(tmp_path, save_only_model=True, **SAVING).train()
    trainer = make_trainer(tmp_path, max_steps=6)
    with pytest.warns(DpoKitWarning, match="has no optimiser's state"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_best_checkpoint_is_not_loaded(run):
    trainer = make_trainer(run)
    trainer.state.best_model_checkpoint = str(run / "checkpoints" / "step-2")
    flip(run / "checkpoints" / "step-2" / "model.safetensors")
    before = weights(trainer)
    with pytest.raises(InputError, match=r"step-2: the checkpoint is damaged: model\.safetensors"):
        trainer._load_best_model()
    assert same(weights(trainer), before)


def test_a_file_that_changed_after_it_was_read_is_read_again(run):
    checkpoint = run / "checkpoints" / "step-4"
    assert damage(checkpoint) is None
    flip(checkpoint / "model.safetensors")
    assert damage(checkpoint) == "model.safetensors is not as it was written: its digest differs"
