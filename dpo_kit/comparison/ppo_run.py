"""Carry a recipe out by PPO through TRL, on the prompts of the pairs (`dpo-kit ppo`); see `rollout_run`."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from dpo_kit.callbacks import MetricsFile
from dpo_kit.comparison.ppo_callbacks import Guard, KlSteering, Lines
from dpo_kit.comparison.ppo_models import TextReward, padding_token, value_model_of
from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.comparison.rollout_run import Method, RolloutRun, carry_out
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.measurement import Say
from dpo_kit.models import embedded_tokens, load_model, load_reward_model
from dpo_kit.recipe import Recipe
from dpo_kit.run import lora_config
from dpo_kit.run_output import RunResult

# Prompts that the first policy is sampled on to know the scale of its rewards.
_SCALE_PROMPTS = 256
_ADVICE = (
    "Nothing was saved. Lower ppo.settings.learning_rate, raise kl_coef, or set ppo.normalise: a reward "
    "that is far from 0 or large drives the policy off at once."
)


def run_ppo(recipe: Recipe, *, resume: bool = False, say: Say = print) -> RunResult:
    """Train the policy of a recipe by PPO, and write the run folder; see `rollout_run.carry_out`.

    `loss`, and of `train` the learning rate, batch and steps, are of no account here: those of PPO are
    `ppo.settings` (see `ppo.make_config` for what is TRL's default and what is not).

    A learned reward judges a reply at its last token. That of a reply that reached its longest length is
    none that the reward model was trained at: the replies of the pairs end with an end token, which Best-of-N
    appends and TRL does not. `ppo.settings.missing_eos_penalty` is TRL's means against such replies.

    Args:
        recipe: checked.
        resume: leave a finished run of this very recipe as it is; see there for any other.
        say: gets lines of progress.

    Raises:
        InputError: data, models and recipe do not fit together, or TRL's PPO is not installed.
        TrainingError: figures or weights are not finite any more.
    """
    return carry_out(PPO, recipe, resume, say)


def _check(ppo: ModuleType, recipe: Recipe) -> None:
    ppo.check_settings(recipe.ppo.settings)


def _settings(ppo: ModuleType, recipe: Recipe, config: PreferenceConfig) -> Any:
    return ppo.make_config(recipe.ppo.settings, config, recipe.eval.max_new_tokens)


def _train(ppo: ModuleType, run: RolloutRun) -> dict[str, Any]:
    section = run.recipe.ppo
    trainer = _make_trainer(ppo, run, _reward_folder(run))
    run.policy = trainer.policy_model

    def first() -> dict[str, float]:
        return _normalise(ppo, trainer, run) if section.normalise else {}

    # In this order: a line is complete before it is written, and what is lost is not measured.
    guard = Guard(lambda: trainer.model, _ADVICE)
    callbacks = (KlSteering(section.target_kl), guard, MetricsFile(), Lines(run.say))
    # accelerate's autocast is around policy and values together: the policy itself is in its own precision.
    figures = run.learn(trainer, lambda: run.policy, callbacks, trainer.log, first)
    return figures | {"episodes": trainer.state.episode}


def _reward_folder(run: RolloutRun) -> Path | None:
    """Where the learned reward model lies, the recipe's own or one trained now; None where none is needed."""
    if "model" in (run.recipe.ppo.reward, _value_start(run.recipe)):
        return trained_reward_model(run.recipe, run.folder / "reward_model", run.say)
    return None


def _value_start(recipe: Recipe) -> str:
    """What the values start as, "model" or "policy".

    A reward model knows the last token only, so that it is a start for its own reward and no other: with
    the true reward, values that begin at 0 have more reward at half the KL (two seeds, small world).
    """
    if recipe.ppo.value == "auto":
        return "model" if recipe.ppo.reward == "model" else "policy"
    return "model" if recipe.ppo.value == "reward_model" else "policy"


def _make_trainer(ppo: ModuleType, run: RolloutRun, learned: Path | None) -> Any:
    """TRL's trainer with all its models, which the meter watches."""
    set_seed(run.settings.seed)
    prompts = list(run.prompts)
    pad = padding_token(run.tokenizer, embedded_tokens(run.policy), prompts, run.ends)
    reward, value = _reward_and_value(run, learned)
    texts = [reward] if isinstance(reward, TextReward) else []
    lora = lora_config(run.recipe)
    # An adapter that is turned off is the reference too.
    own_reference = lora is None or run.recipe.reference.path is not None
    trainer = ppo.Trainer(
        run.settings,
        ppo.Rollouts(pad, _ends(run), run.meter, texts),
        eos=_closing(run),
        policy=run.policy,
        reference=_reference(run.recipe, run.policy) if own_reference else None,
        reward=reward,
        value=value,
        prompts=prompts,
        peft_config=lora,
    )
    for model in (trainer.policy_model, trainer.ref_model, value, *(() if texts else (reward,))):
        if model is not None:
            run.meter.watch(model)
    return trainer


def _normalise(ppo: ModuleType, trainer: Any, run: RolloutRun) -> dict[str, float]:
    """Normalise the reward, and the values where they start as a reward model; what the reward was."""
    prompts = list(run.prompts)
    some = random.Random(trainer.args.seed).sample(prompts, min(len(prompts), _SCALE_PROMPTS))
    models = [trainer.reward_model]
    if _value_start(run.recipe) == "model":
        models.append(trainer.value_model)
    scales = ppo.normalise(models, trainer.policy_model, trainer.rollouts, trainer.args, some)
    mean, deviation = scales[0]
    run.say(f"reward of {len(some)} first replies: {mean:+.3f}, deviation {deviation:.3f}")
    return {"reward_mean": mean, "reward_deviation": deviation}


def _reward_and_value(run: RolloutRun, learned: Path | None) -> tuple[nn.Module, PreTrainedModel]:
    """The reward, and the model that learns the values."""
    model = _learned(run.policy, learned) if learned is not None else None
    if run.reward is None:
        assert model is not None
        reward: nn.Module = copy.deepcopy(model)
    else:
        reward = TextReward(run.reward, run.tokenizer, run.prompts, run.ends, run.policy.dtype)
    as_reward_model = _value_start(run.recipe) == "model"
    value = model if model is not None and as_reward_model else value_model_of(run.policy)
    return reward.eval().requires_grad_(False), value


def _learned(policy: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model, new = load_reward_model(folder, policy.dtype)
    if new or embedded_tokens(model) != embedded_tokens(policy):
        raise InputError(
            "this is no reward model of the policy's vocabulary",
            file=folder,
            field="reward_model.path",
            mend="Leave it out: one is trained from the pairs.",
        )
    return model


def _reference(recipe: Recipe, policy: PreTrainedModel) -> PreTrainedModel:
    if recipe.reference.path is not None:
        frozen = load_model(recipe.reference.path, policy.dtype)
    else:
        frozen = copy.deepcopy(policy)
    return frozen.eval().requires_grad_(False)


def _closing(run: RolloutRun) -> int:
    """The token that closes the replies of the pairs: EOS, or with a chat template the end of a turn."""
    turn_ends = [token for token in run.ends if token != run.tokenizer.eos_token_id]
    return turn_ends[0] if turn_ends else int(run.tokenizer.eos_token_id)


def _ends(run: RolloutRun) -> list[int]:
    """What ends a reply in sampling: TRL's own stop token where the recipe sets one."""
    if run.settings.stop_token == "eos":
        return run.ends
    return [run.settings.stop_token_id] if run.settings.stop_token_id is not None else []


PPO = Method(
    name="ppo",
    check=_check,
    settings=_settings,
    reply_tokens=lambda settings: (settings.response_length, "ppo.settings.response_length"),
    train=_train,
)
