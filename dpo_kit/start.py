"""What a run starts from, where its recipe has that made: SFT on a corpus, pairs of the policy's replies.

Both lie in the run folder, sft/model and pairs/, and are made once: a run that is resumed finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_kit.candidates import HELD_OUT_FILE, PROMPTS_FILE, TRAIN_FILE, check_candidates, make_pairs
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.sft import check_corpus, train_sft


def check_start(recipe: Recipe) -> None:
    """Refuse what would stop `make_start`, before anything is written.

    Raises:
        InputError: a source, the settings or the configuration.
    """
    if recipe.sft is not None:
        check_corpus(recipe)
    if recipe.candidates is not None:
        check_candidates(recipe)


def make_start(recipe: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Make what is not in the folder yet; figures for summary.json."""
    figures: dict[str, Any] = {}
    if recipe.sft is not None:
        if not (folder / "sft" / "model").exists():
            say("training the policy on the corpus")
            train_sft(recipe.sft, recipe, folder / "sft")
        figures |= json.loads((folder / "sft" / "figures.json").read_text())
    if recipe.candidates is not None:
        figures |= make_pairs(_after_sft(recipe, folder), folder / "pairs", say)
    return figures


def started(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe that goes on from what `make_start` made; the recipe itself where it has nothing made."""
    found = _after_sft(recipe, folder)
    if found.candidates is None:
        return found
    pairs, section = folder / "pairs", found.candidates
    data = {
        "train": [str(pairs / TRAIN_FILE)],
        "eval": [str(pairs / HELD_OUT_FILE)] if section.held_out else [],
    }
    prompts = found.eval.prompts or (str(pairs / PROMPTS_FILE) if section.evaluation else None)
    return found.model_copy(
        update={
            "candidates": None,
            "data": found.data.model_copy(update=data),
            "eval": found.eval.model_copy(update={"prompts": prompts}),
        }
    )


def _after_sft(recipe: Recipe, folder: Path) -> Recipe:
    if recipe.sft is None:
        return recipe
    trained = {"path": str(folder / "sft" / "model"), "config": None, "tokenizer": None}
    return recipe.model_copy(update={"sft": None, "model": recipe.model.model_copy(update=trained)})


def is_made(recipe: Recipe, folder: Path) -> bool:
    """Whether `make_start` has made all of it."""
    has_policy = recipe.sft is None or (folder / "sft" / "model").exists()
    return has_policy and (recipe.candidates is None or (folder / "pairs" / "figures.json").exists())
