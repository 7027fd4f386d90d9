"""Words and figures that the terminal and the page have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_kit.report.summary import duration, memory, number, percent

Form = Callable[[Any], str]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters (all but tab and line feed) by their number: none moves a cursor."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def short_places(places: Sequence[str]) -> str:
    """Places one after the other; a file is named once for those in it that follow each other."""
    words, before = [], None
    for place in places:
        file = place.partition(" (row")[0].rpartition(":")[0]
        words.append(place.removeprefix(file) if file and file == before else place)
        before = file
    return ", ".join(words)


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of what the check `cost` estimated of an epoch, those that are there."""
    forms: dict[str, tuple[str, Form]] = {
        "batch_size": ("examples in a step", number),
        "steps": ("steps of an epoch", number),
        "distinct": ("distinct tokens, each computed once", number),
        "separate": ("tokens of sequences apart", number),
        "padded": ("tokens of padded batches", number),
        "completions": ("tokens of replies", number),
        "saved_share": ("saved by the tree, of sequences apart", percent),
    }
    rows = _rows(cost, forms)
    if cost.get("padded") and cost.get("distinct"):
        rows.append(("saved by the tree, of padded batches", percent(1 - cost["distinct"] / cost["padded"])))
    model = cost.get("model") or {}
    rows += _rows(model, _MODEL) + _rows(model.get("memory") or {}, _MEMORY)
    if model.get("uncounted"):
        rows.append(("layers whose arithmetic is not counted", visible(", ".join(model["uncounted"]))))
    return rows


_MODEL: dict[str, tuple[str, Form]] = {
    "parameters": ("parameters of the model", number),
    "device": ("device", visible),
    "dtype": ("computes in", visible),
    "flops": ("least arithmetic of an epoch", lambda flops: f"{flops / 1e12:,.3g} TFLOP"),
    "flops_per_second": ("rate of matrix products, measured", lambda rate: f"{rate / 1e9:,.0f} GFLOP/s"),
    "seconds": ("time of an epoch, estimated", lambda span: " to ".join(map(duration, span))),
}
_MEMORY: dict[str, tuple[str, Form]] = {
    "weights": ("memory: weights", memory),
    "gradients": ("memory: gradients", memory),
    "moments": ("memory: moments of Adam", memory),
    "activations_per_token": ("memory: activations of a token", lambda size: f"{size / 1024:,.0f} KiB"),
    "least": ("memory in the smallest micro-batches", memory),
    "whole_step": ("memory with the largest step at once", memory),
    "machine": ("memory of this machine", memory),
}


def _rows(figures: Mapping[str, Any], forms: Mapping[str, tuple[str, Form]]) -> list[tuple[str, str]]:
    there = {key: figures[key] for key in forms if figures.get(key) is not None}
    return [(forms[key][0], forms[key][1](value)) for key, value in there.items()]
