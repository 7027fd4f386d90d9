"""A comparison's folder with invented numbers, in the formats that a comparison writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpo_kit.comparison import costs, matched, results
from dpo_kit.recipe import Recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "sentiment-small.yaml"
START = 0.4
PROMPTS = 40
LEVELS = [2.0, 5.0, 10.0, 15.0, 20.0]


@dataclass(frozen=True)
class Method:
    """How an invented method fares: reward rises to `height` above the start with a KL scale of `scale`, and
    falls by `fall` a nat beyond KL 12; its runs end at the KLs of `ends` after `seconds`."""

    label: str
    settings: dict[str, float]
    height: float
    scale: float = 4.0
    fall: float = 0.0
    seconds: float = 40.0
    tokens: float = 2e6
    command: str = "train"

    def reward(self, kl: float) -> float:
        return START + self.height * (1 - math.exp(-kl / self.scale)) - self.fall * max(0.0, kl - 12)


METHODS = {
    "dpo": Method("DPO", {"beta=0.05": 24, "beta=0.1": 15, "beta=1": 5, "beta=5": 1.2}, 2.6, 3.2, 0.04),
    "unlikelihood": Method(
        "Unlikelihood", {f"alpha={a}": kl for a, kl in ((0.05, 6), (0.1, 9), (0.5, 22), (1, 41))},
        0.7, 3, 0.1,
    ),
    "log_ratio": Method("Log-ratio (naive)", {"": 212}, 1.1, 3, 0.02),
    "preferred_ft": Method("Preferred-FT", {"": 3.1}, 0.6, 2.0),
    "ppo": Method("PPO", {f"target_kl={k}": k * 1.1 for k in (3, 6, 9, 12)}, 1.7, 4, 0, 300, 3e7, "ppo"),
    "ppo_gt": Method(
        "PPO-GT", {f"target_kl={k}": 1.2 * k for k in (3, 6, 9, 12)}, 2.2, 4, 0, 310, 3e7, "ppo"
    ),
    "ppo_gt_trl": Method(
        "PPO-GT (TRL's settings)",
        {f"kl_coef={k}": kl for k, kl in ((0.02, 18), (0.05, 9), (0.1, 5), (0.2, 2))},
        1.2, 5, 0, 305, 3e7, "ppo",
    ),
    "rloo": Method("RLOO", {"target_kl=6": 7}, 1.9, 4, 0, 280, 2.6e7, "rloo"),
    "best_of_n": Method("Best-of-N", {}, 2.0, 1.6, 0, 1, 1e5, "best_of_n"),
}  # fmt: skip


def write_comparison_folder(
    folder: Path, heights: dict[str, float] | None = None, without: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """A folder of all methods but those `without`, with other heights of reward for some."""
    rng = np.random.default_rng(seed)
    heights = heights or {}
    noise = rng.normal(0, 1.1, PROMPTS)
    rows: list[dict[str, Any]] = []
    for key, method in METHODS.items():
        if key not in without:
            changed = Method(**{**vars(method), "height": heights.get(key, method.height)})
            rows += _best_of_n(key, changed) if method.command == "best_of_n" else _trained(key, changed)
    (folder / "runs").mkdir(parents=True)
    first = [row for row in rows if row["step"] == 0][:1]
    for row in rows:
        row["reward"] += rng.normal(0, 0.04) if row["step"] else 0.0
        _replies(folder / "runs" / row["run"], row, noise)
        (folder / "runs" / f"{row['run']}.log").write_text("training\nthe end\n")
    start = [row | {"method": "sft", "setting": "", "seconds": 0, "tokens": 0} for row in first]
    results.write_table(folder / "frontier.csv", results.FRONTIER_COLUMNS, start + rows)
    results.write_table(folder / "matched.csv", matched.COLUMNS + matched.DIFFERENCES, _matched(rows))
    results.write_table(folder / "costs.csv", costs.COLUMNS, _costs(rows))
    results.write_table(folder / "runs.csv", results.RUN_COLUMNS, _runs(rows))
    content = Recipe.load(RECIPE).model_dump()
    methods = {key: {"label": m.label, "command": m.command} for key, m in METHODS.items()}
    content["frontier"] |= {"methods": methods, "kl_levels": LEVELS, "quick": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
    return folder


def _trained(key: str, method: Method) -> list[dict[str, Any]]:
    rows = []
    for setting, end in method.settings.items():
        run = "-".join(filter(None, [key, setting, "seed0"]))
        for step in range(0, 121, 20):
            kl = end * (1 - math.exp(-3 * step / 120)) / (1 - math.exp(-3))
            share = step / 120
            rows.append(
                {
                    "method": key, "setting": setting, "seed": 0, "step": step, "reward": method.reward(kl),
                    "kl": kl, "seconds": method.seconds * share, "tokens": int(method.tokens * share),
                    "run": run,
                }
            )  # fmt: skip
    return rows


def _best_of_n(key: str, method: Method) -> list[dict[str, Any]]:
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64, 128):
        kl = math.log(n) - (n - 1) / n
        rows.append(
            {
                "method": key, "setting": f"n={n}", "seed": 0, "step": n, "reward": method.reward(kl),
                "kl": kl, "seconds": n * method.seconds, "tokens": int(n * method.tokens),
                "run": "best_of_n-seed0",
            }
        )  # fmt: skip
    return rows


def _replies(run: Path, row: dict[str, Any], noise: np.ndarray) -> None:
    place = run / "evaluations"
    place.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "prompt": f"This film {i}", "reply": f" was seen by {run.name} at {row['step']}.", "tokens": 9,
            "reward": row["reward"] + e, "kl": row["kl"],
        }
        for i, e in enumerate(noise - noise.mean())
    ]  # fmt: skip
    (place / f"step-{row['step']}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _matched(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewards at levels with intervals of ±0.2, and differences from DPO of ±0.25."""
    best = {(key, level): _best_at(rows, key, level) for key in METHODS for level in LEVELS}
    found = []
    for (key, level), row in best.items():
        line: dict[str, Any] = {"method": key, "label": METHODS[key].label, "kl": level}
        if row is not None:
            value = row["reward"]
            line |= {"reward": value, "low": value - 0.2, "high": value + 0.2, "run": row["run"]}
            if key != "dpo" and (dpo := best["dpo", level]) is not None:
                above = dpo["reward"] - value
                line |= {"difference": above}
                line |= {"difference_low": above - 0.25, "difference_high": above + 0.25}
        found.append(line)
    return found


