"""The figures of a run's summary: their names and units in words, the headline cards, the full table.

A figure that a run lacks is left out, not guessed; a key that is not known here is shown as it stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_kit.report.run_folder import Run
from dpo_kit.report.words import words_of

MISSING = "–"


@dataclass(frozen=True)
class Card:
    """One headline figure: what it is, its value in words, and what it is to be read against."""

    label: str
    value: str
    note: str = ""


def number(value: float) -> str:
    """Three decimals below ten, fewer above; integers in full; a true minus sign."""
    size = abs(value)
    if isinstance(value, int):
        text = f"{value:,}"
    elif not math.isfinite(value) or value == 0:
        text = f"{value:.0f}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.01:
        text = f"{value:.3f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def amount(count: float) -> str:
    """A count that nobody reads to its last digit."""
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:,.0f}"


FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "eval/accuracy": ("Held-out accuracy", number),
    "eval/accuracy_ceiling": ("Accuracy ceiling (label noise)", number),
    "eval/rewards/accuracies_chosen_longer": ("Held-out accuracy, chosen reply longer", number),
    "eval/rewards/accuracies_chosen_shorter": ("Held-out accuracy, chosen reply shorter", number),
    "eval/rewards/top1": ("Held-out share with the best reply on top", number),
    "eval/rewards/margins": ("Held-out margin", number),
    "eval/loss": ("Held-out loss", number),
    "eval/reward_before": ("Mean reward of samples, before", number),
    "eval/reward_after": ("Mean reward of samples, after", number),
    "eval/kl": ("KL to the reference (nats)", number),
    "pairs_per_second": ("{examples} per second", number),
    "tokens_saved_share": ("Tokens saved by the tree", percent),
    "peak_memory_bytes": ("Peak memory", memory),
    "train_runtime": ("Training time", duration),
    "tokens": ("Tokens computed", amount),
    "tokens_sampled": ("Tokens sampled to learn from", amount),
    "reference_runtime": ("Time of the reference's log-probs", duration),
    "reference_computed": ("Reference sequences computed", number),
}


def cards(run: Run) -> list[Card]:
    """The headline figures of a run, those it has, in the order of importance."""
    found = [_accuracy_card(run), _reward_card(run)]
    plain = {
        "eval/kl": ("KL to the reference", "nats"),
        "pairs_per_second": ("Speed", f"{words_of([run]).examples} per second"),
        "tokens_saved_share": ("Tokens saved by the tree", "prefixes computed once"),
        "peak_memory_bytes": ("Peak memory", ""),
        "train_runtime": ("Training time", ""),
        "tokens": ("Tokens computed", _sampled_clause(run)),
    }
    for key, (label, note) in plain.items():
        value = run.figure(key)
        found.append(None if value is None else Card(label, FIGURES[key][1](value), note))
    return [card for card in found if card is not None]


def _sampled_clause(run: Run) -> str:
    sampled = run.figure("tokens_sampled")
    return f"{amount(sampled)} sampled to learn from" if sampled else "by any model"


def held_out_accuracy(run: Run) -> tuple[float, str] | None:
    """Accuracy on held-out pairs and where it comes from: the summary, else the last evaluation."""
    value = run.figure("eval/accuracy")
    if value is not None:
        return value, "at the end"
    steps, values = run.curve("eval_rewards/accuracies")
    return (float(values[-1]), f"at step {steps[-1]}") if len(steps) else None


def _accuracy_card(run: Run) -> Card | None:
    accuracy, ceiling = held_out_accuracy(run), run.figure("eval/accuracy_ceiling")
    if accuracy is None:
        return None
    note = accuracy[1] if ceiling is None else f"ceiling {number(ceiling)} (label noise)"
    return Card("Held-out accuracy", number(accuracy[0]), note)


def _reward_card(run: Run) -> Card | None:
    before, after = run.figure("eval/reward_before"), run.figure("eval/reward_after")
    if after is None:
        return None
    if before is None:
        return Card("Mean reward of samples", number(after), "after training")
    return Card("Mean reward of samples", f"{number(before)} → {number(after)}", "before → after training")


def summary_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows (name, one cell per run) of every known summary figure that any of the runs has."""
    examples = words_of(runs).examples.capitalize()
    return [
        (name.format(examples=examples), [_cell(run, key) for run in runs])
        for key, (name, _) in FIGURES.items()
        if any(key in (run.summary or {}) for run in runs)
    ]


def other_figures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows (key, one cell per run) of whatever else the runs' summaries hold."""
    # "recipe" is a digest, by which a resumed run is known.
    other = sorted({key for run in runs for key in (run.summary or {})} - {*FIGURES, "recipe"})
    return [(key, [_cell(run, key) for run in runs]) for key in other]


def _cell(run: Run, key: str) -> str:
    value, amount = (run.summary or {}).get(key), run.figure(key)
    if value is None:
        return MISSING
    if amount is None:
        return as_text(value)
    return FIGURES[key][1](amount) if key in FIGURES else number(amount)


def as_text(value: Any) -> str:
    """A value of a recipe or summary on one line; strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def recipe_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows (dotted key, one cell per run) of the recipe keys that are not the same in all runs."""
    flat = [_flatten(run.recipe) for run in runs]
    rows = []
    for key in dict.fromkeys(key for recipe in flat for key in recipe):
        if any(key not in recipe or recipe[key] != flat[0].get(key) for recipe in flat):
            rows.append((key, [as_text(recipe[key]) if key in recipe else MISSING for recipe in flat]))
    return rows


def _flatten(mapping: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
