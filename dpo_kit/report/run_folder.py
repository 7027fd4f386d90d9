"""Read a run folder: recipe, environment, metrics, summary and samples.

A run that was stopped may lack its summary, and its last line may be cut: both become a note. Lines that
a resumed run has logged again replace those of the run it resumed, which is noted too. Anything else that
cannot be read is an InputError. Knows nothing of what the figures mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.errors import InputError
from dpo_kit.yaml_file import parse_yaml

# What TRL's PPO calls a metric that goes by the name on the left elsewhere.
_OTHER_NAMES = {"learning_rate": "lr", "kl_coef": "objective/kl_coef"}


@dataclass(frozen=True)
class Row:
    """One logged line: its number in metrics.jsonl, its optimiser step and all its values."""

    line: int
    step: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `notes` says, in whole sentences, what was missing or left aside."""

    path: Path
    rows: list[Row]
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def curve(self, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Steps (int64), or values of another metric `x` (float64), and values (float64) of `key`.

        Of the lines that have both, one per step, in order. A null counts as missing; NaN and infinity
        stay, for the caller to see. Where one step has the key twice, the later line holds. Raises
        InputError for a value that is not a number.
        """
        points: dict[int, tuple[float, float]] = {}
        for row in self.rows:
            place, value = self._number(row, x), self._number(row, key)
            if place is not None and value is not None:
                points[row.step] = place, value
        places, values = zip(*points.values(), strict=True) if points else ((), ())
        return np.array(places, np.int64 if x == "step" else np.float64), np.array(values, np.float64)

    def _number(self, row: Row, key: str) -> float | None:
        if key == "step":
            return row.step
        value = row.values.get(key)
        if value is None and key in _OTHER_NAMES:
            value = row.values.get(_OTHER_NAMES[key])
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            file = self.path / "metrics.jsonl"
            raise InputError(f"expected a number, found {value!r}", file=file, line=row.line, field=key)
        return float(value)

    def figure(self, key: str) -> int | float | None:
        """A finite number of the summary, or None where there is no such number."""
        value = (self.summary or {}).get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
        return value if is_number else None


def read_run(path: Path | str) -> Run:
    """Read the run folder at `path`; only metrics.jsonl must be there.

    Raises InputError where `path` is no run folder, has no whole line of metrics, or holds a file that
    cannot be read.
    """
    path = Path(path)
    metrics = path / "metrics.jsonl"
    if not path.is_dir():
        raise InputError("no such run folder", file=path, mend="Give the output_dir of a training run.")
    if not metrics.is_file():
        raise InputError(
            "not a run folder: it has no metrics.jsonl",
            file=path,
            mend="Give the output_dir of a training run.",
        )
    notes: list[str] = []
    rows = _read_rows(metrics, notes)
    if not rows:
        raise InputError(
            "no metrics: the run stopped before its first logged step",
            file=metrics,
            mend="Train on, or lower train.logging_steps.",
        )
    summary = _read_json(path / "summary.json")
    if summary is None:
        notes.append("There is no summary.json: the run has not finished, or was stopped.")
    recipe_text, recipe = _read_recipe(path / "recipe.yaml")
    if recipe_text is None:
        notes.append("There is no recipe.yaml, so the recipe is not shown.")
    samples_file = path / "samples.jsonl"
    samples = [sample for _, sample in _read_lines(samples_file, notes)] if samples_file.exists() else []
    return Run(
        path=path,
        rows=rows,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_read_json(path / "environment.json"),
        summary=summary,
        samples=samples,
        notes=notes,
    )


def _read_rows(file: Path, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for line, values in _read_lines(file, notes):
        step = values.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float) or step != step // 1 or step < 0:
            raise InputError(
                f"expected a whole number that is not negative, found {step!r}",
                file=file,
                line=line,
                field="step",
            )
        row = Row(line=line, step=int(step), values=values)
        if rows and row.step < rows[-1].step:
            kept = [earlier for earlier in rows if earlier.step < row.step]
            notes.append(
                f"The run was resumed: from line {line} of metrics.jsonl it logs step {row.step} on again, "
                f"so {_lines(len(rows) - len(kept))} of the stopped run are left out."
            )
            rows = kept
        rows.append(row)
    return rows


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def _read_lines(file: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a jsonl file with their line numbers; a cut last line becomes a note."""
    numbered = [(n, raw) for n, raw in enumerate(_read_bytes(file).split(b"\n"), start=1) if raw.strip()]
    objects = []
    for line, raw in numbered:
        try:
            value = json.loads(raw.decode())
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if line != numbered[-1][0]:
                raise InputError(
                    f"not a JSON object ({error})", file=file, line=line, mend="Mend or remove the line."
                ) from error
            notes.append(f"The last line of {file.name} (line {line}) is cut and was left out.")
        else:
            objects.append((line, value))
    return objects


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        value = json.loads(_read_bytes(file).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", file=file, mend="Mend or remove the file.") from error
    if not isinstance(value, dict):
        raise InputError("expected a JSON object", file=file, mend="Mend or remove the file.")
    return value


def _read_recipe(file: Path) -> tuple[str | None, dict[str, Any]]:
    if not file.exists():
        return None, {}
    try:
        text = _read_bytes(file).decode()
        recipe = parse_yaml(text, file)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error})", file=file, mend="Mend or remove the file.") from error
    if not isinstance(recipe, dict | None):
        raise InputError("expected a mapping", file=file, mend="Mend or remove the file.")
    return text, recipe or {}


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=file) from error
