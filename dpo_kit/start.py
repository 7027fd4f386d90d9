"""What a run starts from, where its recipe has that made: SFT on a corpus, pairs of the policy's replies.

Both lie in the run folder, sft/model and pairs/, and are made once: a run that is resumed finds them, and
goes on with them only if they were made from what its recipe says (origin.json beside each).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_kit import ranks
from dpo_kit.candidates import HELD_OUT_FILE, PROMPTS_FILE, TRAIN_FILE, check_candidates, make_pairs
from dpo_kit.errors import InputError
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import ORIGIN_FILE, flat_keys, write_text
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
    """Make what is not in the folder yet; figures for summary.json.

    All ranks train the policy together; the first one samples candidates, and the others wait.

    Raises:
        InputError: what is there was made from another recipe; or as the making does.
    """
    is_made(recipe, folder)
    figures: dict[str, Any] = {}
    if recipe.sft is not None:
        if ranks.broadcast(not (folder / "sft" / "model").exists()):
            say("training the policy on the corpus")
            if ranks.is_first():
                _write_origin(folder / "sft", _origin_of_sft(recipe))
            train_sft(recipe.sft, recipe, folder / "sft")
        figures |= json.loads((folder / "sft" / "figures.json").read_text())
    if recipe.candidates is not None and ranks.is_first():
        if not (folder / "pairs" / "figures.json").exists():
            _write_origin(folder / "pairs", _origin_of_pairs(recipe))
        figures |= make_pairs(_after_sft(recipe, folder), folder / "pairs", say)
    return ranks.broadcast(figures)


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
    """Whether `make_start` has made all of it.

    Raises:
        InputError: there is a part that was made from another recipe.
    """
    has_policy = recipe.sft is None or (folder / "sft" / "model").exists()
    has_pairs = recipe.candidates is None or (folder / "pairs" / "figures.json").exists()
    begun = has_policy or (folder / "sft" / "checkpoints").exists()
    if recipe.sft is not None and begun:
        _check_origin(folder / "sft", _origin_of_sft(recipe))
    if recipe.candidates is not None and has_pairs:
        _check_origin(folder / "pairs", _origin_of_pairs(recipe))
    return has_policy and has_pairs


def _origin_of_sft(recipe: Recipe) -> dict[str, Any]:
    """What the policy is made from, defaults left out: a key that a later version adds is no difference."""
    assert recipe.sft is not None
    section = recipe.sft.model_dump(exclude_defaults=True)
    section["train"] = {k: v for k, v in recipe.sft.train.items() if k != "disable_tqdm"}
    return {"sft": section} | _origin_of_model(recipe)


def _origin_of_pairs(recipe: Recipe) -> dict[str, Any]:
    """What the pairs are made from: with a policy that is trained first, all that this is made from too."""
    assert recipe.candidates is not None
    origin = _origin_of_model(recipe) if recipe.sft is None else _origin_of_sft(recipe)
    origin["candidates"] = recipe.candidates.model_dump(exclude_defaults=True)
    origin["data"] = {"chat_template_kwargs": recipe.data.chat_template_kwargs}
    taken = [name for name in ("reward", "max_new_tokens") if getattr(recipe.candidates, name) is None]
    origin["eval"] = {name: getattr(recipe.eval, name) for name in ("prompts", *taken)}
    return origin


def _origin_of_model(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model.model_dump(
        exclude_defaults=True, exclude={"lora", "peft", "adapter", "quantization"}
    )
    return {"model": model, "train": {"seed": int(recipe.train.get("seed", 42))}}


def _write_origin(part: Path, origin: dict[str, Any]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    write_text(part / ORIGIN_FILE, json.dumps(origin, indent=1))


def _check_origin(part: Path, origin: dict[str, Any]) -> None:
    """Refuse what was made from something else; what an earlier version made does not say from what."""
    if not (part / ORIGIN_FILE).exists():
        return
    before = flat_keys(json.loads((part / ORIGIN_FILE).read_text(encoding="utf-8")))
    now = flat_keys(json.loads(json.dumps(origin)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise InputError(
                f"what is there was made with {_shown(before.get(key))} and the recipe says "
                f"{_shown(now.get(key))}",
                file=part,
                field=key,
                mend="Go on with the recipe as it was, remove this folder to have it made anew, or name "
                "another folder.",
            )


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)
