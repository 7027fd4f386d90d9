"""What is in a comparison's folder, for its tables, its pictures and its page; an unfinished one has less.

Reads files; what a comparison's figures mean stands elsewhere.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.errors import InputError
from dpo_kit.json_lines import read_lines
from dpo_kit.yaml_file import parse_yaml

# What the SFT policy is called among the methods.
START = "sft"


@dataclass(frozen=True)
class Point:
    """One evaluation: a line of frontier.csv.

    Attributes:
        method: its key in the recipe, or `START`.
        setting: what is swept.
        seed: of the run.
        step: optimiser steps done; N for Best-of-N.
        reward: mean true reward of the replies.
        kl: mean sequence KL to the SFT policy, nats.
        seconds: of training so far.
        tokens: computed so far.
        run: the name of its run.
    """

    method: str
    setting: str
    seed: str
    step: int
    reward: float
    kl: float
    seconds: float
    tokens: float
    run: str

    @property
    def finite(self) -> bool:
        return math.isfinite(self.reward) and math.isfinite(self.kl)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Level:
    """A method's reward at a KL: a line of matched.csv.

    `below` is how far it lies below the reward of `Record.base` there; None for the base itself, and where
    the base does not reach the KL.
    """

    method: str
    kl: float
    reward: Interval
    below: Interval | None


@dataclass(frozen=True)
class Record:
    """A comparison's folder. Methods go by their keys in the recipe, and in the recipe's order.

    Raises:
        InputError: on reading, where a file in it is broken.
    """

    folder: Path

    @cached_property
    def recipe_text(self) -> str:
        path = self.folder / "recipe.yaml"
        if not path.exists():
            mend = "Give what dpo-kit frontier wrote."
            raise InputError("there is no comparison here", file=self.folder, mend=mend)
        return path.read_text(encoding="utf-8")

    @cached_property
    def section(self) -> dict[str, Any]:
        """`frontier` of the resolved recipe."""
        found = (parse_yaml(self.recipe_text, self.folder / "recipe.yaml") or {}).get("frontier")
        if not found:
            raise InputError("no comparison's recipe", file=self.folder / "recipe.yaml", field="frontier")
        return dict(found)

    @cached_property
    def points(self) -> list[Point]:
        """Every evaluation of every method, the SFT policy's first."""
        path = self.folder / "frontier.csv"
        return [
            Point(
                method=row["method"],
                setting=row["setting"],
                seed=row["seed"],
                step=int(row["step"]),
                reward=_number(row, "reward", path, line),
                kl=_number(row, "kl", path, line),
                seconds=_number(row, "seconds", path, line),
                tokens=_number(row, "tokens", path, line),
                run=row["run"],
            )
            for line, row in _rows(path)
        ]

    @cached_property
    def start(self) -> Point | None:
        """The SFT policy."""
        return next((p for p in self.points if p.method == START and p.finite), None)

    @cached_property
    def methods(self) -> list[str]:
        """Those that have been measured."""
        there = {point.method for point in self.points}
        return [method for method in self.section["methods"] if method in there]

    @property
    def base(self) -> str:
        """What the others are compared with: `dpo`, or the recipe's first method."""
        return "dpo" if "dpo" in self.section["methods"] else next(iter(self.section["methods"]))

    def of(self, method: str) -> list[Point]:
        return [point for point in self.points if point.method == method]

    def runs_of(self, method: str) -> dict[str, list[Point]]:
        """The evaluations of each of a method's runs, in the order of steps."""
        runs: dict[str, list[Point]] = {}
        for point in self.of(method):
            runs.setdefault(point.run, []).append(point)
        return {name: sorted(points, key=lambda point: point.step) for name, points in runs.items()}

    def label(self, method: str) -> str:
        return "SFT policy" if method == START else str(self.section["methods"][method]["label"])

    def is_best_of_n(self, method: str) -> bool:
        return method != START and self._command(method) == "best_of_n"

    def with_rl(self, method: str) -> bool:
        return self._command(method) in ("ppo", "rloo")

    def _command(self, method: str) -> str:
        return str(self.section["methods"][method].get("command", "train"))

    @property
    def levels(self) -> list[float]:
        """The KLs, in nats, at which rewards are compared."""
        return sorted(map(float, self.section["kl_levels"]))

    def matched(self, level: float) -> dict[str, Level]:
        """The reward of each method that reaches a KL."""
        return {row.method: row for row in self._matched if row.kl == level}

    @cached_property
    def _matched(self) -> list[Level]:
        path = self.folder / "matched.csv"
        found = []
        for line, row in _rows(path):
            reward = _interval(row, ("reward", "low", "high"), path, line)
            names = "difference", "difference_low", "difference_high"
            if reward is not None:
                below = _interval(row, names, path, line)
                found.append(Level(row["method"], _number(row, "kl", path, line), reward, below))
        return found

    @cached_property
    def costs(self) -> list[dict[str, str]]:
        """Lines of costs.csv, as they are written."""
        return [row for _, row in _rows(self.folder / "costs.csv")]

    @cached_property
    def runs(self) -> list[dict[str, str]]:
        """Lines of runs.csv, as they are written."""
        return [row for _, row in _rows(self.folder / "runs.csv")]

    def replies(self, point: Point) -> list[dict[str, Any]]:
        """What was measured at an evaluation, a dictionary a reply; nothing where it was not kept."""
        path = self._place(point)
        if not path.exists():
            return []
        try:
            return read_lines(path)
        except ValueError as error:
            raise InputError(f"not JSON lines ({error})", file=path, mend="Run it again.") from error

    def rewards(self, point: Point) -> dict[str, float]:
        """Prompt (as JSON) -> mean reward of the replies to it, in the order of the prompts."""
        place = self._place(point)
        if place not in self._rewards:
            self._rewards[place] = self._read_rewards(point)
        return self._rewards[place]

    @cached_property
    def _rewards(self) -> dict[Path, dict[str, float]]:
        """What `rewards` has read: tables and pictures ask for the same many times."""
        return {}

    def _read_rewards(self, point: Point) -> dict[str, float]:
        by_prompt: dict[str, list[float]] = {}
        for reply in self.replies(point):
            by_prompt.setdefault(json.dumps(reply["prompt"]), []).append(reply["reward"])
        return {prompt: sum(rewards) / len(rewards) for prompt, rewards in by_prompt.items()}

    def gain(self, point: Point) -> tuple[float, float]:
        """How much better an evaluation is than the SFT policy, prompt by prompt: mean and standard error."""
        before = self.rewards(self.start) if self.start else {}
        return _mean_and_error([value - before[p] for p, value in self.rewards(point).items() if p in before])

    def standard_error(self, point: Point) -> float:
        """Of an evaluation's reward, over prompts; NaN for fewer than two."""
        return _mean_and_error(list(self.rewards(point).values()))[1]

    def nearest(self, points: Iterable[Point], kl: float) -> Point | None:
        """The evaluation whose KL is closest to one, of trained policies whose replies were kept."""
        there = [p for p in points if p.step > 0 and p.finite and self._place(p).exists()]
        return min(there, key=lambda point: abs(point.kl - kl), default=None)

    def _place(self, point: Point) -> Path:
        return self.folder / "runs" / point.run / "evaluations" / f"step-{point.step}.jsonl"


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """NaN where there are too few."""
    mean = float(np.mean(values)) if values else math.nan
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return mean, error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a CSV file with their numbers; none where there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            run = row.get("run") or ""
            if run in (".", "..") or "/" in run or "\0" in run:
                raise InputError("a run's name is no path", file=path, line=line, field="run")
            yield line, row


def _number(row: dict[str, str], field: str, path: Path, line: int) -> float:
    """A number; NaN where nothing is written."""
    try:
        return float(row[field] or "nan")
    except ValueError as error:
        raise InputError(f"not a number: {row[field]!r}", file=path, line=line, field=field) from error


def _interval(row: dict[str, str], names: tuple[str, str, str], path: Path, line: int) -> Interval | None:
    """None where the columns are not there or empty."""
    if not all(row.get(name) for name in names):
        return None
    return Interval(*(_number(row, name, path, line) for name in names))
