"""All results of `make bench` -> speed.md: what the README shows first, and the details under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from machine import DISTURBED, machine_in_words
from tables import (
    comparison_details,
    comparison_table,
    ranked_table,
    sharing_table,
    side_in_words,
    task_in_words,
)

PICTURES = {
    "curves-time.png": "Time per pair against pairs in a step, length, vocabulary, replies per prompt",
    "curves-memory.png": "Peak memory against the same",
}


def report(results: Mapping[str, Any]) -> str:
    """The page; pictures are linked by name, as they lie beside it."""
    comparisons, ranked = results.get("speed", []), results.get("ranked", [])
    lines = ["# Speed and memory", "", f"{machine_in_words(results['machine'])}.{_warning(results)}", ""]
    if results["settings"]["quick"] == "True":
        lines += ["**A quick run on tiny models: it shows that all works, and its times mean nothing.**", ""]
    if comparisons:
        lines += [*comparison_table(comparisons), "", *_legend(), ""]
    if ranked:
        lines += ["Ranked replies, all pairs of four; dpo_kit against itself with less shared:", ""]
        lines += [*ranked_table(ranked), ""]
    if results.get("shares"):
        lines += ["Tokens to compute, of those of separate unpadded sequences, in steps of 64 pairs:", ""]
        lines += [*sharing_table(results["shares"]), ""]
    lines += _curves(results.get("curves", {}))
    lines += ["## Details", ""]
    for found in (*comparisons, *ranked):
        against = ", ".join(side_in_words(name, found) for name in found["sides"] if name != found["ours"])
        lines += [
            f"### {task_in_words(found['task'])}: against {against}",
            "",
            *comparison_details(found),
            "",
        ]
    return "\n".join(lines)


def _legend() -> list[str]:
    return [
        "One epoch, same weights, pairs, order and arguments. 1 + 2 s: 1 s to compute the reference's "
        "log-probs ahead, 2 s of training, which the ratio is of. The share of the limit is dpo_kit's: the "
        "time of the least arithmetic at the machine's measured rate of matrix products, over the time taken."
    ]


def _curves(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in found.get("pictures", []):
        lines += [f"![{PICTURES[name]}]({name})", ""]
    if found:
        model = found["model"]
        lines += [
            f"The curves' model: {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, "
            f"{found['dtype']}, {found['threads']} threads; but where it is what varies, the vocabulary is "
            f"{model['vocab_size']} and prompts and replies have 64 tokens.",
            "",
        ]
    if found.get("unequal"):
        left_out = ", ".join(found["unequal"])
        lines += [f"**Left out, because they did not compute what dpo_kit computed: {left_out}.**", ""]
    return lines


def _warning(results: Mapping[str, Any]) -> str:
    every = (*results.get("speed", ()), *results.get("ranked", ()))
    cores = max((found["others_cores"] for found in every), default=0.0)
    if cores <= DISTURBED:
        return ""
    return f" **Other processes took up to {cores:.1f} cores meanwhile: the times are not to be trusted.**"
