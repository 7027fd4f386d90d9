"""What a comparison cannot be carried out with, told before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_kit.comparison.ppo_run import PPO
from dpo_kit.comparison.rloo_run import RLOO
from dpo_kit.comparison.rollout_run import check_ahead, text_reward
from dpo_kit.comparison.runs import Run
from dpo_kit.errors import InputError
from dpo_kit.measurement import Samples
from dpo_kit.recipe import Recipe
from dpo_kit.start import check_start


def check_comparison(recipe: Recipe, runs: Sequence[Run]) -> None:
    """Refuse what would be found too late: in the first run, or when the tables are made.

    Raises:
        InputError: naming the key, and the method where it is a method's.
    """
    if recipe.model.path is None and recipe.sft is None:
        raise InputError(
            "each run would start from other random weights",
            field="model.config",
            mend="Name model.path, or train the policy first: the section sft.",
        )
    check_start(recipe)
    samples = Samples.of(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"prompts": None})}))
    has_prompts = recipe.eval.prompts or (recipe.candidates is not None and recipe.candidates.evaluation)
    if samples.reward is None or not has_prompts:
        missing = "eval.reward" if samples.reward is None else "eval.prompts"
        raise InputError("a frontier is of rewards on prompts", field=missing, mend="Name it in the recipe.")
    if not samples.has_kl:
        raise InputError(
            "the KL is of a policy as it is",
            field="eval.temperature",
            mend="Set temperature and top_p of eval to 1.",
        )
    # A reward may be a large model: each is loaded once, to see that it can be. The true one was.
    loaded = {"true"}
    for run in runs:
        if run.command in ("ppo", "rloo"):
            try:
                check_ahead({"ppo": PPO, "rloo": RLOO}[run.command], run.recipe)
                if run.recipe.ppo.reward not in loaded:
                    text_reward(run.recipe)
                    loaded.add(run.recipe.ppo.reward)
            except InputError as error:
                field = f"frontier.methods.{run.method}: {error.field or run.command}"
                raise InputError(error.problem, field=field, mend=error.mend) from error
