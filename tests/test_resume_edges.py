"""Resumes that are not of the plain kind: of a run whose best checkpoint counts, that was moved, counted in
epochs, changed in between, or of checkpoints that are whole and make no sense."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kills import Death, Ended, command, differences, left
from tiny_runs import make_world, recipe_of

from dpo_kit.checkpoint_files import write_manifest

# The loss falls, so that the best is the first that was evaluated.
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "save_total_limit": 1,
}
# After all steps, and before anything of model/ is written.
AT_THE_END = Death(0, "model")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: Path, folder: Path, *more: str, death: Death | None = None, **settings: Any) -> Ended:
    folder.mkdir(exist_ok=True)
    recipe = recipe_of("quick", world, folder)
    recipe["train"] |= settings
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return command(["train", str(file), *more], folder, death=death)


@pytest.fixture(scope="session")
def best(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best") / "run"
    assert train(world, folder, **BEST).status == 0
    return folder


def test_a_run_that_died_after_its_last_step_ends_with_its_best_model(
    best: Path, world: Path, tmp_path: Path
) -> None:
    assert train(world, tmp_path / "run", death=AT_THE_END, **BEST).status == -signal.SIGKILL
    assert train(world, tmp_path / "run", "--resume", **BEST).status == 0
    assert differences(left(best), left(tmp_path / "run")) == []


def test_a_run_that_was_moved_keeps_its_best_checkpoint(best: Path, world: Path, tmp_path: Path) -> None:
    # In step 5, after the checkpoint of step 4.
    assert train(world, tmp_path / "first", death=Death(8, "backward"), **BEST).status == -signal.SIGKILL
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train(world, tmp_path / "moved", "--resume", **BEST).status == 0
    assert differences(left(best)["weights"], left(tmp_path / "moved")["weights"]) == []


def test_a_signal_ends_a_run_that_saves_only_what_is_best(world: Path, tmp_path: Path) -> None:
    settings = BEST | {"save_strategy": "best", "eval_steps": 1}
    ended = train(world, tmp_path / "run", death=Death(4, "backward", signal=signal.SIGTERM), **settings)
    assert ended.status == 143
    assert ended.said.splitlines()[-1].startswith("stopped by SIGTERM after step 3")


def test_what_a_run_of_epochs_measured_at_its_end_is_logged_once(world: Path, tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 1, "batch_size": 11}
    assert train(world, tmp_path / "run", death=AT_THE_END, **epochs).status == -signal.SIGKILL
    assert train(world, tmp_path / "run", "--resume", **epochs).status == 0
    lines = [json.loads(line) for line in (tmp_path / "run/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_reply_tokens" in line] == [0, 4]


@pytest.fixture(scope="session")
def died(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in step 5; its newest checkpoint is of step 4."""
    folder = tmp_path_factory.mktemp("died") / "run"
    assert train(world, folder, death=Death(8, "backward")).status == -signal.SIGKILL
    return folder


def copied(died: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(died, folder)
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(died), str(folder)))
    return folder


@pytest.mark.parametrize("setting", [{"weight_decay": 0.5}, {"adam_beta1": 0.5}])
def test_what_the_optimisers_state_would_override_cannot_be_changed(
    setting: dict[str, float], died: Path, world: Path, tmp_path: Path
) -> None:
    ended = train(world, copied(died, tmp_path), "--resume", **setting)
    assert ended.status == 2
    assert f"field 'train.{next(iter(setting))}': the run was started with" in ended.said


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("counts.json", lambda held: held | {"tokens": "many"}),
        ("counts.json", lambda held: held | {"foreign": 1}),
        ("counts.json", lambda held: [held]),
        ("trainer_state.json", lambda held: held | {"global_step": "x"}),
        ("trainer_state.json", lambda held: None),
        ("optimizer.json", lambda held: {}),
        ("optimizer.json", lambda held: held | {"state": {"a": {"$tensor": "none"}}}),
        ("scheduler.json", lambda held: {"last_epoch": "x"}),
    ],
)
def test_a_checkpoint_that_is_whole_and_makes_no_sense_is_named(
    name: str, change: Callable[[Any], Any], died: Path, world: Path, tmp_path: Path
) -> None:
    folder = copied(died, tmp_path)
    checkpoint = folder / "run/checkpoints/step-4"
    content = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps(change(content)))
    write_manifest(checkpoint)
    ended = train(world, folder, "--resume")
    assert ended.status == 2
    assert f"error: {checkpoint}: the checkpoint cannot be read" in ended.said


def test_a_run_folder_that_a_dead_machine_left_torn_is_resumed(
    died: Path, world: Path, tmp_path: Path
) -> None:
    folder = copied(died, tmp_path)
    (folder / "run/model").mkdir()
    (folder / "run/summary.json").write_text("")
    with open(folder / "run/metrics.jsonl", "ab") as file:
        file.write(b'5\n\xff\xfe\n{"step": "x"}\n\0\0\0')
    assert train(world, folder, "--resume").status == 0
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_steps_left_out_in_a_row_are_counted_over_a_resume(world: Path, tmp_path: Path) -> None:
    # After a first step of that size no gradient is finite.
    wild = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    settings = wild | {"on_nonfinite": "skip", "max_nonfinite": 3}
    for more in [(), ("--resume",)]:
        ended = train(world, tmp_path / "run", *more, **settings)
        assert ended.status == 1
        assert "not finite at step 5, and 3 steps before it were left out already" in ended.said
