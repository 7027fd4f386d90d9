"""Carry a recipe out by PPO: start, prompts, measurements and run folder are those of `dpo-kit train`.

recipe.yaml environment.json metrics.jsonl summary.json samples.jsonl evaluations/ model/ report.html plots/,
sft/ and pairs/ where the recipe has them made, and reward_model/ where the reward is learned first
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dpo_kit.callbacks import METRICS_FILE, MetricsFile
from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.comparison.ppo_callbacks import Guard, KlSteering, Lines
from dpo_kit.comparison.ppo_models import TextReward, padding_token, value_model_of
from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.evaluation import Reward, load_reward
from dpo_kit.evaluation.sampling import encode_prompts
from dpo_kit.losses import make_objective
from dpo_kit.measurement import Samples, SampleTracker, Say, sample_figures
from dpo_kit.models import check_length, embedded_tokens, load_model, load_reward_model
from dpo_kit.recipe import Recipe
from dpo_kit.run import (
    RunResult,
    close_run,
    finished_run,
    load_start,
    lora_config,
    open_folder,
    read_pairs_of,
    write_origin,
)
from dpo_kit.run_folder import peak_memory_bytes
from dpo_kit.start import check_start, make_start, started
from dpo_kit.texts import Prompt

# Prompts that the first policy is sampled on to know the scale of its rewards.
_SCALE_PROMPTS = 256
_ADVICE = (
    "Nothing was saved. Lower ppo.settings.learning_rate, raise kl_coef, or set ppo.normalise: a reward "
    "that is far from 0 or large drives the policy off at once."
)


@dataclass
class _Parts:
    """What a PPO run is put together from, before TRL has it.

    Attributes:
        prompts: of the training pairs, the distinct ones: ids -> prompt.
        ends: tokens that end a reply.
        reward: of texts; None where a reward model is learned.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[tuple[int, ...], Prompt]
    ends: list[int]
    reward: Reward | None


def run_ppo(recipe: Recipe, *, resume: bool = False, say: Say = print) -> RunResult:
    """Train the policy of a recipe by PPO on the prompts of its pairs, and write the run folder.

    `loss`, and of `train` the learning rate, batch and steps, are of no account here: those of PPO are
    `ppo.settings` (see `ppo.make_config` for what is TRL's default and what is not).

    Args:
        recipe: checked.
        resume: leave a finished run of this very recipe as it is; a run that was cut off begins anew, since
            TRL's PPO cannot go on, but what it starts from is kept. Without it an earlier run is put aside.
        say: gets lines of progress.

    Raises:
        InputError: data, models and recipe do not fit together, or TRL's PPO is not installed.
        TrainingError: figures or weights are not finite any more.
    """
    ppo = _trl()
    default = f"{recipe.training_config().output_dir}-ppo"
    folder = Path(recipe.ppo.output_dir or default)
    recipe = recipe.model_copy(update={"train": recipe.train | {"output_dir": str(folder)}})
    config = recipe.training_config()
    resolved = recipe.resolved(config)
    if resume and (finished := finished_run(folder, resolved, say)):
        return finished
    _check(recipe, config, ppo)
    samples, reward = Samples.of(recipe), _text_reward(recipe)
    settings = ppo.make_config(recipe.ppo.settings, config, recipe.eval.max_new_tokens)
    if started(recipe, folder) is recipe:
        parts = _prepare(recipe, samples, reward, settings, say)
        _open(folder, resume, say)
        figures: dict[str, Any] = {}
    else:
        _open(folder, resume, say)
        figures = make_start(recipe, folder, say)
        recipe = started(recipe, folder)
        samples = Samples.of(recipe)
        parts = _prepare(recipe, samples, reward, settings, say)
    prompts = Dataset.from_dict({"prompt_ids": [list(ids) for ids in parts.prompts]})
    write_origin(folder, resolved, config, parts.policy, {"train": prompts})
    learned = _reward_folder(recipe, folder, say)
    figures |= _train(ppo, recipe, parts, samples, settings, learned, folder, say)

    def save(place: str) -> None:
        parts.policy.save_pretrained(place)
        parts.tokenizer.save_pretrained(place)

    return close_run(recipe, folder, resolved, figures, save, say)


