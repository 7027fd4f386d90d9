"""Checkpoints of several ranks: sharded (FSDP2) or not, each is resumed by any number, sharded or not.

The file is its own script, as test_ranks.py: started by torch.distributed.run it runs every case on two ranks
(gloo, CPU), beside what one process has left, and the tests compare.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from test_full_disk import Disk, mount_disk, unmount
from test_trainer import make_dataset, make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from dpo_kit import ranks
from dpo_kit.checkpoint_files import optimizer_state, parameter_names, split_tree
from dpo_kit.checkpoint_folders import newest_checkpoint
from dpo_kit.checkpoint_states import load_optimizer
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore::FutureWarning"),
]

STEPS, AT = 4, 2
# By name: whether the policy is sharded, whether it has an adapter, and whose checkpoint it goes on from.
CASES = {
    "ddp": (False, False, None),
    "ddp again": (False, False, "ddp"),
    "ddp from one": (False, False, "one"),
    "shards": (True, False, None),
    "shards again": (True, False, "shards"),
    "shards from one": (True, False, "one"),
    "shards from ddp": (True, False, "ddp"),
    "lora shards": (True, True, None),
    "lora shards again": (True, True, "lora shards"),
    "lora shards from one": (True, True, "lora one"),
}
ALONE = {
    "one": (False, False, None),
    "lora one": (False, True, None),
    "one from ddp": (False, False, "ddp"),
    "one from shards": (False, False, "shards"),
    "lora one from shards": (False, True, "lora shards"),
}


def trainer_of(name, folder, **settings):
    sharded, lora, _ = (CASES | ALONE)[name]
    model = make_model("llama")
    if lora:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    settings = {
        "batch_size": 8,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": AT,
        "use_cpu": True,
        "reference_cache_dir": str(folder / "cache"),
        "fsdp": sharded,
    } | settings
    dataset = make_dataset(24, weight=[1.0, 2.0, 0.5] * 8)
    reference = make_model("llama", seed=9)
    return make_trainer(folder / name, model=model, ref_model=reference, dataset=dataset, **settings)


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def state_of(trainer):
    """All of the weights that are trained, and of the optimiser's state, by name."""
    names = parameter_names(trainer.model)
    state = {f"weights/{name}": whole(p) for p, name in names.items() if p.requires_grad}
    _, tensors = split_tree(optimizer_state(trainer.optimizer, names), "optimizer")
    return state | {name: whole(value) for name, value in tensors.items()}


def run_case(name, folder):
    """Train to the end, from a checkpoint or not; leave the state, and what was said."""
    source = (CASES | ALONE)[name][2]
    trainer = trainer_of(name, folder)
    checkpoint = source and str(folder / source / "checkpoints" / f"step-{AT}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / name / "model"))
    state = state_of(trainer)
    rank = ranks.rank()
    save_file(state, folder / name / f"state-{rank}.safetensors")
    seen = {
        "said": [str(w.message) for w in said if issubclass(w.category, DpoKitWarning)],
        "random": torch.rand(1).item(),
        "steps": [line["step"] for line in trainer.state.log_history if "loss" in line],
        "pairs": ranks.gather(trainer._counts.pairs),
    }
    (folder / name / f"seen-{rank}.json").write_text(json.dumps(seen))


class FillBeforeSaving(TrainerCallback):
    def __init__(self, disk, leaving):
        self.disk, self.leaving = disk, leaving

    def on_step_end(self, args, state, control, **_):
        if state.global_step == STEPS and ranks.is_first():
            self.disk.fill(self.leaving)
        ranks.wait()


def refused_cases(folder):
    """What all ranks must be told alike: a damaged shard, and a disk without room for one."""
    said = {}
    run = folder / "damaged"
    if ranks.is_first():
        shutil.copytree(folder / "shards", run)
        shard = max((run / "checkpoints" / f"step-{STEPS}" / "sharded-model").iterdir())
        shard.write_bytes(shard.read_bytes()[:-1])
    ranks.wait()
    try:
        trainer_of("shards", folder / "other").train(str(run / "checkpoints" / f"step-{STEPS}"))
    except InputError as error:
        said["explicit"] = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said["newest"] = str(newest_checkpoint(run))
    cache = str(folder / "cache")
    if (folder / "disk").is_dir():
        for leaving in (0, 50_000, 110_000, 200_000):
            disk = Disk(folder / "disk")
            trainer = trainer_of("shards", disk.folder, logging_steps=100, reference_cache_dir=cache)
            trainer.add_callback(FillBeforeSaving(disk, leaving))
            try:
                trainer.train()
            except TrainingError as error:
                said[f"full {leaving}"] = str(error)
            ranks.wait()
            if ranks.is_first():
                disk.free()
                said[f"left {leaving}"] = sorted(
                    str(p.name) for p in (disk.folder / "shards/checkpoints").iterdir()
                )
                shutil.rmtree(disk.folder / "shards")
            ranks.wait()
    (folder / f"refused-{ranks.rank()}.json").write_text(json.dumps(said))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folder of all cases: first one process, then two ranks, then one process from what these left."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("one", "lora one"):
        run_case(name, folder)
    mounted = mount_disk(folder / "disk") is None
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(__file__, str(folder)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if mounted:
        unmount(folder / "disk")
    assert done.returncode == 0, done.stderr[-8000:]
    for name in ("one from ddp", "one from shards", "lora one from shards"):
        run_case(name, folder)
    return folder


def left(folder, rank=0):
    return load_file(folder / f"state-{rank}.safetensors"), json.loads(
        (folder / f"seen-{rank}.json").read_text()
    )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["ddp", "shards", "lora shards"])
def test_as_many_ranks_go_on_bit_for_bit(runs, name):
    for rank in (0, 1):
        (state, seen), (resumed, after) = left(runs / name, rank), left(runs / f"{name} again", rank)
        assert any(key.startswith("optimizer/state") for key in state)
        assert same(state, resumed)
        assert after["said"] == []
        assert after["random"] == seen["random"]


@pytest.mark.parametrize("name", [name for name in CASES | ALONE if " from " in name])
def test_another_number_of_ranks_goes_on_to_the_same_end(runs, name):
    source = "lora one" if "lora" in name else "one"
    state, seen = left(runs / name)
    expected, _ = left(runs / source)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], rtol=2e-3, atol=2e-6, msg=key)
    assert seen["steps"] == [1, 2, 3, 4]
    assert sum(seen["pairs"]) == 8 * STEPS
    assert json.loads((runs / name / "checkpoints/step-4/counts.json").read_text())["pairs"] == 8 * STEPS
    more = not name.startswith(("one", "lora one")) and "one" in name
    assert ["random states of the others are drawn anew" in line for line in seen["said"]] == [True] * more


