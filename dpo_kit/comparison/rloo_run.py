"""Carry a recipe out by RLOO through TRL, on the prompts of the pairs; folder and measurements as for PPO.

Of the section ppo, `reward`, `output_dir` and `settings` are read, the last as fields of TRL's RLOOConfig;
how far the policy goes is set by its `beta`. Rewards are taken as they are: the baseline of the prompt's
other replies takes their mean out, and `normalize_advantages` their scale.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers import set_seed

from dpo_kit.callbacks import MetricsFile
from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.comparison.rollout_run import Method, RolloutRun, carry_out
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.evaluation import Reward, load_reward
from dpo_kit.evaluation.reward_models import LearnedReward
from dpo_kit.evaluation.rewards import CheckedReward
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.run import lora_config, plain_policy
from dpo_kit.run_output import RunResult


def run_rloo(recipe: Recipe, *, resume: bool = False, say: Say = print) -> RunResult:
    """Train the policy of a recipe by RLOO, and write the run folder; see `rollout_run.carry_out`.

    `loss`, and of `train` the learning rate, batch and steps, are of no account here: see `rloo.make_config`.
    A learned reward judges each reply's text, closed by its end token, as in Best-of-N.

    Args:
        recipe: checked.
        resume: leave a finished run of this very recipe as it is; see there for any other.
        say: gets lines of progress.

    Raises:
        InputError: data, models and recipe do not fit together, or TRL is not installed.
        TrainingError: figures or weights are not finite any more.
    """
    return carry_out(RLOO, recipe, resume, say)


def _check(rloo: ModuleType, recipe: Recipe) -> None:
    """Refuse what would be read and not used. `ppo.normalise: false` is what RLOO does."""
    section = recipe.ppo
    if section.target_kl is not None:
        raise InputError("RLOO steers to no KL", field="ppo.target_kl", mend="Set beta in ppo.settings.")
    if section.value != "auto":
        raise InputError("RLOO learns no values", field="ppo.value", mend="Leave it out.")
    if recipe.reference.path is not None:
        raise InputError(
            "RLOO's reference is the policy as it was", field="reference.path", mend="Leave it out."
        )


def _settings(rloo: ModuleType, recipe: Recipe, config: PreferenceConfig) -> Any:
    return rloo.make_config(recipe.ppo.settings, config, recipe.eval.max_new_tokens)


def _train(rloo: ModuleType, run: RolloutRun) -> dict[str, Any]:
    reward, prompts = _reward(run), list(run.prompts.values())
    set_seed(run.settings.seed)
    trainer = rloo.Trainer(
        run.settings,
        run.policy,
        run.tokenizer,
        prompts=[list(ids) for ids in run.prompts],
        ends=run.ends,
        reward=lambda numbers, replies: reward([prompts[n] for n in numbers], replies),
        meter=run.meter,
        peft_config=lora_config(run.recipe),
    )
    run.policy = trainer.accelerator.unwrap_model(trainer.model)
    inner = reward.inner if isinstance(reward, CheckedReward) else reward
    learned = inner.model if isinstance(inner, LearnedReward) else None
    for model in (run.policy, trainer.ref_model, learned):
        if model is not None:
            run.meter.watch(model)
    callbacks = (rloo.Guard(), MetricsFile())
    return run.learn(trainer, lambda: plain_policy(trainer), callbacks, trainer.log_measured)


def _reward(run: RolloutRun) -> Reward:
    if run.reward is not None:
        return run.reward
    learned = trained_reward_model(run.recipe, run.folder / "reward_model", run.say)
    return load_reward(f"model:{learned}", field="reward_model.path")


RLOO = Method(
    name="rloo",
    check=_check,
    settings=_settings,
    reply_tokens=lambda settings: (settings.max_completion_length, "eval.max_new_tokens"),
    train=_train,
)
