"""PPO as TRL has it (`trl.experimental.ppo`); beside `rloo` the only file that imports trl.

What is added to TRL: replies end where this project's replies end, the padding token is never sampled,
rewards are normalised by the first policy, kl_coef can steer to a KL, and a run whose numbers are lost stops.
What TRL's loop does not do, and is not added: clip gradients, save checkpoints, resume.
"""

from __future__ import annotations

import dataclasses
import gc
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.comparison.ppo_models import Normalised, TextReward
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError, nearest

with warnings.catch_warnings():
    # TRL says that its experimental part may change; the version is fixed in pyproject.toml for that.
    warnings.simplefilter("ignore")
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    from trl.experimental.utils import get_reward

# What the runner or TRL itself sets, and where it can be set instead.
_BY_RECIPE = {
    "output_dir": "ppo.output_dir",
    "seed": "train.seed",
    "bf16": "train.bf16",
    "fp16": "train.fp16",
    "use_cpu": "train.use_cpu",
}
_FIXED = {
    "report_to": "metrics go into metrics.jsonl",
    "num_sample_generations": "samples are drawn as the section eval says",
    "save_strategy": "TRL's PPO cannot go on from a checkpoint",
    "push_to_hub": "the model is saved in the run folder",
    "sft_model_path": "the policy is the recipe's",
    "reward_model_path": "the reward is that of ppo.reward",
    "disable_tqdm": "progress is shown in short lines",
    "max_steps": "TRL's PPO does not read it; set ppo.settings.total_episodes",
    "max_grad_norm": "TRL's PPO clips no gradients",
} | dict.fromkeys(
    (
        "world_size",
        "num_total_batches",
        "micro_batch_size",
        "local_batch_size",
        "batch_size",
        "local_mini_batch_size",
        "mini_batch_size",
    ),
    "TRL computes it from per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches",
)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse keys that PPOConfig does not have or that are set elsewhere, and values of another type.

    Raises:
        InputError: naming the key.
    """
    hints = typing.get_type_hints(PPOConfig)
    known = {field.name for field in dataclasses.fields(PPOConfig) if field.init}
    for key, value in settings.items():
        field = f"ppo.settings.{key}"
        if key not in known:
            mend = nearest(key, sorted(known), "See PPOConfig of trl.experimental.ppo.")
            raise InputError("unknown key", field=field, mend=mend)
        if key in _BY_RECIPE:
            raise InputError("this is not set here", field=field, mend=f"Set {_BY_RECIPE[key]} instead.")
        if key in _FIXED:
            raise InputError(f"this cannot be set: {_FIXED[key]}", field=field, mend="Leave it out.")
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{error.errors()[0]['msg']}, got {value!r}", field=field) from None


def make_config(settings: dict[str, Any], train: PreferenceConfig, response_length: int) -> PPOConfig:
    """PPOConfig of a recipe: TRL's own defaults, but for what follows.

    From the section train come output_dir, seed, precision (bf16, fp16), use_cpu and gradient_checkpointing.
    A reply ends where evaluation's ends (stop_token "eos") and is as long at most (`response_length`). The
    temperature stays TRL's 0.7 unless it is set: then PPO improves a sharper policy than the one that is
    evaluated at temperature 1. TRL draws no samples for show, saves no checkpoints, and reports to nobody.

    Args:
        settings: `ppo.settings`, checked.
        train: the recipe's section train.
        response_length: that of eval.

    Raises:
        InputError: TRL or transformers refuse them together.
    """
    given: dict[str, Any] = {
        "gradient_checkpointing": bool(train.gradient_checkpointing),
        "response_length": response_length,
    }
    if "stop_token_id" not in settings:
        given["stop_token"] = "eos"
    fixed = {
        "output_dir": train.output_dir,
        "seed": train.seed,
        "bf16": train.bf16,
        "fp16": train.fp16,
        "use_cpu": train.use_cpu,
        "report_to": "none",
        "num_sample_generations": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    try:
        with warnings.catch_warnings():
            # TRL sets what transformers has another name for.
            warnings.simplefilter("ignore", FutureWarning)
            return PPOConfig(**(given | settings | fixed))
    except (ValueError, TypeError) as error:
        raise InputError(str(error).strip().splitlines()[0], field="ppo.settings") from error


@dataclass
class Rollouts:
    """TRL's own sampling (`ppo_trainer.generate`) with this project's ends of replies and no padding token.

    Attributes:
        pad: stands for padding, on the left of prompts and behind the end of replies; never sampled.
        ends: tokens that end a reply; none: each goes on to the longest length.
        meter: gets the tokens sampled.
        rewards: are told how wide the prompts are.
    """

    pad: int
    ends: list[int]
    meter: CostMeter
    rewards: list[TextReward]

    def __call__(
        self, model: Any, queries: Tensor, pad_token_id: int, generation_config: GenerationConfig
    ) -> tuple[Tensor, Tensor]:
        """[B, P] prompts -> [B, P+R] prompts and replies, and the [B, R, V] logits at TRL's temperature.

        The logits are the model's own, so that their log-probs are those of TRL's later forward passes: the
        padding token is ruled out in sampling only.
        """
        width = queries.shape[1]
        mask = queries != self.pad
        settings = GenerationConfig(
            **generation_config.to_diff_dict(),
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            suppress_tokens=[self.pad],
            return_dict_in_generate=True,
            output_logits=True,
        )
        output = model.generate(
            input_ids=queries.masked_fill(~mask, 0),
            attention_mask=mask,
            generation_config=settings,
        )
        for reward in self.rewards:
            reward.width = width
        replies = output.sequences[:, width:]
        self.meter.tokens_sampled += int((replies != self.pad).sum())
        return torch.cat((queries, replies), 1), torch.stack(output.logits, 1) / settings.temperature

    @contextmanager
    def in_trl(self) -> Iterator[None]:
        """Within: TRL samples so."""
        trl: Any = ppo_trainer
        own, trl.generate = trl.generate, self
        try:
            yield
        finally:
            trl.generate = own


class Trainer(PPOTrainer):
    """TRL's, with our `Rollouts`, and nothing printed.

    Args:
        config: of `make_config`.
        rollouts: how replies are sampled.
        eos: the token that ends a reply, for TRL's stop_token and missing_eos_penalty.
        policy: what is trained.
        reference: a frozen copy, or None where the policy has an adapter that can be turned off.
        reward: a reward model, or a `TextReward`.
        value: a reward model that learns the values.
        prompts: their ids.
        peft_config: for an adapter.

    Raises:
        InputError: there are fewer prompts than in one batch (TRL would wait for one for ever), or TRL
            refuses the settings.
    """

    def __init__(
        self,
        config: PPOConfig,
        rollouts: Rollouts,
        *,
        eos: int,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        reward: nn.Module,
        value: nn.Module,
        prompts: Sequence[Sequence[int]],
        peft_config: Any = None,
    ) -> None:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if len(prompts) < batch:
            raise InputError(
                f"a batch has {batch} prompts and there are only {len(prompts)} different ones",
                field="ppo.settings.per_device_train_batch_size",
                mend=f"Set it to {len(prompts) // config.gradient_accumulation_steps or 1} or less.",
            )
        self.rollouts = rollouts
        parts: dict[str, Any] = {
            # All that TRL asks of a tokenizer here. The padding token need not be the tokenizer's own.
            "processing_class": SimpleNamespace(pad_token_id=rollouts.pad, eos_token_id=eos),
            "model": policy,
            "ref_model": reference,
            "reward_model": reward,
            "value_model": value,
            "train_dataset": Dataset.from_dict({"input_ids": [list(ids) for ids in prompts]}),
            "data_collator": self._padded,
            "peft_config": peft_config,
        }
        try:
            with warnings.catch_warnings():
                # TRL's use of names that transformers will drop.
                warnings.simplefilter("ignore", FutureWarning)
                super().__init__(config, **parts)
        except (ValueError, TypeError, AssertionError) as error:
            field = "ppo.settings or model.lora" if peft_config else "ppo.settings"
            raise InputError(str(error).strip().splitlines()[0], field=field) from error
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.accelerator.print = lambda *_, **__: None

    def train(self) -> None:  # type: ignore[override]
        """TRL's whole loop."""
        # It collects garbage twice in each update; what is there already need not be looked at each time.
        gc.freeze()
        try:
            with self.rollouts.in_trl():
                super().train()
        finally:
            gc.unfreeze()

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"input_ids": padded_left([row["input_ids"] for row in rows], self.rollouts.pad)}