@pytest.mark.parametrize("name", ["ddp", "shards", "lora shards"])
def test_one_process_reads_what_ranks_wrote_bit_for_bit(runs, name):
    state, _ = left(runs / name)
    trainer = trainer_of("lora one" if "lora" in name else "one", runs / "read")
    trainer.create_optimizer_and_scheduler(STEPS)
    checkpoint = runs / name / "checkpoints" / f"step-{STEPS}"
    trainer._load_from_checkpoint(str(checkpoint))
    load_optimizer(trainer, checkpoint)
    assert same(state_of(trainer), state)


def test_a_sharded_checkpoint_has_a_file_of_each_rank_and_no_pickle(runs):
    checkpoint = runs / "shards" / "checkpoints" / "step-4"
    sizes = {}
    for part in ("sharded-model", "sharded-optimizer"):
        files = sorted((checkpoint / part).iterdir())
        assert [path.suffix for path in files] == [".safetensors"] * 2
        sizes[part] = [path.stat().st_size for path in files]
        assert min(sizes[part]) > 0.7 * max(sizes[part])
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "random-1.safetensors").exists()
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    named = set(json.loads((checkpoint / "manifest.json").read_text())["files"])
    written = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert named == written - {"manifest.json"}


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_the_model_in_the_end_is_whole(runs, name):
    folder = runs / name / "model"
    assert not [p.name for p in folder.iterdir() if p.suffix not in (".json", ".safetensors")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    state, _ = left(runs / name)
    for key, value in model.named_parameters():
        assert torch.equal(value, state[f"weights/{key}"])
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_an_adapter_on_a_sharded_model_is_written_alone(runs):
    for folder in (runs / "lora shards" / "model", runs / "lora shards" / "checkpoints" / "step-4"):
        assert not [p for p in folder.rglob("*") if p.name.startswith("model")]
        assert not (folder / "sharded-model").exists()
        tensors = load_file(folder / "adapter_model.safetensors")
        state, _ = left(runs / "lora shards")
        trained = {key.removeprefix("weights/").replace(".default", "") for key in state if "weights/" in key}
        assert set(tensors) == trained
        key = next(iter(tensors))
        place, kind = key.rsplit(".", 1)
        assert torch.equal(tensors[key], state[f"weights/{place}.default.{kind}"])


def test_all_ranks_are_told_of_damage_and_of_a_full_disk(runs):
    first, second = (json.loads((runs / f"refused-{rank}.json").read_text()) for rank in (0, 1))
    assert "step-4: the checkpoint is damaged: sharded-model/shard-00002" in first["explicit"]
    assert first["newest"] == str(runs / "damaged" / "checkpoints" / "step-2")
    full = [name for name in first if name.startswith("full")]
    if (runs / "disk").is_dir():
        assert len(full) == 4
    for name in full:
        assert "the checkpoint of step 4 could not be written: No space left on device" in first[name]
        assert "step-2, the newest one, is kept" in first[name]
        assert first[name.replace("full", "left")] == ["step-2"]
    assert {name: first[name] for name in second} == second


if __name__ == "__main__":
    for case in CASES:
        run_case(case, Path(sys.argv[1]))
    refused_cases(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
