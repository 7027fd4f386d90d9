"""What the runs of a comparison measured: run folders -> runs.csv and frontier.csv.

Reads what is there; a run that has not finished gives what it measured so far.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_kit.comparison.execute import DIVERGED_FILE, outcome
from dpo_kit.comparison.record import START
from dpo_kit.comparison.runs import Run, runs_of
from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import write_text

FRONTIER_COLUMNS = ("method", "setting", "seed", "step", "reward", "kl", "seconds", "tokens", "run")
RUN_COLUMNS = ("run", "method", "label", "setting", "seed", "outcome", "step", "reward", "kl", "problem")


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
        rows.insert(0, start | {"method": START, "setting": "", "seed": 0, "seconds": 0, "tokens": 0})
    write_table(folder / "frontier.csv", FRONTIER_COLUMNS, rows)


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
    """A csv file with a header; each row is one line, whatever stands in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _on_one_line(value) for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _on_one_line(value: Any) -> Any:
    """Without line ends and other control characters: a bare carriage return splits a row, unquoted."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else " " for c in value).strip()


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, as text; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
