"""What each method takes, and what all of them share -> costs.csv."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kit.comparison.execute import REFERENCE_FILE, outcome
from dpo_kit.comparison.results import comparison_in, measurements, write_table
from dpo_kit.comparison.runs import Run

FIGURES = ("seconds", "tokens", "tokens_sampled", "peak_memory_bytes")
COLUMNS = ("method", "label", "runs", *FIGURES, "reward", "kl", "times_dpo", "diverged")


def write_costs(folder: Path) -> None:
    """costs.csv: a row for each method, means over its finished runs; then the shared work.

    `seconds` are of training; log-probs of a cached reference, computed ahead, are shared work. `reward` and
    `kl` are of the method's best run at its end. `times_dpo` are its seconds over those of `dpo`, or of the
    recipe's first method where it has none of that name.
    """
    recipe, runs = comparison_in(folder)
    assert recipe.frontier is not None
    rows = [
        {"method": method, "label": section.label} | _of_runs([run for run in runs if run.method == method])
        for method, section in recipe.frontier.methods.items()
    ]
    base = next((row for row in rows if row["method"] == "dpo"), rows[0]).get("seconds")
    for row in rows:
        if base and "seconds" in row:
            row["times_dpo"] = row["seconds"] / base
    write_table(folder / "costs.csv", COLUMNS, rows + _shared(folder))


def _of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    done = [run for run in runs if outcome(run) == "done"]
    found: dict[str, Any] = {"runs": len(done), "diverged": sum(outcome(run) == "diverged" for run in runs)}
    figures = [_of_summary(_read(run.folder / "summary.json")) for run in done]
    for name in FIGURES:
        values = [each[name] for each in figures if name in each]
        if values:
            found[name] = sum(values) / len(values)
    ends = [lines[-1] for run in done if (lines := measurements(run.folder))]
    if ends:
        best = max(ends, key=lambda line: line["eval_reward"])
        found |= {"reward": best["eval_reward"], "kl": best["eval_kl"]}
    return found


def _of_summary(summary: dict[str, Any]) -> dict[str, float]:
    found = {name: summary[name] for name in FIGURES[1:] if name in summary}
    if "train_runtime" in summary:
        found["seconds"] = summary["train_runtime"] + summary.get("reference_runtime", 0.0)
    return found


def _shared(folder: Path) -> list[dict[str, Any]]:
    """What is made once: SFT policy, the candidates that pairs are made of, reward model, reference."""
    sft = _read(folder / "start" / "sft" / "figures.json")
    pairs = _read(folder / "start" / "pairs" / "figures.json")
    reward_model = _read(folder / "reward_model" / "summary.json")
    reference = _read(folder / REFERENCE_FILE)
    work: list[tuple[str, str, dict[str, Any]]] = [
        ("sft", "SFT", {"seconds": sft.get("sft/runtime"), "tokens": sft.get("sft/tokens")}),
        ("candidates", "Candidates", {name: pairs.get(f"candidates/{name}") for name in FIGURES}),
        ("reward_model", "Reward model", _of_summary(reward_model)),
        (
            "reference",
            "Reference's log-probs",
            {
                "seconds": reference.get("reference_runtime"),
                "tokens": reference.get("reference_tokens"),
            },
        ),
    ]
    return [
        {"method": name, "label": label, "runs": 1} | figures
        for (name, label, figures), made in zip(work, (sft, pairs, reward_model, reference), strict=True)
        if made
    ]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