def padded_left(prompts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Ids of prompts -> [B, P], padding on the left."""
    width = max(map(len, prompts))
    return torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])


@torch.no_grad()
def normalise(
    models: Sequence[nn.Module],
    policy: PreTrainedModel,
    rollouts: Rollouts,
    config: PPOConfig,
    prompts: Sequence[Sequence[int]],
) -> list[tuple[float, float]]:
    """Give each model's scores mean 0 and deviation 1 over replies of the policy as it is.

    A reward that is far from 0 is a constant that the values must first learn, and PPO takes it for the worth
    of whatever was sampled until then; its scale is that of learning rate and kl_coef.

    Args:
        models: reward models; their `score` becomes a `Normalised` one.
        policy: before training.
        rollouts: how replies are sampled.
        config: its temperature, response_length and local_rollout_forward_batch_size are used.
        prompts: their ids; one reply to each.

    Returns:
        mean and deviation of each model's scores as they were.

    Raises:
        InputError: all replies have the same score.
    """
    drawn = GenerationConfig(
        max_new_tokens=config.response_length,
        temperature=config.temperature + 1e-7,
        top_k=0,
        top_p=1.0,
        do_sample=True,
    )
    scores: list[list[Tensor]] = [[] for _ in models]
    for start in range(0, len(prompts), config.local_rollout_forward_batch_size):
        part = prompts[start : start + config.local_rollout_forward_batch_size]
        queries = padded_left(part, rollouts.pad).to(policy.device)
        replies, _ = rollouts(policy, queries, rollouts.pad, drawn)
        for model, found in zip(models, scores, strict=True):
            found.append(get_reward(model, replies, rollouts.pad, queries.shape[1])[1].float())
    figures = []
    for model, found in zip(models, scores, strict=True):
        values = torch.cat(found)
        mean, deviation = float(values.mean()), float(values.std())
        if not deviation > 0:
            raise InputError(
                f"all {len(values)} replies of the first policy have the reward {mean:g}",
                field="ppo.reward",
                mend="There is nothing to learn from; give another reward.",
            )
        model.score = Normalised(model.score, mean, deviation)  # type: ignore[arg-type]
        figures.append((mean, deviation))
    return figures
