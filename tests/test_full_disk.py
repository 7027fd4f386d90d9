"""A full disk stops what writes, with the place named, and what was whole before stays whole.

The disk is a small tmpfs, which only root may mount; elsewhere these tests are skipped.
"""

import contextlib
import json
import os
import subprocess

import pytest
import test_cli
import torch
from families import make_model
from test_cli import run, write_rows
from test_trainer import make_dataset, make_trainer
from transformers import TrainerCallback

import dpo_kit.report
from dpo_kit.checkpoint_folders import newest_checkpoint
from dpo_kit.errors import InputError, TrainingError
from dpo_kit.pairs import arrow_rows, row_cache
from dpo_kit.trainer import PreferenceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

model_folder, recipe = test_cli.model_folder, test_cli.recipe

SIZE = 4 << 20
SAVING = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}


class Disk:
    """A file system of 4 MiB."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self, leaving=0):
        """Leave only so many bytes free."""
        ballast = os.open(self.folder / "ballast", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(ballast, bytes(4096))
        os.ftruncate(ballast, max(0, os.fstat(ballast).st_size - leaving))
        os.close(ballast)

    def free(self):
        (self.folder / "ballast").unlink()

    def left(self):
        """Names of what lies there, but for the ballast."""
        return {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.name != "ballast"}


def mount_disk(folder):
    """Mount one there; why that cannot be done, or None."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        folder.rmdir()
    return mounted.stderr.strip() if mounted.returncode else None


def unmount(folder):
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    if problem := mount_disk(folder):
        pytest.skip(f"cannot mount a tmpfs: {problem}")
    yield Disk(folder)
    unmount(folder)


class FillAt(TrainerCallback):
    """Fills a disk at the end of a step."""

    def __init__(self, disk, step, leaving):
        self.disk, self.step, self.leaving = disk, step, leaving

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.disk.fill(self.leaving)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("uninterrupted"), **SAVING)
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


# A checkpoint has some 270 kB: it ends in its first file, its weights, its optimiser, its last files.
@pytest.mark.parametrize("leaving", [0, 40_000, 120_000, 240_000, 262_000])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it(disk, uninterrupted, leaving):
    trainer = make_trainer(disk.folder, **SAVING)
    trainer.add_callback(FillAt(disk, 3, leaving))
    message = (
        r"disk/checkpoints: the checkpoint of step 4 could not be written: No space left on device "
        r"\([\d.]+ of 4\.2 MB are free there\); step-2, the newest one, is kept\. Mend that"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert {name for name in disk.left() if name.count("/") == 1} == {"checkpoints/step-2"}
    assert newest_checkpoint(disk.folder).name == "step-2"
    disk.free()
    resumed = make_trainer(disk.folder, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, resumed.model.parameters(), uninterrupted))


def test_a_first_checkpoint_that_finds_no_room_says_that_there_is_none(disk):
    disk.fill(4096 * 5)
    with pytest.raises(TrainingError, match=r"step 2 could not be written: .*; there is none before it"):
        make_trainer(disk.folder, **SAVING).train()


def test_metrics_that_find_no_room_stop_the_run(disk):
    trainer = make_trainer(disk.folder, max_steps=40, **SAVING | {"logging_steps": 1, "save_steps": 3})
    trainer.add_callback(FillAt(disk, 4, 0))
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: the metrics cannot be written: No space left"):
        trainer.train()
    disk.free()
    assert newest_checkpoint(disk.folder).name == "step-3"
    resumed = make_trainer(disk.folder, max_steps=6, **SAVING | {"logging_steps": 1, "save_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    lines = (disk.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_shard_of_the_reference_that_finds_no_room_is_not_left_in_part(disk, tmp_path):
    disk.fill(4096 * 3)
    settings = {
        "reference_cache_dir": str(disk.folder / "cache"),
        "dataset": make_dataset(400),
        "max_steps": 100,
    }
    trainer = make_trainer(tmp_path / "run", ref_model=make_model("llama", seed=9), **settings)
    with pytest.raises(
        InputError, match=r"cannot be kept in .*disk/cache.*: No space left.*dpo-kit cache prune"
    ):
        trainer.fill_reference()
    assert not [name for name in disk.left() if name.endswith((".safetensors", ".writing"))]
    disk.free()
    trainer.fill_reference()
    assert trainer.filled.computed > 700


@pytest.mark.parametrize("cache", ["rows", "token"])
def test_a_cache_that_finds_no_room_is_not_left_in_part(disk, recipe, tmp_path, capfd, monkeypatch, cache):
    monkeypatch.setattr(arrow_rows, "_BATCH_ROWS", 100)
    monkeypatch.setattr(row_cache, "BATCHES_IN_MEMORY", 1)
    rows = [{"prompt": f"Film {i}:", "chosen": " good" * 9, "rejected": " bad" * 9} for i in range(2000)]
    many = write_rows(tmp_path / "many.jsonl", rows)
    settings = [f"data.train={many}", "data.eval=[]", "train.max_steps=1", "report.enabled=false"]
    settings.append(f"reference.cache_dir={tmp_path / 'reference'}")
    if cache == "rows":
        monkeypatch.setenv("DPO_KIT_CACHE", str(disk.folder))
    else:
        settings.append(f"data.cache_dir={disk.folder}")
    disk.fill(4096 * 6)
    assert run("train", recipe, *settings) == 1
    said = capfd.readouterr().err
    assert f"error: {disk.folder}" in said
    assert (
        f"the {'cache of rows' if cache == 'rows' else 'token cache'} cannot be written: No space left"
        in said
    )
    assert "set DPO_KIT_CACHE to another folder" in said
    assert "Traceback" not in said
    assert not [name for name in disk.left() if not (disk.folder / name).is_dir()]
    disk.free()
    assert run("train", recipe, *settings) == 0


@pytest.mark.parametrize("what", ["model", "report"])
def test_the_end_of_a_run_that_finds_no_room_can_be_made_up_for(disk, recipe, capfd, monkeypatch, what):
    """Filled in the moment before it is written; a resume goes on from the last checkpoint."""
    place, name = {
        "model": (PreferenceTrainer, "save_model"),
        "report": (dpo_kit.report, "write_report"),
    }[what]
    original = getattr(place, name)

    def write(*given, **keywords):
        if not keywords.get("_internal_call"):
            disk.fill(8192)
        return original(*given, **keywords)

    folder = disk.folder / "run"
    settings = [f"train.output_dir={folder}", "train.max_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, write)
        assert run("train", recipe, *settings) == 1
    said = capfd.readouterr().err
    shown = {"model": f"{folder / 'model'}: the model", "report": f"{folder / 'report.html'}: the report"}
    assert f"error: {shown[what]} cannot be written: No space left on device" in said
    assert "Traceback" not in said
    assert not [name for name in disk.left() if "writing" in name or name.endswith(".tmp")]
    assert newest_checkpoint(folder).name == "step-2"
    assert (folder / "summary.json").exists() == (what == "report")
    disk.free()
    assert run("train", recipe, "--resume", *settings) == 0
    assert (folder / "model" / "model.safetensors").exists()
    assert (folder / "report.html").exists()
