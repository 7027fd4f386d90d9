"""Results of the benchmark -> Markdown: a compact table for the README, and the details under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from machine import DISTURBED, machine_in_words

Found = Mapping[str, Any]

UNEQUAL = "**did not compute the same as dpo_kit: no speed to report**"


def side_in_words(name: str, found: Found) -> str:
    """A side's name with the version that was run."""
    trl = found["versions"][name].get("trl")
    return f"TRL {trl}" if name.startswith("trl-") and trl else name


def task_in_words(task: Found) -> str:
    """What tells the rows of a table apart."""
    words = [task["work"], task["dtype"]]
    if task["order"] == "sorted":
        words.append("sorted by length")
    if task["reference"] == "precomputed":
        words.append("reference computed ahead")
    if task["replies"] > 2:
        words.append(f"{task['replies']} ranked replies")
    return f"{', '.join(words)}; {task['pairs']} pairs"


def comparison_table(comparisons: Sequence[Found]) -> list[str]:
    """One row for each peer of each comparison; no speed where a side did not compute the same."""
    lines = [
        "| work | against | its time | dpo_kit | **ratio** | its memory | dpo_kit | share of the limit "
        "| largest difference of loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in comparisons:
        ours = found["sides"].get(found["ours"], {})
        peers = [name for name in found["sides"] if name != found["ours"]]
        for name in peers or [found["ours"]]:
            lines.append(_row(found, name, found["sides"][name], ours))
    return lines


def _row(found: Found, name: str, side: Found, ours: Found) -> str:
    start = f"| {task_in_words(found['task'])} | {side_in_words(name, found)}"
    if name == found["ours"]:
        return f"{start} alone | | {_time(side)} | | | {_memory(side)} | {side['share_of_limit']:.0%} | |"
    if "agreement" in side and not side["agreement"]["agree"]:
        return f"{start} | {UNEQUAL} | | | | | | {_loss_difference(side)} |"
    if "against_ours" not in side:
        return f"{start} alone | {_time(side)} | | | {_memory(side)} | | | |"
    against = side["against_ours"]
    return (
        f"{start} | {_time(side)} | {_time(ours)} | **{against['time_ratio']:.1f}** | {_memory(side)} "
        f"| {_memory(ours)} | {ours['share_of_limit']:.0%} | {_loss_difference(side)} |"
    )


def _time(side: Found) -> str:
    ahead = f"{side['precompute_seconds']:.3g} + " if "precompute_seconds" in side else ""
    return f"{ahead}{side['seconds']:.3g} s"


def _memory(side: Found) -> str:
    return f"{side['peak_memory_bytes'] / 1e9:.2f} GB"


def _loss_difference(side: Found) -> str:
    return f"{side['agreement']['largest_relative_differences']['loss']:.0e}"


def comparison_details(found: Found) -> list[str]:
    """What the row of a table leaves out."""
    task, work = found["task"], found["work"]
    lines = [f"- Work: {found['described']}; {task['pairs']} pairs, {task['batch_size']} a step."]
    lines += [
        f"- Tokens: {work['distinct_tokens']} distinct, {work['separate_tokens']} separate, "
        f"{work['padded_tokens']} padded; {work['predictions']} distinct predictions."
    ]
    if "limit" in found:
        limit = found["limit"]
        lines += [
            f"- Limit: {work['flops'] / 1e12:.3g} TFLOP on distinct tokens at "
            f"{limit['rate'] / 1e9:.0f} GFLOP/s ({limit['shape']}) take {limit['seconds']:.3g} s."
        ]
    for name, side in found["sides"].items():
        lines += _side_details(name, side)
    lines += [
        "- Model: "
        + ", ".join(f"{k} {v}" for k, v in task["model"].items())
        + f"; weights {task['weights']}.",
        f"- Machine: {machine_in_words(found['machine'])}, {found['threads']} threads{_disturbance(found)}.",
        *_versions(found),
        f"- Runs finished between {found['at'][0]} and {found['at'][1]}"
        + (f", dpo_kit at {found['commit']}." if found["commit"] else "."),
    ]
    return lines


def _side_details(name: str, side: Found) -> list[str]:
    lines = []
    if "seconds" in side:
        text = (
            f"- {name}: {side['seconds']:.4g} s (median of {side['runs']}), "
            f"{side['share_of_limit']:.1%} of the limit, set-up {side['setup_seconds']:.3g} s, "
            f"{_memory(side)}"
        )
        if "precompute_seconds" in side:
            text += f", reference ahead {side['precompute_seconds']:.3g} s"
        if against := side.get("against_ours"):
            text += f"; its time over ours {against['time_ratio']:.2f}"
            if "total_ratio" in against:
                text += f" ({against['total_ratio']:.2f} with the reference's pass)"
            text += f", our memory over its {against['memory_ratio']:.2f}"
        lines.append(text + ".")
    if "agreement" in side:
        agreed = side["agreement"]
        worst, allowed = agreed["largest_relative_differences"], agreed["allowed"]
        differences = ", ".join(f"{k} {worst[k]:.1e} ({allowed[k]:.0e})" for k in worst)
        verdict = "" if agreed["agree"] else f" {UNEQUAL}:"
        lines.append(f"- {name}:{verdict} largest relative difference at any step (allowed): {differences}.")
    return lines


def _versions(found: Found) -> list[str]:
    distinct: dict[str, list[str]] = {}
    for side, versions in found["versions"].items():
        distinct.setdefault(", ".join(f"{name} {v}" for name, v in versions.items()), []).append(side)
    return [f"- Versions ({', '.join(sides)}): {text}." for text, sides in distinct.items()]


def _disturbance(found: Found) -> str:
    cores = found["others_cores"]
    if cores <= DISTURBED:
        return ""
    return f"; **other processes took up to {cores:.1f} cores meanwhile: the times are not to be trusted**"


def ranked_table(comparisons: Sequence[Found]) -> list[str]:
    """Ranked replies: dpo_kit against itself with less shared."""
    lines = [
        "| work | shared between pairs | within pairs only | **ratio** | what arithmetic allows | padded "
        "| ratio | tokens: tree, within pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in comparisons:
        sides, tokens = found["sides"], found["tokens"]
        ours, within, padded = (sides[name] for name in (found["ours"], *RANKED_SIDES))
        cells = [_time(ours) if "seconds" in ours else UNEQUAL]
        cells += [
            *_ranked_cells(within),
            f"{found['arithmetic_ratio']:.1f}",
            *_ranked_cells(padded, bold=False),
        ]
        lines.append(
            f"| {task_in_words(found['task'])} | {' | '.join(cells)} "
            f"| {tokens['step'] / tokens['separate']:.0%}, "
            f"{tokens['within_pairs'] / tokens['separate']:.0%} |"
        )
    return lines


RANKED_SIDES = ("dpo_kit-within-pairs", "dpo_kit-padded")


def _ranked_cells(side: Found, bold: bool = True) -> list[str]:
    if "against_ours" not in side:
        return [UNEQUAL, ""]
    ratio = f"{side['against_ours']['time_ratio']:.1f}"
    return [_time(side), f"**{ratio}**" if bold else ratio]


def sharing_table(shares: Sequence[Found]) -> list[str]:
    """Tokens of real data in steps of 64 pairs, over those of separate unpadded sequences."""
    lines = [
        "| data | pairs | shared within a pair | within a step, dealt randomly | within a step, by prompt "
        "| separate | padded, 8 a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in shares:
        separate = found["separate"]
        cells = [
            found[name] / separate for name in ("within_pairs", "random", "grouped", "separate", "padded")
        ]
        lines.append(
            f"| {found['data']} | {found['pairs']} | {' | '.join(f'{cell:.0%}' for cell in cells)} |"
        )
    return lines
