"""A comparison's folder holds one comparison, of one set of files.

sources.json keeps the digests of the files that the recipe names: data, corpus, prompts, rewards in Python.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from dpo_kit.comparison.execute import FREE_KEYS
from dpo_kit.comparison.runs import Run
from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import flat_keys, write_text
from dpo_kit.yaml_file import read_yaml

SOURCES_FILE = "sources.json"

# What may be another when a comparison goes on: a run whose own recipe changed is put aside and made anew.
_FREE = ("frontier", "ppo", "best_of_n", "report", *FREE_KEYS)


def open_folder(folder: Path, recipe: Recipe, runs: Sequence[Run]) -> None:
    """Write recipe.yaml and sources.json.

    Raises:
        InputError: the folder is another comparison's, or a file that the recipe names was changed since.
    """
    resolved = recipe.resolved(recipe.training_config())
    place = folder / "recipe.yaml"
    if place.exists():
        before = flat_keys(read_yaml(place)[0])
        now = flat_keys(json.loads(json.dumps(resolved)))
        for key in sorted(before.keys() | now.keys()):
            if key.startswith(tuple(f"{free}." for free in _FREE)) or key in _FREE:
                continue
            if before.get(key) != now.get(key):
                raise InputError(
                    f"the comparison here has {before.get(key)!r} and would go on with {now.get(key)!r}",
                    file=folder,
                    field=key,
                    mend="Go on with the recipe as it was, or name another folder in frontier.output_dir.",
                )
    sources = _checked_sources(folder, recipe, runs)
    write_text(place, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    write_text(folder / SOURCES_FILE, json.dumps(sources, indent=1))


def _checked_sources(folder: Path, recipe: Recipe, runs: Sequence[Run]) -> dict[str, str]:
    """File -> digest: of all that the comparison has ever named."""
    place = folder / SOURCES_FILE
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    found = {str(path): _digest(path) for path in _files(folder, recipe, runs)}
    for path, digest in found.items():
        if known.get(path, digest) != digest:
            raise InputError(
                f"this file was changed since the comparison in {folder} began: what is measured there is "
                "of the file as it was",
                file=path,
                mend="Name another folder in frontier.output_dir; or put the file back; or, where the change "
                f"makes no difference, remove {place}.",
            )
    return known | found


def _files(folder: Path, recipe: Recipe, runs: Sequence[Run]) -> list[Path]:
    """The files named by the recipe and its runs, but for those that the comparison makes itself."""
    named = [recipe.eval.prompts, *(recipe.sft.corpus if recipe.sft else [])]
    rewards = [recipe.eval.reward]
    if recipe.candidates is not None:
        named += recipe.candidates.source
        rewards.append(recipe.candidates.reward)
    for each in (recipe, *(run.recipe for run in runs)):
        named += [*each.data.train, *each.data.eval]
        rewards.append(each.ppo.reward)
    # FILE.py:FUNCTION; what names no file is a model.
    named += [reward.rpartition(":")[0] for reward in rewards if reward]
    found: dict[Path, None] = {}
    for name in dict.fromkeys(filter(None, named)):
        paths = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        for path in paths:
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            found |= dict.fromkeys(file for file in inside if file.is_file())
    return [path for path in found if folder.resolve() not in path.resolve().parents]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