def _trl() -> ModuleType:
    try:
        from dpo_kit.comparison import ppo
    except ImportError as error:
        if not (error.name or "").startswith("trl"):
            raise
        raise InputError(
            f"TRL's PPO is not installed ({error})",
            mend='It is in trl 1.12: pip install "trl>=1.12,<1.13", or dpo-kit[ppo].',
        ) from error
    return ppo


def _check(recipe: Recipe, config: PreferenceConfig, ppo: ModuleType) -> None:
    if make_objective(recipe.loss).needs_rewards:
        raise InputError("PPO trains no reward model", field="loss", mend="Set reward_model.loss to it.")
    if config.world_size > 1:
        raise InputError(f"PPO runs in one process, and there are {config.world_size}", field="ppo")
    ppo.check_settings(recipe.ppo.settings)
    check_start(recipe)


def _text_reward(recipe: Recipe) -> Reward | None:
    spec = recipe.ppo.reward
    if spec == "model":
        return None
    if spec != "true":
        return load_reward(spec, field="ppo.reward")
    if recipe.eval.reward is None:
        raise InputError(
            "the recipe names no true reward",
            field="ppo.reward",
            mend="Set eval.reward, or ppo.reward: model.",
        )
    return load_reward(recipe.eval.reward)


def _open(folder: Path, resume: bool, say: Say) -> None:
    open_folder(folder, resume, say)
    if (folder / METRICS_FILE).exists():
        say("TRL's PPO cannot go on in the middle: training begins anew")
        (folder / METRICS_FILE).unlink()
    shutil.rmtree(folder / "evaluations", ignore_errors=True)


def _prepare(recipe: Recipe, samples: Samples, reward: Reward | None, settings: Any, say: Say) -> _Parts:
    """Policy, tokenizer and the prompts to train on, checked against each other."""
    rows = read_pairs_of(recipe, "train", say)
    assert rows is not None
    policy, tokenizer = load_start(recipe, say)
    samples.check_lengths(policy, tokenizer)
    prompts, ends = _distinct_prompts(recipe, rows, tokenizer, settings.response_length, say)
    longest = max(map(len, prompts)) + settings.response_length
    check_length(policy, settings.response_length, longest, field="ppo.settings.response_length")
    return _Parts(policy, tokenizer, prompts, ends, reward)


def _distinct_prompts(
    recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, say: Say
) -> tuple[dict[tuple[int, ...], Prompt], list[int]]:
    """The different prompts of the pairs, by their ids, and the tokens that end a reply."""
    section = recipe.data
    prompts = list({json.dumps(prompt): prompt for prompt in rows["prompt"]}.values())
    encoded, ends = encode_prompts(prompts, tokenizer, section.chat_template_kwargs)
    found: dict[tuple[int, ...], Prompt] = {}
    for ids, prompt in zip(encoded, prompts, strict=True):
        found.setdefault(tuple(ids), prompt)
    limit = section.max_length
    fit = {ids: p for ids, p in found.items() if ids and (limit is None or len(ids) + length <= limit)}
    if len(fit) < len(found):
        say(
            f"{len(found) - len(fit)} of {len(found)} prompts are left out: empty, or longer than "
            f"data.max_length with a reply of {length} tokens"
        )
    if not fit:
        raise InputError("no prompt is left to train on", field="data.max_length", mend="Raise it.")
    say(f"{len(fit)} different prompts")
    return fit, ends


def _reward_folder(recipe: Recipe, folder: Path, say: Say) -> Path | None:
    """Where the learned reward model lies, the recipe's own or one trained now; None where none is needed."""
    if "model" in (recipe.ppo.reward, _value_start(recipe)):
        return trained_reward_model(recipe, folder / "reward_model", say)
    return None


def _value_start(recipe: Recipe) -> str:
    """ "model" or "policy": a reward model knows the last token only, so that it is a start for its own reward.

    With the true reward, values that begin at 0 have more reward at half the KL (two seeds, small world).
    """
    if recipe.ppo.value == "auto":
        return "model" if recipe.ppo.reward == "model" else "policy"
    return "model" if recipe.ppo.value == "reward_model" else "policy"