def _best_at(rows: list[dict[str, Any]], key: str, level: float) -> dict[str, Any] | None:
    points = [row for row in rows if row["method"] == key]
    if not points or max(row["kl"] for row in points) < level:
        return None
    return max((row for row in points if row["kl"] <= level), key=lambda row: row["reward"])


def _runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {row["run"]: row for row in rows}
    return [
        {name: row[name] for name in ("run", "method", "setting", "seed", "step", "reward", "kl")}
        | {"label": METHODS[row["method"]].label, "outcome": "done"}
        for row in last.values()
    ]


def _costs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {"method": "sft", "label": "SFT", "runs": 1, "seconds": 70, "tokens": 3_000_000},
        {"method": "candidates", "label": "Candidates", "runs": 1, "seconds": 45, "tokens": 900_000},
        {"method": "reward_model", "label": "Reward model", "runs": 1, "seconds": 38, "tokens": 1_200_000},
    ]
    for key, method in METHODS.items():
        points = [row for row in rows if row["method"] == key]
        if points:
            last = max(points, key=lambda row: row["reward"])
            found.append(
                {
                    "method": key, "label": method.label, "runs": max(len(method.settings), 1),
                    "seconds": method.seconds, "tokens": int(method.tokens),
                    "tokens_sampled": 260_000 if method.command != "train" else "",
                    "peak_memory_bytes": 900 * 2**20, "times_dpo": method.seconds / 40, "diverged": 0,
                    "reward": last["reward"], "kl": last["kl"],
                }
            )  # fmt: skip
    return found
