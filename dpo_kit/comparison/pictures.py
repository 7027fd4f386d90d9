"""frontier.png and convergence.png of a comparison's folder.

The frontier is figure 2 (left) of the DPO paper (arXiv 2305.18290): mean true reward against mean sequence KL
to the reference. Nothing is left out unsaid: what lies beyond the axes is counted below them. Looks are those
of `report.plots`; methods differ in marker and line as well as in colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dpo_kit.comparison.record import START, Point, Record
from dpo_kit.report.page import write_whole
from dpo_kit.report.pictures import BLUE, GREEN, VERMILION
from dpo_kit.report.plots import DPI, GREY, dress, png_of, short

COLOURS = (
    BLUE,
    VERMILION,
    GREEN,
    "#CC79A7",
    "#E69F00",
    "#7F3C8D",
    "#56B4E9",
    "#8C564B",
    "#4D4D4D",
    "#B8A000",
)
MARKERS = "osD^vP<X>ph"
# The axis ends a little beyond the highest KL at which rewards are compared.
BEYOND_LEVELS = 1.25
# How far below the frontiers the axis goes, as a share of their height.
BELOW_FRONTIERS = 1.0
# Characters in a line.
NOTE_WIDTH, LEGEND_WIDTH = 150, 24


def draw(folder: Path) -> list[Path]:
    """Write FOLDER/frontier.png and FOLDER/convergence.png, and return those that there was data for.

    Raises:
        InputError: a file of the comparison cannot be read.
    """
    record = Record(folder)
    written = []
    for name, figure in (("frontier", frontier(record)), ("convergence", convergence(record))):
        if figure is not None:
            write_whole(folder / f"{name}.png", png_of(figure, palette=False))
            written.append(folder / f"{name}.png")
    return written


def envelope(record: Record, method: str) -> list[Point]:
    """A method's frontier: the points that no other of its points beats in reward at a lower or equal KL.

    It starts at the SFT policy, from which every run starts; points no better than that are not in it.
    Best-of-N is a curve in N and has all its points.
    """
    points = sorted((p for p in record.of(method) if p.finite), key=lambda p: (p.kl, -p.reward))
    if record.is_best_of_n(method):
        return points
    best = [record.start] if record.start else []
    for point in points:
        if not best or point.reward > best[-1].reward:
            best.append(point)
    return best


def look(record: Record, method: str) -> dict[str, Any]:
    """Colour and marker of a method, and its line: solid without RL, dashed with it, dotted for Best-of-N."""
    place = record.methods.index(method)
    line = ":" if record.is_best_of_n(method) else "--" if record.with_rl(method) else "-"
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": line,
    }


def frontier(record: Record) -> Figure | None:
    """Reward against KL, or None where nothing has been measured."""
    if not any(point.finite for point in record.points):
        return None
    figure, axes = _figure(5.4)
    dress(axes, "mean true reward")
    axes.set_title("Reward against KL to the SFT policy", loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("mean sequence KL to the reference (nats)")
    x, y = _limits(record)
    for method in record.methods:
        _draw_method(axes, record, method)
    start = record.start
    if start is not None:
        axes.axhline(start.reward, color=GREY, linewidth=0.8, zorder=1)
        axes.plot([start.kl], [start.reward], "*", color="black", markersize=15, zorder=6, clip_on=False)
    axes.set_xlim(0, x)
    axes.set_ylim(*y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    handles = [_handle(record, method) for method in _by_height(record)]
    if start is not None:
        handles.append(
            Line2D([], [], color="black", marker="*", linestyle="", markersize=11, label=record.label(START))
        )
    _legend(figure, handles)
    _note(figure, [_kinds(record), *_outside(record, x, y)])
    return figure


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9 if columns < 3 else 12, height), dpi=DPI, layout="constrained")
    figure.set_facecolor("white")
    return figure, figure.subplots(rows, columns, sharex="col" if rows > 1 else "none")


def _limits(record: Record) -> tuple[float, tuple[float, float]]:
    """The end of the x axis, and both of the y axis: all points, unless they would squash the frontiers."""
    finite = [point for point in record.points if point.finite]
    furthest, wanted = max(p.kl for p in finite), BEYOND_LEVELS * max(record.levels)
    x = 1.04 * furthest if furthest <= 1.1 * wanted else wanted
    x = x or 1.0
    drawn = [p.reward for p in finite if p.kl <= x]
    best = [p for method in record.methods for p in envelope(record, method) if p.kl <= x]
    best += [record.start] if record.start else []
    bars = [p.reward + record.standard_error(p) for p in best]
    top = max([*drawn, *filter(math.isfinite, bars)])
    bottom = min([p.reward for p in best] or drawn)
    bottom = max(min(drawn), bottom - BELOW_FRONTIERS * (top - bottom))
    room = 0.04 * (top - bottom) or 0.5
    return x, (bottom - room, top + 2 * room)


def _draw_method(axes: Axes, record: Record, method: str) -> None:
    style = look(record, method)
    colour, marker = style["color"], style["marker"]
    best = envelope(record, method)
    for points in record.runs_of(method).values():
        found = [point for point in points if point.finite]
        kls, rewards = [p.kl for p in found], [p.reward for p in found]
        if not record.is_best_of_n(method):
            axes.plot(kls, rewards, color=colour, linewidth=0.8, alpha=0.28, zorder=2)
        axes.plot(kls, rewards, marker, color=colour, markersize=4, alpha=0.45, markeredgewidth=0, zorder=3)
    if len(best) < 2:
        return
    shown = [point for point in best if point is not record.start]
    kls, rewards = [p.kl for p in best], [p.reward for p in best]
    axes.plot(kls, rewards, color=colour, linestyle=style["linestyle"], linewidth=2, zorder=4)
    errors = [record.standard_error(point) for point in shown]
    place = [p.kl for p in shown], [p.reward for p in shown]
    axes.errorbar(*place, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.7, zorder=4)
    axes.plot(*place, marker, color=colour, markersize=7, markeredgecolor="white", zorder=5)
    if record.is_best_of_n(method):
        last = shown[-1]
        text = f"N = {last.step}"
        axes.annotate(
            text,
            (last.kl, last.reward),
            (-6, 6),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            ha="right",
        )


def _by_height(record: Record) -> list[str]:
    """Methods in the order in which their frontiers end, the highest first, as the eye finds them."""
    return sorted(
        record.methods, key=lambda m: -max((p.reward for p in envelope(record, m)), default=-math.inf)
    )


def _handle(record: Record, method: str) -> Line2D:
    never = len(envelope(record, method)) < 2
    label = record.label(method) + ("\n(never above the SFT policy)" if never and record.start else "")
    return Line2D(
        [], [], linewidth=2, markersize=7, markeredgecolor="white", label=label, **look(record, method)
    )


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    labels = ["\n".join(_wrapped(str(handle.get_label()), LEGEND_WIDTH)) for handle in handles]
    drawn = figure.legend(
        handles, ["x"] * len(handles), loc="outside right upper", fontsize=9, frameon=False, handlelength=3.2
    )
    for text, label in zip(drawn.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width)]


def _note(figure: Figure, sentences: Sequence[str]) -> None:
    """Words below the axes."""
    text = "\n".join(_wrapped("\n".join(sentences), NOTE_WIDTH))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color="#374151", parse_math=False)


def _kinds(record: Record) -> str:
    bars = (
        " Bars: one standard error over prompts; seeds are not in them."
        if any(map(record.replies, record.points))
        else ""
    )
    lines = "Lines: each method's best points (solid: no RL; dashed: RL; dotted: Best-of-N)."
    return f"{lines} Faint: every evaluation, and the paths of single runs.{bars}"


def _outside(record: Record, x: float, y: tuple[float, float]) -> list[str]:
    """How many points the axes do not show, by method, and how far the furthest lies."""
    parts = []
    for method in record.methods:
        points = record.of(method)
        far = [p for p in points if p.finite and p.kl > x]
        low = [p for p in points if p.finite and p.kl <= x and p.reward < y[0]]
        broken = [p for p in points if not p.finite]
        said = [f"{len(far)} beyond KL {x:.3g} (up to {max(p.kl for p in far):,.0f})"] if far else []
        said += [f"{len(low)} below (down to {min(p.reward for p in low):.2f})"] if low else []
        said += [f"{len(broken)} that are no numbers"] if broken else []
        if said:
            parts.append(f"{record.label(method)}: {', '.join(said)} of {len(points)}")
    return [f"Not within the axes: {'; '.join(parts)}."] if parts else []


def convergence(record: Record) -> Figure | None:
    """Reward and KL against steps, seconds and tokens, a curve for each method that trains."""
    trained = [method for method in record.methods if not record.is_best_of_n(method)]
    best = {method: run for method in trained if (run := best_run(record, method))}
    if not best:
        return None
    figure, grid = _figure(6.2, 2, 3)
    across = (
        ("step", "steps (PPO: updates)"),
        ("seconds", "seconds of training, one worker"),
        ("tokens", "tokens computed in training"),
    )
    up = ("reward", "mean true reward"), ("kl", "KL to the reference (nats)")
    for row, (key, ylabel) in zip(grid, up, strict=True):
        for axes, (x, xlabel) in zip(row, across, strict=True):
            dress(axes, ylabel if x == "step" else "")
            for method, run in best.items():
                found = [p for p in run if p.finite and getattr(p, x) > 0]
                values = [getattr(p, x) for p in found], [getattr(p, key) for p in found]
                axes.plot(
                    *values, markersize=5, markeredgecolor="white", linewidth=1.8, **look(record, method)
                )
            if key == "reward" and record.start is not None:
                axes.axhline(record.start.reward, color=GREY, linewidth=1, linestyle="-", zorder=1)
            _logarithmic(axes, "xy" if key == "kl" else "x")
            if key == "kl":
                axes.set_xlabel(xlabel)
    figure.suptitle(
        "Reward and KL against steps, time and work", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    handles = [_handle_of_run(record, method, run) for method, run in best.items()]
    handles.append(Line2D([], [], color=GREY, linewidth=1, label=f"{record.label(START)} (reward)"))
    _legend(figure, handles)
    _note(figure, _convergence_notes(record))
    return figure


def _logarithmic(axes: Axes, which: str) -> None:
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_formatter(NullFormatter())


def best_run(record: Record, method: str) -> list[Point]:
    """The evaluations of the run that ended with the highest reward; of one that diverged only among such."""
    runs = [[point for point in run if point.step > 0] for run in record.runs_of(method).values()]
    measured = [run for run in runs if any(p.finite for p in run)]
    return max(measured, key=lambda run: (all(p.finite for p in run), *_last_reward(run)), default=[])


def _last_reward(run: Sequence[Point]) -> list[float]:
    return [point.reward for point in run if point.finite][-1:]


def _handle_of_run(record: Record, method: str, run: Sequence[Point]) -> Line2D:
    setting = f"\n{run[0].setting}" if run[0].setting else ""
    label = record.label(method) + setting
    return Line2D(
        [], [], linewidth=2, markersize=7, markeredgecolor="white", label=label, **look(record, method)
    )


def _convergence_notes(record: Record) -> list[str]:
    notes = [
        "Of each method the run that ended with the highest reward; axes are logarithmic but that of reward."
    ]
    left_out = [record.label(method) for method in record.methods if record.is_best_of_n(method)]
    if left_out:
        notes.append(f"{', '.join(left_out)} trains nothing: its cost is paid at every reply.")
    return notes