def _train(
    ppo: ModuleType,
    recipe: Recipe,
    parts: _Parts,
    samples: Samples,
    settings: Any,
    learned: Path | None,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    """Train, and say what came of it."""
    meter = CostMeter()
    # What the policy was published with does not bend its samples; it is saved with it again.
    own, parts.policy.generation_config = parts.policy.generation_config, GenerationConfig()
    trainer = _make_trainer(ppo, recipe, parts, settings, learned, meter)
    parts.policy = policy = trainer.policy_model
    tracker = SampleTracker(
        samples,
        policy=lambda: policy,
        tokenizer=parts.tokenizer,
        load_reference=lambda: load_start(recipe)[0].to(trainer.args.device).eval(),
        folder=folder,
        log=trainer.log,
        cost=meter.figures,
        pause=meter.paused,
        say=say,
    )
    # In this order: a line is complete before it is written, and what is lost is not measured.
    guard = Guard(lambda: trainer.model, _ADVICE)
    for callback in (KlSteering(recipe.ppo.target_kl), guard, MetricsFile(), Lines(say), tracker):
        trainer.add_callback(callback)
    tracker.measure(0)
    meter.start()
    figures = {}
    if recipe.ppo.normalise:
        figures = _normalise(ppo, trainer, _value_start(recipe) == "model", list(parts.prompts), say)
    say("training by PPO")
    trainer.train()
    meter.stop()
    policy.generation_config = own
    return figures | {
        "train_runtime": meter.seconds,
        "steps": trainer.state.global_step,
        "episodes": trainer.state.episode,
        "tokens": meter.tokens,
        "tokens_sampled": meter.tokens_sampled,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        **sample_figures(folder, trainer.state.global_step),
    }


def _make_trainer(
    ppo: ModuleType, recipe: Recipe, parts: _Parts, settings: Any, learned: Path | None, meter: CostMeter
) -> Any:
    """TRL's trainer with all its models, which the meter watches."""
    set_seed(settings.seed)
    pad = padding_token(parts.tokenizer, embedded_tokens(parts.policy), list(parts.prompts), parts.ends)
    reward, value = _reward_and_value(recipe, parts, learned)
    texts = [reward] if isinstance(reward, TextReward) else []
    lora = lora_config(recipe)
    # An adapter that is turned off is the reference too.
    own_reference = lora is None or recipe.reference.path is not None
    trainer = ppo.Trainer(
        settings,
        ppo.Rollouts(pad, _ends(settings, parts.ends), meter, texts),
        eos=_closing(parts),
        policy=parts.policy,
        reference=_reference(recipe, parts.policy) if own_reference else None,
        reward=reward,
        value=value,
        prompts=list(parts.prompts),
        peft_config=lora,
    )
    for model in (trainer.policy_model, trainer.ref_model, value, *(() if texts else (reward,))):
        if model is not None:
            meter.watch(model)
    return trainer


def _normalise(
    ppo: ModuleType, trainer: Any, learned: bool, prompts: list[tuple[int, ...]], say: Say
) -> dict[str, float]:
    """Normalise the reward, and the values where they start as a reward model; what the reward was."""
    some = random.Random(trainer.args.seed).sample(prompts, min(len(prompts), _SCALE_PROMPTS))
    models = [trainer.reward_model, trainer.value_model] if learned else [trainer.reward_model]
    scales = ppo.normalise(models, trainer.policy_model, trainer.rollouts, trainer.args, some)
    mean, deviation = scales[0]
    say(f"reward of {len(some)} first replies: {mean:+.3f}, deviation {deviation:.3f}")
    return {"reward_mean": mean, "reward_deviation": deviation}


def _reward_and_value(
    recipe: Recipe, parts: _Parts, learned: Path | None
) -> tuple[nn.Module, PreTrainedModel]:
    """The reward, and the model that learns the values."""
    dtype = parts.policy.dtype
    model = _learned(parts.policy, learned) if learned is not None else None
    if parts.reward is None:
        assert model is not None
        reward: nn.Module = copy.deepcopy(model)
    else:
        reward = TextReward(parts.reward, parts.tokenizer, parts.prompts, parts.ends, dtype)
    value = model if model is not None and _value_start(recipe) == "model" else value_model_of(parts.policy)
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


def _closing(parts: _Parts) -> int:
    """The token that closes the replies of the pairs: EOS, or with a chat template the end of a turn."""
    turn_ends = [token for token in parts.ends if token != parts.tokenizer.eos_token_id]
    return turn_ends[0] if turn_ends else int(parts.tokenizer.eos_token_id)


def _ends(settings: Any, ends: list[int]) -> list[int]:
    """What ends a reply in sampling: TRL's own stop token where the recipe sets one."""
    if settings.stop_token == "eos":
        return ends
    return [settings.stop_token_id] if settings.stop_token_id is not None else []
