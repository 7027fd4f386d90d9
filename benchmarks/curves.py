"""Scaling curves: time per pair and peak memory against pairs in a step, length, vocabulary and replies.

A small model, so that the curves show how the work grows and not how large the model is. Every point is a
run of three steps in a process of its own; its time is the median of the steps after the first. A point
whose log-probs, losses or gradients are not those of dpo_kit's is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from compare import agreement
from lengths import pairs_per_prompt
from presets import model_fields
from runner import Runner, check_side
from workload import Task

STEPS = 3
# Steps of this many pairs against replies per prompt: a multiple of 1, 3, 6 and 15.
_RANKED_STEP = 30

AXES: dict[str, str] = {
    "pairs": "pairs in a step",
    "length": "tokens of prompt plus reply, half each",
    "vocabulary": "tokens of the vocabulary",
    "replies": "ranked replies of a prompt, all their pairs",
}
POINTS: dict[str, tuple[int, ...]] = {
    "pairs": (2, 4, 8, 16, 32),
    "length": (64, 128, 256, 512, 1024),
    "vocabulary": (4096, 16384, 65536, 131072),
    "replies": (2, 3, 4, 6),
}
QUICK_POINTS: dict[str, tuple[int, ...]] = {
    "pairs": (2, 4),
    "length": (64, 128),
    "vocabulary": (512, 1024),
    "replies": (2, 3),
}

# Okabe and Ito's colours, which differ for colour-blind readers too.
_STYLES: dict[str, tuple[str, str, str]] = {
    "dpo_kit": ("dpo_kit", "#0072B2", "o"),
    "dpo_kit-loop": ("dpo_kit (loop)", "#0072B2", "o"),
    "trl-newest": ("TRL, newest", "#CC79A7", "D"),
    "trl-1.12": ("TRL 1.12", "#D55E00", "s"),
    "naive": ("plain PyTorch, padded", "#009E73", "^"),
}


def task_at(axis: str, x: int, device: str = "cpu", dtype: str = "fp32", quick: bool = False) -> Task:
    """The work of one point."""
    preset = "tiny" if quick else "small"
    task = Task(
        model=model_fields(preset),
        work="fixed-64-64",
        batch_size=8,
        warmup_steps=1,
        device=device,
        dtype=dtype,
    )
    if axis == "pairs":
        task = replace(task, batch_size=x)
    elif axis == "length":
        task = replace(task, batch_size=4, work=f"fixed-{x // 2}-{x // 2}")
    elif axis == "vocabulary":
        task = replace(task, batch_size=4, model=model_fields(preset, vocabulary=x))
    elif axis == "replies":
        task = replace(task, replies=x, batch_size=pairs_per_prompt(x) if quick else _RANKED_STEP)
    else:
        raise ValueError(f"unknown axis {axis}")
    return replace(task, pairs=STEPS * task.batch_size)


def measure_curves(
    runner: Runner,
    sides: Sequence[str],
    points: Mapping[str, Sequence[int]],
    device: str = "cpu",
    dtype: str = "fp32",
    quick: bool = False,
) -> dict[str, Any]:
    """Run all points of all sides; the first side is ours, that the others are compared with.

    Returns:
        axis -> side -> list of {x, seconds_per_pair, peak_memory_bytes}, and `unequal`, where sides did not
        compute the same.
    """
    for side in sides:
        check_side(side)
    places = [(axis, x) for axis, xs in points.items() for x in xs]
    tasks = [task_at(axis, x, device, dtype, quick) for axis, x in places]
    runs = {side: runner.run_each(side, tasks) for side in sides}
    found: dict[str, Any] = {
        "axes": {axis: {side: [] for side in sides} for axis in points},
        "unequal": [],
        "model": tasks[0].model,
        "dtype": dtype,
        "threads": runs[sides[0]][0]["threads"],
    }
    for i, (axis, x) in enumerate(places):
        ours = runs[sides[0]][i]
        for side in sides:
            run = runs[side][i]
            if side != sides[0] and not agreement([ours], [run], dtype)["agree"]:
                found["unequal"].append(f"{side} at {x} {AXES[axis]}")
                continue
            seconds = median(run["step_seconds"][1:]) / tasks[i].batch_size
            point = {"x": x, "seconds_per_pair": seconds, "peak_memory_bytes": run["peak_memory_bytes"]}
            found["axes"][axis][side].append(point)
    return found


def draw_curves(found: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw two pictures, one panel for each axis.

    Returns:
        The names of the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, value, label, factor in (
        ("curves-time.png", "seconds_per_pair", "milliseconds per pair", 1e3),
        ("curves-memory.png", "peak_memory_bytes", "peak memory, GB", 1e-9),
    ):
        _draw(found, folder / name, value, label, factor)
        drawn.append(name)
    return drawn


def _draw(found: Mapping[str, Any], file: Path, value: str, label: str, factor: float) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), sharey=True, layout="constrained")
    for panel, (axis, sides) in zip(panels.flat, found["axes"].items(), strict=True):
        xs = sorted({point["x"] for points in sides.values() for point in points})
        for side, points in sides.items():
            words, colour, marker = _STYLES[side]
            panel.plot(
                [point["x"] for point in points],
                [point[value] * factor for point in points],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                label=words,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(xs, [_short(x) for x in xs])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
        panel.tick_params(which="both", labelsize=9)
        panel.set_xlabel(AXES[axis])
        panel.grid(True, which="both", linewidth=0.4, alpha=0.4)
        for edge in ("top", "right"):
            panel.spines[edge].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    written = file.with_name(f".{file.name}.writing")
    figure.savefig(written, dpi=150, format="png")
    plt.close(figure)
    written.replace(file)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 4096 and number % 1024 == 0 else str(number)
