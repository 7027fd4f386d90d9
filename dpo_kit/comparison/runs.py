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

# Sections of a recipe that only some commands read: a change there makes no other run of the others.
_READ_BY = {
    "ppo": ("ppo", "rloo"),
    "reward_model": ("ppo", "rloo", "best_of_n"),
    "best_of_n": ("best_of_n",),
}

# What all runs share, or what `_run` itself sets: a method that changed it would not be compared, or change
# nothing. Key -> what to do instead.
_SAME_FOR_ALL = "It is the same for all methods: set it in the recipe."
_NOT_OF_A_METHOD = dict.fromkeys(
    ("model", "sft", "candidates", "frontier", "eval", "reward_model.loss", "reward_model.train"),
    _SAME_FOR_ALL,
) | {
    "train.seed": "Name the method's seeds in `seeds`.",
    "train.output_dir": "It follows from frontier.output_dir.",
    "ppo.output_dir": "It follows from frontier.output_dir.",
}
_OF_A_METHOD = ("eval.every",)


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

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(str(self.recipe.train["output_dir"]))


def output_folder(recipe: Recipe) -> Path:
    """The folder of a comparison."""
    assert recipe.frontier is not None
    default = f"{recipe.training_config().output_dir}-frontier"
    return Path(recipe.frontier.output_dir or default)


def quick_form(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe's content with `frontier.quick` set in it, each key as a whole.

    Raises:
        InputError: it has none.
    """
    changed = copy.deepcopy(content)
    section = changed.get("frontier")
    quick = section.get("quick") if isinstance(section, dict) else None
    if not isinstance(quick, dict) or not quick:
        raise InputError("the recipe has no quick form", field="frontier.quick", mend="Name what it changes.")
    for key, value in quick.items():
        set_key(changed, str(key), value)
    return changed


def runs_of(recipe: Recipe, folder: Path) -> list[Run]:
    """Every run of a comparison, in the order of the recipe.

    Raises:
        InputError: naming the method whose settings do not make a recipe.
    """
    assert recipe.frontier is not None
    base = started(recipe, folder / "start").model_dump() | {"frontier": None}
    base["reward_model"]["path"] = base["reward_model"]["path"] or str(folder / "reward_model" / "model")
    # A cache of the comparison's own, so that what the reference takes is counted.
    base["reference"]["cache_dir"] = base["reference"]["cache_dir"] or str(folder / "reference")
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
    name = "-".join(filter(None, [method, re.sub(r"[^\w.=+-]+", "-", setting), f"seed{seed}"]))
    unread = [key for key, readers in _READ_BY.items() if section.command not in readers]
    content = {key: copy.deepcopy(value) for key, value in base.items() if key not in unread}
    place = str(folder / "runs" / name)
    changes = section.set | swept
    for key in changes:
        _check_key(method, key)
    changes |= {"train.seed": seed, "train.output_dir": place}
    if "ppo" not in unread:
        changes["ppo.output_dir"] = place
    try:
        for key, value in changes.items():
            set_key(content, key, copy.deepcopy(value))
        recipe = Recipe.check(content)
    except InputError as error:
        field = f"frontier.methods.{method}: {error.field}"
        raise InputError(error.problem, field=field, mend=error.mend) from error
    return Run(method, section.label, section.command, setting, seed, name, recipe)


def _check_key(method: str, key: str) -> None:
    """Refuse what no method may set by itself."""
    for name, mend in _NOT_OF_A_METHOD.items():
        if key not in _OF_A_METHOD and f"{key}.".startswith(f"{name}."):
            field = f"frontier.methods.{method}: {key}"
            raise InputError("a method cannot change this", field=field, mend=mend)
