"""The reward model of a comparison: an ordinary run on the same pairs, from the same policy."""

from __future__ import annotations

from pathlib import Path

from dpo_kit.evaluation.reward_models import load_learned_reward
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.recipe_sections import (
    BestOfNSection,
    EvalSection,
    PpoSection,
    ReferenceSection,
    RewardModelSection,
)
from dpo_kit.run import run_recipe


def reward_model_recipe(recipe: Recipe, output_dir: str | Path) -> Recipe:
    """The recipe that trains the reward model as `recipe.reward_model` says.

    Everything about the policy that is not about the data is left out, so that a change there does not
    make another reward model of it.

    Args:
        recipe: one that has its policy and pairs (`dpo_kit.start.started`).
        output_dir: of the run.

    Raises:
        InputError: the settings do not make a recipe.
    """
    section = recipe.reward_model
    content = recipe.model_dump()
    content |= {
        "loss": section.loss,
        "train": recipe.train | section.train | {"output_dir": str(output_dir)},
        "reference": ReferenceSection().model_dump(),
        "eval": EvalSection().model_dump(),
        "reward_model": RewardModelSection().model_dump(),
        "ppo": PpoSection().model_dump(),
        "best_of_n": BestOfNSection().model_dump(),
        "frontier": None,
        "report": {"enabled": False},
    }
    return Recipe.check(content)


def trained_reward_model(recipe: Recipe, folder: Path, say: Say) -> Path:
    """The folder of the reward model: the one that the recipe names, or one that is trained now.

    Args:
        recipe: one that has its policy and pairs (`dpo_kit.start.started`).
        folder: of the run that trains it; one that stands there is gone on with, or taken as it is where it
            is finished. Its summary.json has the accuracy on held-out pairs, `eval/accuracy`.
        say: gets lines of progress.

    Raises:
        InputError: what the recipe names is no reward model, or the settings do not make a run.
        TrainingError: training had to stop.
    """
    given = recipe.reward_model.path
    if given is not None:
        load_learned_reward(given, field="reward_model.path")
        return Path(given)
    say("training the reward model")
    result = run_recipe(reward_model_recipe(recipe, folder), resume=True, say=say)
    if (accuracy := result.summary.get("eval/accuracy")) is not None:
        say(f"the reward model is right on {accuracy:.1%} of the held-out pairs")
    return result.folder / "model"
