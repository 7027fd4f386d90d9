"""A run that is asked to end saves and leaves; one that another process carries out is left alone.

Signals come at chosen events of a run (see `kills`): a process sends them to itself.
"""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from kills import Death, Ended, command, differences, left
from tiny_runs import make_world, recipe_of

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: Path, folder: Path, *more: str, death: Death | None = None) -> Ended:
    folder.mkdir(exist_ok=True)
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(recipe_of("quick", world, folder)))
    return command(["train", str(file), *more], folder, death=death)


@pytest.fixture(scope="session")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that is let alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(world, folder).status == 0
    return left(folder)


def last_line(ended: Ended) -> str:
    assert "Traceback" not in ended.said
    return ended.said.splitlines()[-1]


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", NAMES)
@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_in_training_saves_and_leaves_and_a_resume_ends_the_same(
    step: int, number: signal.Signals, world: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Of two micro-batches a step. A checkpoint and an evaluation are due every second step.
    ended = train(world, folder, death=Death(2 * step - 1, "backward", signal=number))
    assert ended.status == 128 + number
    assert last_line(ended).startswith(
        f"stopped by {NAMES[number]} after step {step}; its checkpoint is saved"
    )
    saved = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert saved == ["step-2", f"step-{step}"]
    assert not (folder / "run" / "summary.json").exists()

    resumed = train(world, folder, "--resume")
    assert resumed.status == 0
    assert "going on from" in resumed.said
    found = left(folder)
    # Those of the steps that were saved at the end, of two that are kept.
    assert found["checkpoints"] == expected["checkpoints"] == ["step-4", "step-5"]
    assert differences(expected, found) == []


def test_a_second_one_ends_it_at_once(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = train(world, folder, death=Death(4, "backward", signal=signal.SIGINT, times=2))
    assert ended.status == 130
    assert last_line(ended).startswith("interrupted")
    assert max(logged(folder)) == 2
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize(("kind", "place"), [("tokens", 4), ("reference", 8), ("rows", 4), ("samples", 1)])
def test_a_signal_before_training_leaves_at_once_and_damages_nothing(
    kind: str, place: int, world: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    number = signal.SIGTERM if kind in ("tokens", "reference") else signal.SIGINT
    ended = train(world, folder, death=Death(place, kind, signal=number))
    assert ended.status == 128 + number
    assert last_line(ended).startswith(("terminated", "interrupted"))
    resumed = train(world, folder, "--resume")
    assert resumed.status == 0
    assert "damaged" not in resumed.said
    found = left(folder)
    found.pop("unfinished")
    # What the reference took before is in no checkpoint.
    different = [
        line for line in differences(expected, {"unfinished": [], **found}) if "/tokens:" not in line
    ]
    assert different == []


def test_two_runs_in_one_folder_are_one_too_many(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "recipe.yaml").write_text("{}")
    with open(folder / "run" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = train(world, folder)
    assert ended.status == 2
    assert "another process is carrying out the run in this folder" in last_line(ended)
    assert "train.output_dir" in last_line(ended)
    # A process that dies lets go of it.
    assert train(world, folder, death=Death(3, "backward")).status == -signal.SIGKILL
    assert train(world, folder, "--resume").status == 0
