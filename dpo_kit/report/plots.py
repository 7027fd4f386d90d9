"""Curves as PNG pictures, of one run or of several overlaid.

What is in a picture stands in pictures.py; this is the one place that touches matplotlib, through its object
API (no pyplot, no global state). A picture with no data is None. Colours are Okabe and Ito's (safe for
colour-blind readers), and no meaning hangs on colour alone where lines can be dashed or marked.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from dpo_kit.report.pictures import BLUE, GREEN, VERMILION, Panel, Picture, Series
from dpo_kit.report.run_folder import Run

GREY = "#6b7280"
RUN_COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 120
NAME_CHARACTERS = 36

# Handles and their names.
Legend = tuple[list[Line2D], list[str]]


def run_colours(count: int) -> list[str]:
    """A colour for each run, as #rrggbb."""
    if count <= len(RUN_COLOURS):
        return list(RUN_COLOURS[:count])
    viridis = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(viridis(x)) for x in np.linspace(0, 0.92, count)]


def running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred running mean and its window: about a twelfth of the points, odd, at most 1001.

    Near the ends, and around values that are not finite, the mean is over what there is.
    """
    window = min(1001, len(values) // 12 // 2 * 2 + 1)
    finite = np.isfinite(values)
    half = window // 2
    # Not a cumulative sum, in which one huge value would swallow the digits of all that follow.
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(finite.astype(float), kernel)[half : half + len(values)]
    return np.where(finite, total / np.maximum(count, 1), np.nan), window


def draw(picture: Picture, runs: Sequence[Run], labels: Sequence[str]) -> bytes | None:
    """The picture as PNG bytes, or None where no run has any of its data.

    One run: a colour for each series, the logged values faint behind the running mean. Several: a colour
    for each run, running means only. Values that are not finite leave gaps.
    """
    filled = [p for p in picture.panels if any(_has_data(r, s, picture.x) for r in runs for s in p.series)]
    if not filled:
        return None
    figure = Figure(figsize=(6.4, 3.8), dpi=DPI, layout="constrained")
    figure.set_facecolor("white")
    heights = [panel.height for panel in filled]
    all_axes = figure.subplots(len(filled), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    all_axes[0].set_title(picture.title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    legends = []
    for axes, panel in zip(all_axes, filled, strict=True):
        dress(axes, panel.ylabel)
        if panel.zero:
            axes.axhline(0, color=GREY, linewidth=1)
        one = len(runs) == 1
        legend = (
            _draw_one(axes, panel, runs[0], picture.x)
            if one
            else _draw_overlay(axes, panel, runs, labels, picture.x)
        )
        legends.append(legend)
        if panel.share:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
    _place_legends(figure, filled, legends, repeat=len(runs) == 1)
    if picture.x != "step":
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8))
        all_axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    all_axes[-1].set_xlabel(picture.xlabel)
    return png_of(figure)


def png_of(figure: Figure, *, palette: bool = True) -> bytes:
    """The figure as a PNG; with a palette of 128 colours, which few lines need, a quarter of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # Maximum coverage keeps rare colours, such as a thin line's; median cut would blend them away.
    if palette:
        image = image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def _has_data(run: Run, series: Series, x: str) -> bool:
    return bool(np.isfinite(run.curve(series.key, x)[1]).any())


