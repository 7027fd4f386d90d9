"""A run that is killed anywhere, as often as you like, ends as one that was not: with the same bits.

Where a run can die and how it is made to is in `kills`.
"""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kills import COMPUTED, KINDS, Death, Ended, differences, draw, kind_of, launch, left, run
from tiny_runs import make_world, recipe_of

Whole = Callable[[str], tuple[Ended, dict[str, Any]]]

# Deaths of the long test by the kind of their place, one after the other; and by the clock.
POINTS = {"plain": 16, "start": 14, "lora": 11, "moving": 10}
BY_THE_CLOCK = 2


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a run of a variant comes to that nobody kills, and what it leaves."""
    found: dict[str, tuple[Ended, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Ended, dict[str, Any]]:
        if name not in found:
            folder = tmp_path_factory.mktemp(f"whole-{name}")
            ended = run(recipe_of(name, world, folder), folder, resume=False)
            assert ended.error is None, ended.error
            found[name] = ended, left(folder)
            assert found[name][1]["unfinished"] == []
        return found[name]

    return get


def killed(content: dict[str, Any], folder: Path, deaths: list[Death]) -> list[Ended]:
    """A run that dies of each of them in turn, and then lives; how each process ended."""
    ends = [run(content, folder, resume=bool(i), death=death) for i, death in enumerate([*deaths, None])]
    for ended in ends:
        assert ended.error is None, ended.error
    assert not ends[-1].killed
    return ends


def compare(folder: Path, expected: dict[str, Any], ends: list[Ended]) -> None:
    """With what the run leaves that nobody killed."""
    found = left(folder)
    unfinished = found.pop("unfinished")
    # What is left there goes when it is a day old; a reference's with `dpo-kit cache prune`.
    assert [p for p in unfinished if not p.startswith(("cache/", "reference/", "run/plots/."))] == []
    saved = "os.rename run/checkpoints/step-"
    lost = len(ends) > 1 and not any(event.startswith(saved) for event in ends[0].events[:-1])
    different = differences({name: value for name, value in expected.items() if name != "unfinished"}, found)
    # Tokens that a reference took are counted from the first checkpoint on.
    assert [line for line in different if not (lost and "/tokens: " in line)] == []


def test_a_run_that_dies_again_and_again_ends_as_one_that_does_not(
    world: Path, whole: Whole, tmp_path: Path
) -> None:
    deaths = [
        Death(4, "rows", torn_at=300),
        Death(5, "tokens"),
        Death(9, "reference", torn_at=16),
        Death(2, "backward"),
        Death(12, "checkpoint", torn_at=2000),
        Death(3, "update"),
        Death(4, "metrics", torn_at=400),
        Death(2, "model"),
        Death(6, "run"),
    ]
    ends = killed(recipe_of("quick", world, tmp_path), tmp_path, deaths)
    assert [ended.killed for ended in ends] == [True] * len(deaths) + [False]
    for ended, death in zip(ends, deaths, strict=False):
        assert death.torn_at is not None or ended.kind == death.kind
    compare(tmp_path, whole("quick")[1], ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_random_deaths(
    name: str, world: Path, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run dies at a place that is drawn, and one of three again in what goes on from there."""
    lived, expected = whole(name)
    generator = random.Random(name)
    kinds = [kind for kind in (*KINDS, *COMPUTED) if kind in set(map(kind_of, lived.events))]
    points = [[draw(lived.events, kinds[i % len(kinds)], generator)] for i in range(POINTS[name])]
    for death in points:
        if generator.random() < 0.35:
            death.append(Death(generator.randrange(len(lived.events)), torn_at=generator.choice([None, 100])))
    points += [[Death(seconds=generator.uniform(0.0, lived.seconds))] for _ in range(BY_THE_CLOCK)]
    counted: Counter[str] = Counter()
    for i, deaths in enumerate(points):
        folder = tmp_path / str(i)
        ends = killed(recipe_of(name, world, folder), folder, deaths)
        assert ends[0].killed or deaths[0].seconds is not None
        for ended, death in zip(ends, deaths, strict=False):
            how = "torn " if death.torn_at is not None else "" if death.seconds is None else "by the clock: "
            # A write that is torn may be the one after the place.
            counted[how + (death.kind or ended.kind)] += ended.killed
        try:
            compare(folder, expected, ends)
        except AssertionError as error:
            raise AssertionError(f"after {deaths}, at {[ended.events[-1:] for ended in ends]}") from error
    assert {name.split(" ")[-1] for name in counted} >= set(kinds), counted
    with capsys.disabled():
        print(f"\n{name}: {counted.total()} deaths, {len(points)} runs bit-equal; {json.dumps(counted)}")


@pytest.mark.slow
def test_two_ranks_of_which_one_dies(world: Path, tmp_path: Path) -> None:
    """The launch does not hang; what goes on ends the same, after a stop by SIGTERM on the way too."""

    def train(folder: Path, death: Death | None = None) -> tuple[int, str]:
        folder.mkdir(exist_ok=True)
        file = tmp_path / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump(recipe_of("quick", world, folder)))
        return launch(["train", str(file), "--resume"], folder, death=death)

    status, said = train(tmp_path / "whole")
    assert status == 0, said[-3000:]
    folder = tmp_path / "killed"
    # In the third of five steps.
    assert train(folder, Death(2, "backward"))[0] != 0
    assert (folder / "run" / "checkpoints" / "step-2").is_dir()
    assert not (folder / "run" / "summary.json").exists()
    status, said = train(folder, Death(0, "backward", signal=signal.SIGTERM, launcher=True))
    assert status != 0
    assert "stopped by SIGTERM after step" in said
    status, said = train(folder)
    assert status == 0, said[-3000:]
    assert "going on from" in said
    different = differences(left(tmp_path / "whole"), left(folder))
    assert "\n".join(line for line in different if "unfinished" not in line) == ""
