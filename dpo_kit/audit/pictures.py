"""The pictures of an audit's page, each drawn from figures that a check left, and none where it left none.

Looks, colours and the way to a PNG are those of `report.plots`; names are drawn as plain text, for they
come from data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from dpo_kit.audit.findings import Audit
from dpo_kit.audit.words import visible
from dpo_kit.report.page import Drawn
from dpo_kit.report.pictures import BLUE, GREEN, VERMILION
from dpo_kit.report.plots import DPI, GREY, dress, png_of, short

# Of a part's name; others take what is left.
_COLOURS = {
    "prompt": GREY, "chosen": BLUE, "desirable": BLUE, "best": BLUE,
    "rejected": VERMILION, "undesirable": VERMILION, "other": VERMILION, "whole": GREEN,
}  # fmt: skip
_MOST_BARS = 12
# Rows that a picture of their kinds is drawn for.
_LEAST_ROWS = 3
_NAME_CHARACTERS = 30
# The share that is not of the most frequent kind.
_WORTH_A_PICTURE = 0.01
_SHOWN_SHARE = 0.001


def draw_pictures(audit: Audit) -> dict[Drawn, bytes]:
    """Each picture that there is data for, ready for the page, and its PNG."""
    wanted: dict[str, tuple[str, Callable[[Axes, Audit], bool]]] = {
        "lengths": ("How long prompts and replies are", _lengths),
        "longer": ("Does the longer reply win?", _longer),
        "shallow": ("What gives the label away without reading", _features),
        "left_out": ("What was left out", _left_out),
        "stay": ("What a length limit would keep", _stay),
        "cost": ("Tokens that training computes", _cost),
        "scripts": ("Scripts", _scripts),
        "languages": ("Languages", _languages),
        "rows_per_prompt": ("Rows of one prompt", _rows_per_prompt),
    }
    drawn = {}
    for name, (title, draw) in wanted.items():
        figure = Figure(figsize=(6.4, 3.8), dpi=DPI, layout="constrained")
        figure.set_facecolor("white")
        axes = figure.subplots()
        dress(axes, "")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
        if draw(axes, audit):
            png = png_of(figure)
            drawn[Drawn.of(name, title, png)] = png
    return drawn


def _lengths(axes: Axes, audit: Audit) -> bool:
    """Histograms as outlines: tokens where a tokenizer counted them, else characters."""
    unit, found = "tokens", _figures(audit, "tokens", "lengths")
    parts = {part: each["histogram"] for part, each in found.items() if each.get("histogram")}
    if not parts and audit.statistics is not None:
        unit = "characters"
        parts = {part: asdict(each) for part, each in audit.statistics.histograms.items()}
    if not parts:
        return False
    edges = next(iter(parts.values()))["edges"]
    grows = edges[-1] - edges[-2] > 3 * (edges[1] - edges[0])
    spare = iter((GREEN, "#CC79A7", "#E69F00", "#56B4E9"))
    for part, histogram in parts.items():
        colour = _COLOURS.get(part) or next(spare, GREY)
        heights, places = _outline(histogram["edges"], histogram["counts"], grows=grows)
        axes.stairs(heights, places, color=colour, linewidth=1.7, label=_name(part))
    if grows:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(unit)
    axes.set_ylabel("share of all, per doubling of length" if grows else "share of all")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8, frameon=False)
    return True


def _outline(
    edges: Sequence[float], counts: Sequence[int], *, grows: bool
) -> tuple[list[float], list[float]]:
    """Heights of a histogram and where they stand; on a logarithmic axis areas are what is compared, so that
    a wider bin is no higher, and what lies below 1 is drawn from 1/2."""
    total = max(sum(counts), 1)
    if not grows:
        return [count / total for count in counts], list(edges)
    places = [max(edge, 0.5) for edge in edges]
    widths = [math.log2(after / before) for before, after in pairwise(places)]
    return [count / total / width for count, width in zip(counts, widths, strict=True)], places


def _longer(axes: Axes, audit: Audit) -> bool:
    rule = _figures(audit, "shallow", "length_rule")
    parts = rule.get("by_difference") or []
    if not parts:
        return False
    places = range(len(parts))
    bars = axes.bar(places, [part["share"] - 0.5 for part in parts], bottom=0.5, color=BLUE, width=0.75)
    for bar, part in zip(bars, parts, strict=True):
        if part["share"] < 0.5:
            bar.set_color(VERMILION)
    labels = [_span(part["from"], part["to"]) for part in parts]
    axes.set_xticks(list(places), labels, rotation=35, ha="right", fontsize=8)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.axhline(0.5, color=GREY, linewidth=1)
    longer = rule["longer_chosen"]
    axes.axhline(longer, color=GREEN, linestyle="--", linewidth=1.4, label=f"all pairs: {longer:.1%}")
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("difference of length, characters")
    axes.set_ylabel("longer reply is preferred")
    return True


def _span(low: float, high: float) -> str:
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"


def _features(axes: Axes, audit: Audit) -> bool:
    """What each feature tells by itself. Coefficients of a model would mislead: features go together."""
    shallow = audit.figures.get("shallow") or {}
    features = (shallow.get("features") or [])[:_MOST_BARS]
    if not features:
        return False
    more = [feature["accuracy"] >= 0.5 for feature in features]
    names = [f"{'more' if m else 'less'}: {_name(f['name'])}" for m, f in zip(more, features, strict=True)]
    values = [max(feature["accuracy"], 1 - feature["accuracy"]) - 0.5 for feature in features]
    colours = [BLUE if each else VERMILION for each in more]
    _bars(axes, names, values, colours, lambda value: f"{value + 0.5:.1%}", start=0.5)
    axes.set_xlim(0.5, max(0.6, 0.5 + 1.25 * max(values)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    model = shallow.get("model")
    together = f"; all together: {model['accuracy']:.1%}" if model else ""
    axes.set_xlabel(f"preferred reply guessed right by it alone (chance 50%{together})")
    axes.xaxis.label.set_fontsize(8)
    return True


def _left_out(axes: Axes, audit: Audit) -> bool:
    if sum(audit.counts.values()) < _LEAST_ROWS:
        return False
    return _counts(axes, audit.counts, "rows", VERMILION)


def _stay(axes: Axes, audit: Audit) -> bool:
    found = {int(length): rows for length, rows in _figures(audit, "tokens", "stay").items()}
    total = max(found.values(), default=0)
    lengths = sorted(found)
    if not found or found[lengths[0]] == total:
        return False
    axes.plot(lengths, [found[length] / total for length in lengths], marker="o", markersize=4, color=BLUE)
    own = _figures(audit, "tokens", "policy").get("max_length")
    if own in found:
        label = f"max_length {own:,}: {found[own] / total:.1%}"
        axes.axvline(own, color=GREEN, linestyle="--", linewidth=1.4, label=label)
        axes.legend(fontsize=8, frameon=False, loc="lower center")
    axes.set_xscale("log", base=2)
    powers = [length for length in lengths if length & (length - 1) == 0]
    axes.set_xticks(powers, [f"{length:,}" for length in powers], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("limit, tokens of prompt and reply")
    axes.set_ylabel(f"share of {total:,} within it")
    return True


def _cost(axes: Axes, audit: Audit) -> bool:
    cost = audit.figures.get("cost") or {}
    names = {
        "padded": "padded,\n8 rows at a time",
        "separate": "sequences apart",
        "distinct": "token tree\n(dpo_kit)",
    }
    there = {name: cost[key] for key, name in names.items() if cost.get(key)}
    if len(there) < 2:
        return False
    colours = [GREEN if "tree" in name else GREY for name in there]
    _bars(axes, list(there), list(there.values()), colours, lambda value: f"{value:,.0f}")
    axes.set_xlabel("tokens of one pass over the data")
    return True


def _scripts(axes: Axes, audit: Audit) -> bool:
    return _mix(axes, _figures(audit, "languages", "scripts"), "share of letters")


def _languages(axes: Axes, audit: Audit) -> bool:
    return _mix(axes, _figures(audit, "languages", "languages_guessed"), "share of texts")


def _mix(axes: Axes, found: Mapping[str, Mapping[str, float]], what: str) -> bool:
    """Shares by name, a bar for each side; what is nearly all of one kind is no picture."""
    totals: Counter[str] = Counter()
    for shares in found.values():
        totals.update(shares)
    known = [total for name, total in totals.items() if name != "unknown"]
    if not known or max(known) > (1 - _WORTH_A_PICTURE) * sum(known):
        return False
    common = [name for name, _ in totals.most_common(_MOST_BARS // 2)]
    names = [name for name in common if any(shares.get(name, 0) >= _SHOWN_SHARE for shares in found.values())]
    height = 0.8 / len(found)
    for i, (side, shares) in enumerate(found.items()):
        places = [place + (i - (len(found) - 1) / 2) * height for place in range(len(names))]
        values = [shares.get(name, 0.0) for name in names]
        bars = axes.barh(places, values, height=height, color=_COLOURS.get(side, GREEN), label=_name(side))
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=7, color="#374151")
    axes.set_yticks(range(len(names)), [_name(name) for name in names], parse_math=False)
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(what)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return True


def _rows_per_prompt(axes: Axes, audit: Audit) -> bool:
    found = _figures(audit, "duplicates", "rows_per_prompt")
    counts = {str(name): value for name, value in found.items() if value}
    if not counts or max(counts.values()) > (1 - _WORTH_A_PICTURE) * sum(counts.values()):
        return False
    bars = axes.bar(list(counts), list(counts.values()), color=BLUE, width=0.75)
    axes.bar_label(bars, [f"{value:,}" for value in counts.values()], fontsize=8, color="#374151")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 3 * max(counts.values()))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("rows that a prompt has")
    axes.set_ylabel("prompts")
    return True


def _counts(axes: Axes, counts: Mapping[str, float], what: str, colour: str) -> bool:
    if not counts:
        return False
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown, rest = ordered[:_MOST_BARS], ordered[_MOST_BARS:]
    if rest:
        shown[-1:] = [("others", shown[-1][1] + sum(value for _, value in rest))]
    names, values = [_name(name) for name, _ in shown], [value for _, value in shown]
    _bars(axes, names, values, [colour] * len(shown), lambda value: f"{value:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(what)
    return True


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    form: Callable[[float], str],
    start: float = 0.0,
) -> None:
    """Horizontal bars from `start` on, the first on top, each with its value behind it."""
    places = list(range(len(names)))
    bars = axes.barh(places, values, left=start, color=colours, height=0.7)
    axes.bar_label(bars, [form(value) for value in values], padding=4, fontsize=8, color="#374151")
    axes.set_yticks(places, names, parse_math=False)
    # A few bars do not grow to fill the picture.
    axes.set_ylim(max(len(names), 4) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _name(text: str) -> str:
    plain = visible(str(text).replace("_", " "))
    return plain if len(plain) <= _NAME_CHARACTERS else f"{plain[: _NAME_CHARACTERS - 1]}…"


def _figures(audit: Audit, check: str, part: str) -> Mapping[str, Any]:
    """What a check left under a name; nothing where it left none."""
    return (audit.figures.get(check) or {}).get(part) or {}