def short(value: float) -> str:
    """A number for an axis: 2.5 M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:,.4g} {unit}"
    return f"{value:,.4g}"


def dress(axes: Axes, ylabel: str) -> None:
    """Give axes the look of all pictures."""
    axes.set_facecolor("white")
    axes.set_ylabel(ylabel)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _draw_one(axes: Axes, panel: Panel, run: Run, x: str) -> Legend:
    handles: list[Line2D] = []
    for series in panel.series:
        steps, values = run.curve(series.key, x)
        if not np.isfinite(values).any():
            continue
        handles += axes.plot(*_line(steps, values, series), **_style(series, series.colour, len(steps)))
        label = series.label
        window = running_mean(values)[1] if series.smooth else 1
        if window > 1:
            axes.plot(steps, values, ".", color=series.colour, zorder=1, **_faint(len(steps)))
            label += f" (mean of {window} lines)"
        handles[-1].set_label(label)
    ceiling = run.figure("eval/accuracy_ceiling") if panel.ceiling else None
    if ceiling is not None:
        handles.append(axes.axhline(ceiling, color=GREY, linestyle=":", linewidth=1.4))
        handles[-1].set_label(f"ceiling, label noise ({ceiling:.3f})")
    return handles, [str(handle.get_label()) for handle in handles]


def _draw_overlay(axes: Axes, panel: Panel, runs: Sequence[Run], labels: Sequence[str], x: str) -> Legend:
    handles: list[Line2D] = []
    names: list[str] = []
    ceilings = [run.figure("eval/accuracy_ceiling") if panel.ceiling else None for run in runs]
    for run, label, colour, ceiling in zip(runs, labels, run_colours(len(runs)), ceilings, strict=True):
        drawn: list[Line2D] = []
        for series in panel.series:
            steps, values = run.curve(series.key, x)
            if np.isfinite(values).any():
                drawn += axes.plot(*_line(steps, values, series), **_style(series, colour, len(steps)))
        if drawn:
            handles.append(drawn[0])
            names.append(label if len(label) <= NAME_CHARACTERS else f"{label[: NAME_CHARACTERS - 1]}…")
        if ceiling is not None and len(set(ceilings)) > 1:
            axes.axhline(ceiling, color=colour, linestyle=":", linewidth=1.2)
    if ceilings[0] is not None and len(set(ceilings)) == 1:
        handles.append(axes.axhline(ceilings[0], color=GREY, linestyle=":", linewidth=1.4))
        names.append(f"ceiling ({ceilings[0]:.3f})")
    if len(panel.series) > 1:
        for series in panel.series:
            handles.append(Line2D([], [], color=GREY, linestyle=series.dash))
            names.append(series.label.removesuffix(", held-out"))
    return handles, names


def _line(steps: np.ndarray, values: np.ndarray, series: Series) -> tuple[np.ndarray, np.ndarray]:
    values = np.where(np.isfinite(values), values, np.nan)
    return steps, running_mean(values)[0] if series.smooth else values


def _style(series: Series, colour: str, points: int) -> dict[str, Any]:
    """Evaluations are marked points (where they are few) on a thin line; training is a line."""
    marker = "o" if points == 1 or (series.held_out and points <= 60) else None
    width = 1.1 if series.held_out else 1.7
    style = {"color": colour, "linestyle": series.dash, "linewidth": width}
    return {**style, "marker": marker, "markersize": 4}


def _faint(points: int) -> dict[str, Any]:
    """Dots that stay a haze behind the line however many there are, and a small file."""
    return {"alpha": 0.18, "markersize": 4} if points <= 1000 else {"alpha": 0.06, "markersize": 2.5}


def _place_legends(figure: Figure, panels: Sequence[Panel], legends: Sequence[Legend], repeat: bool) -> None:
    """A legend in each panel of several series, or, unless they `repeat`, in the first alone.

    Where all panels show the same series, one below them leaves their little room to the curves.
    """
    same = len({tuple(series.label for series in panel.series) for panel in panels}) == 1
    if len(panels) > 1 and same:
        _legend(figure, max(legends, key=lambda legend: len(legend[0])), loc="outside lower center", ncols=2)
        return
    for axes, panel, legend in zip(figure.axes, panels, legends, strict=True):
        if len(panel.series) > 1 if repeat else axes is figure.axes[0]:
            _legend(axes, legend)


def _legend(place: Axes | Figure, legend: Legend, **where: Any) -> None:
    """A legend whose names are set as plain text: a run may be called `_x` or `$x$`."""
    handles, names = legend
    drawn = place.legend(handles, ["x"] * len(handles), fontsize=8, frameon=True, framealpha=0.85, **where)
    drawn.get_frame().set_edgecolor("none")
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
