"""The runs of a comparison: each method's settings and seeds as ordinary recipes from one start."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe
from dpo_kit.recipe_sections import MethodSection
from dpo_kit.start import started
from dpo_kit.yaml_file import set_key


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        method: its key in `frontier.methods`.
        label: of the method, for people.
        command: that carries it out: train, ppo, rloo or best_of_n.
        setting: what is swept, as `beta=0.1`; empty where nothing is.
        seed: `train.seed`.
        name: of its folder.
        recipe: ordinary, checked, with `train.output_dir` the run's folder.
    """

    method: str
    label: str
    command: str
    setting: str
    seed: int
    name: str
    recipe: Recipe


def output_folder(recipe: Recipe) -> Path:
    """The folder of a comparison."""
    assert recipe.frontier is not None
    default = f"{recipe.training_config().output_dir}-frontier"
    return Path(recipe.frontier.output_dir or default)


def quick_form(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe's content with `frontier.quick` set in it."""
    changed = copy.deepcopy(content)
    for key, value in (changed.get("frontier") or {}).get("quick", {}).items():
        set_key(changed, key, value)
    return changed


def runs_of(recipe: Recipe, folder: Path) -> list[Run]:
    """Every run of a comparison, in the order of the recipe.

    Raises:
        InputError: naming the method whose settings do not make a recipe.
    """
    assert recipe.frontier is not None
    base = started(recipe, folder / "start").model_dump() | {"frontier": None}
    base["reward_model"]["path"] = base["reward_model"]["path"] or str(folder / "reward_model" / "model")
    base["report"] = {"enabled": False}
    found = []
    for method, section in recipe.frontier.methods.items():
        for values in product(*section.sweep.values()):
            for seed in section.seeds:
                swept = dict(zip(section.sweep, values, strict=True))
                found.append(_run(base, folder, method, section, swept, seed))
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two runs are named {twice}", field="frontier.methods", mend="Leave one out.")
    return found


def _run(
    base: dict[str, Any], folder: Path, method: str, section: MethodSection, swept: dict[str, Any], seed: int
) -> Run:
    setting = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in swept.items())
    name = "-".join(filter(None, [method, re.sub(r"[^\w.=]+", "-", setting), f"seed{seed}"]))
    content = copy.deepcopy(base)
    place = str(folder / "runs" / name)
    changes = section.set | swept | {"train.seed": seed, "train.output_dir": place, "ppo.output_dir": place}
    try:
        for key, value in changes.items():
            set_key(content, key, copy.deepcopy(value))
        recipe = Recipe.check(content)
    except InputError as error:
        field = f"frontier.methods.{method}: {error.field}"
        raise InputError(error.problem, field=field, mend=error.mend) from error
    return Run(method, section.label, section.command, setting, seed, name, recipe)
