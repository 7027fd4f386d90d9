"""What `dpo-kit bench` found, as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_kit.bench.profile import GROUPS


def print_results(results: dict[str, Any]) -> None:
    """Print the tables to stdout.

    Args:
        results: of `run_bench`.
    """
    console = Console()
    sections = [
        ("the work", _work_rows(results)),
        ("how fast", _speed_rows(results)),
        ("how far from the limit", _limit_rows(results["limit"])),
        (
            f"memory ({results['memory']['kind']}, most since {results['memory']['since']})",
            _memory_rows(results),
        ),
        ("what fits in a micro-batch", _fit_rows(results["fits"])),
        ("where the time goes", [(GROUPS[g], f"{share:.1f}%") for g, share in results["time"].items()]),
    ]
    for title, rows in sections:
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        table.add_column("figure", ratio=1)
        table.add_column("value", justify="right")
        for label, value in rows:
            table.add_row(label, value)
        console.print(table)


def _work_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    model, step = results["model"], results["step"]
    return [
        ("model", model["class"]),
        ("parameters", f"{model['parameters']:,}"),
        ("of them trained", f"{model['trainable_parameters']:,}"),
        ("weights in, products in", f"{model['dtype']}, {model['computes_in']}"),
        (
            "pairs in the data, in a step",
            f"{results['data']['pairs']:,}, {results['data']['pairs_per_step']}",
        ),
        ("tokens of a step: distinct", f"{step['distinct_tokens']:,.0f}"),
        ("of sequences apart", f"{step['separate_tokens']:,.0f}"),
        ("of one padded batch", f"{step['padded_tokens']:,.0f}"),
        ("completion tokens (distinct)", f"{step['predictions']:,.0f}"),
        (
            "the tree saves of apart, of padded",
            f"{step['tree_saves_of_separate']:.1%}, {step['tree_saves_of_padded']:.1%}",
        ),
    ]


def _speed_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    speed, place = results["speed"], results["environment"]
    return [
        ("device", f"{place['name'] or place['device']}, {place['threads']} threads"),
        ("layout", speed["layout"]),
        (f"seconds a step (median of {speed['steps']})", f"{speed['seconds_per_step']:.3g}"),
        ("slowest step", f"{speed['slowest_step_seconds']:.3g}"),
        ("pairs a second", f"{speed['pairs_per_second']:.3g}"),
        ("distinct tokens a second", f"{speed['distinct_tokens_per_second']:,.0f}"),
    ]


def _limit_rows(limit: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("least arithmetic of a step", f"{limit['flops_per_step'] / 1e12:.3g} TFLOP")]
    for dtype, rates in limit["matmul_rates"].items():
        used = " (in use)" if dtype == limit["dtype"] else ""
        rows += [(f"{dtype}{used}, {shape}", _rate(rate)) for shape, rate in rates.items()]
    rows.append(("share of the limit", f"{limit['share']:.1%}"))
    if limit["uncounted"]:
        rows.append(("layers whose arithmetic is not counted", ", ".join(limit["uncounted"])))
    return rows


def _memory_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    memory = results["memory"]
    labels = {
        "libraries": "libraries, before the model was loaded",
        "rest": "rest: activations, head, data",
    }
    parts = [(labels.get(name, name), size) for name, size in memory["parts"].items() if size]
    return [(label, _size(size)) for label, size in [("peak", memory["peak_bytes"]), *parts]]


def _fit_rows(fits: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("budget in use, tokens", f"{fits['in_use']:,}"),
        ("tokens of the largest step", f"{fits['largest_step_tokens']:,}"),
    ]
    if (largest := fits["largest_tokens_per_micro_batch"]) is not None:
        whole = largest >= fits["largest_step_tokens"]
        rows += [
            ("memory that is free", _size(fits["available_bytes"])),
            ("a token takes", _size(fits["bytes_per_token"])),
            ("largest tokens_per_micro_batch", f"{largest:,}" + (" (a whole step fits)" if whole else "")),
        ]
    return [*rows, ("how this was found", fits["how"])]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def _size(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"
