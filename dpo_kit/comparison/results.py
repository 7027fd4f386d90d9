"""What the runs of a comparison measured: run folders -> runs.csv and frontier.csv, and back from there.

Reads what is there; a run that has not finished gives what it measured so far.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.comparison.execute import DIVERGED_FILE, outcome
from dpo_kit.comparison.runs import Run, runs_of
from dpo_kit.errors import InputError
from dpo_kit.measurement import evaluation_file
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import write_text

FRONTIER_COLUMNS = ("method", "setting", "seed", "step", "reward", "kl", "seconds", "tokens", "run")
RUN_COLUMNS = ("run", "method", "label", "setting", "seed", "outcome", "step", "reward", "kl", "problem")


# The policy that all methods start from, as a method of its own.
SFT = "sft"


@dataclass(frozen=True)
class Replies:
    """What a policy wrote on the held-out prompts, in their order.

    Attributes:
        prompts: one for each reply.
        texts: the replies.
        rewards: [R] float64, true rewards.
        kls: [R] float64, sequence KLs to the SFT policy, nats.
    """

    prompts: list[Any]
    texts: list[str]
    rewards: np.ndarray
    kls: np.ndarray


@dataclass(frozen=True)
class FrontierPoint:
    """A line of frontier.csv: a policy of a run, and what it is worth.

    Attributes:
        method: its key in the recipe, or "sft".
        label: of the method, for people.
        setting: what is swept.
        seed: of the run.
        step: optimiser steps done; N for Best-of-N.
        reward: mean true reward.
        kl: mean sequence KL to the SFT policy, nats.
        seconds: of training until there.
        tokens: computed until there.
        run: the name of its run.
        folder: of the run.
    """

    method: str
    label: str
    setting: str
    seed: int
    step: int
    reward: float
    kl: float
    seconds: float
    tokens: float
    run: str
    folder: Path

    @cached_property
    def replies(self) -> Replies:
        """Its replies, read when they are asked for.

        Raises:
            InputError: the run's folder does not hold them, or a line of theirs is broken.
        """
        return _read_replies(evaluation_file(self.folder, self.step), self.kl)


def comparison_in(folder: Path) -> tuple[Recipe, list[Run]]:
    """The recipe of a comparison's folder, and its runs.

    Raises:
        InputError: the folder holds none.
    """
    place = folder / "recipe.yaml"
    recipe = Recipe.load(place) if place.exists() else None
    if recipe is None or recipe.frontier is None:
        raise InputError("there is no comparison here", file=folder, mend="Give what dpo-kit frontier wrote.")
    return recipe, runs_of(recipe, folder)


def write_frontier(folder: Path, runs: Sequence[Run]) -> None:
    """frontier.csv: the SFT policy, then every measurement of every run, in the recipe's order."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        for line in measurements(run.folder):
            setting = f"n={line['step']}" if run.command == "best_of_n" else run.setting
            rows.append(
                {"method": run.method, "setting": setting, "seed": run.seed, "step": line["step"]}
                | {name: line[f"eval_{name}"] for name in ("reward", "kl")}
                | {name: line.get(name, "") for name in ("seconds", "tokens")}
                | {"run": run.name}
            )
    start = next((row for row in rows if row["step"] == 0), None)
    if start is not None:
        rows.insert(0, start | {"method": SFT, "setting": "", "seed": 0, "seconds": 0, "tokens": 0})
    write_table(folder / "frontier.csv", FRONTIER_COLUMNS, rows)


def read_frontier(folder: Path) -> list[FrontierPoint]:
    """The lines of frontier.csv, in their order.

    Raises:
        InputError: the folder holds no comparison.
    """
    recipe, _ = comparison_in(folder)
    assert recipe.frontier is not None
    labels = {SFT: "SFT"} | {name: section.label for name, section in recipe.frontier.methods.items()}
    return [
        FrontierPoint(
            method=row["method"],
            label=labels.get(row["method"], row["method"]),
            setting=row["setting"],
            seed=int(row["seed"]),
            step=int(row["step"]),
            reward=float(row["reward"]),
            kl=float(row["kl"]),
            seconds=float(row["seconds"] or "nan"),
            tokens=float(row["tokens"] or "nan"),
            run=row["run"],
            folder=folder / "runs" / row["run"],
        )
        for row in read_table(folder / "frontier.csv")
    ]


def measurements(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl with a reward and a KL, one a step, in order of the steps.

    Of a step that was measured twice, before and after a resume, the later line holds; a line that was cut
    when the run died is none.
    """
    place = folder / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for text in place.read_text(encoding="utf-8").split("\n") if place.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and all(line.get(key) is not None for key in ("eval_reward", "eval_kl")):
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def write_runs(folder: Path, runs: Sequence[Run], failures: Mapping[str, str]) -> None:
    """runs.csv: how each run ended, and its last measurement.

    Args:
        folder: of the comparison.
        runs: all of them.
        failures: run -> what was wrong; of those that failed now.
    """
    rows = []
    for run in runs:
        how, problem = outcome(run), failures.get(run.name, "")
        if how == "diverged":
            problem = json.loads((run.folder / DIVERGED_FILE).read_text())["problem"]
        last = (measurements(run.folder) or [{}])[-1]
        rows.append(
            {"run": run.name, "method": run.method, "label": run.label, "setting": run.setting}
            | {"seed": run.seed, "outcome": how or ("failed" if problem else "unfinished")}
            | {"step": last.get("step", ""), "reward": last.get("eval_reward", "")}
            | {"kl": last.get("eval_kl", ""), "problem": problem}
        )
    write_table(folder / "runs.csv", RUN_COLUMNS, rows)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A csv file with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, as text; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _read_replies(path: Path, kl: float) -> Replies:
    """Replies of an evaluation; `kl` stands in for those that have none of their own."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        columns = [[line[key] for line in lines] for key in ("prompt", "reply", "reward")]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"the replies cannot be read: {error}", file=path, mend="Run it again.") from error
    prompts, texts, rewards = columns
    kls = [kl if line.get("kl") is None else line["kl"] for line in lines]
    return Replies(prompts, texts, _array(rewards), _array(kls))


def _array(column: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in column], dtype=np.float64)
