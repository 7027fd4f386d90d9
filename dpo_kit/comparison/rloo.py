"""RLOO as TRL has it (`trl.RLOOTrainer`); like `ppo`, this file imports trl, which must be installed.

REINFORCE with the mean reward of a prompt's other replies as its baseline (Ahmadian et al. 2024,
arXiv 2402.14740). What is added to TRL: prompts are the ids, and replies end where they do in the rest of
this project; the padding token is never sampled; the reference is the policy as it was given, wherever that
came from.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers import Trainer as TransformersTrainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import RLOOConfig, RLOOTrainer

from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DivergedError, InputError, nearest

_FIXED = {
    "output_dir": "set ppo.output_dir",
    "seed": "set train.seed",
    "bf16": "set train.bf16",
    "fp16": "set train.fp16",
    "use_cpu": "set train.use_cpu",
    "gradient_checkpointing": "set train.gradient_checkpointing",
    "max_completion_length": "set eval.max_new_tokens",
    "generation_kwargs": "replies end where those of the pairs do",
    "sync_ref_model": "the reference stays",
    "use_vllm": "replies are drawn by transformers",
    "report_to": "metrics go into metrics.jsonl",
    "save_strategy": "a run that is cut off begins anew",
}


def make_config(settings: dict[str, Any], train: PreferenceConfig, reply_tokens: int) -> RLOOConfig:
    """RLOOConfig of a recipe: TRL's own defaults, but for what follows.

    From the section train come output_dir, seed, precision (bf16, fp16), use_cpu and gradient_checkpointing,
    from eval the longest reply. Dropout is off unless `disable_dropout: false` is set, so that log-probs are
    those of the policy that sampled. No checkpoints are saved, and nobody is reported to. A step has
    `per_device_train_batch_size` replies, `num_generations` to each prompt.

    Args:
        settings: `ppo.settings`.
        train: the recipe's section train.
        reply_tokens: longest reply.

    Raises:
        InputError: a key that RLOOConfig does not have or that is set elsewhere, or values that TRL refuses.
    """
    known = {field.name for field in dataclasses.fields(RLOOConfig) if field.init}
    for key in settings:
        field = f"ppo.settings.{key}"
        if key in _FIXED:
            raise InputError(f"this cannot be set: {_FIXED[key]}", field=field, mend="Leave it out.")
        if key not in known:
            mend = nearest(key, sorted(known), "See trl's RLOOConfig for its fields.")
            raise InputError("unknown key", field=field, mend=mend)
    fixed = {name: getattr(train, name) for name in ("output_dir", "seed", "bf16", "fp16", "use_cpu")}
    fixed |= {"gradient_checkpointing": bool(train.gradient_checkpointing), "disable_tqdm": True}
    fixed |= {"max_completion_length": reply_tokens, "report_to": "none", "save_strategy": "no"}
    try:
        return RLOOConfig(**({"disable_dropout": True} | settings | fixed))
    except (ValueError, TypeError) as error:
        raise InputError(str(error).strip().splitlines()[0], field="ppo.settings") from error


class Trainer(RLOOTrainer):
    """TRL's, on prompts as ids.

    Args:
        config: of `make_config`.
        policy: what is trained; a copy of it as it is now is the reference (with an adapter, itself without).
        tokenizer: the policy's.
        prompts: their ids.
        ends: tokens that end a reply.
        reward: (numbers of prompts, texts of replies) -> their rewards.
        meter: gets the tokens sampled.
        peft_config: for an adapter.

    Raises:
        InputError: TRL refuses the settings.
    """

    def __init__(
        self,
        config: RLOOConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        reward: Callable[[list[int], list[str]], list[float]],
        meter: CostMeter,
        peft_config: Any = None,
    ) -> None:
        self._prompt_ids, self._ends, self._meter = prompts, set(ends), meter

        def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
            return list(reward([int(number) for number in prompts], completions))

        reference = None if peft_config else copy.deepcopy(policy).eval().requires_grad_(False)
        pad = tokenizer.pad_token_id
        own = {"eos_token_id": list(ends), "pad_token_id": tokenizer.eos_token_id if pad is None else pad}
        if pad is not None and pad not in self._ends:
            own["suppress_tokens"] = [pad]
        # TRL would load the reference from where the policy's configuration says that it came from.
        beta, config.beta = config.beta, 0.0 if reference is not None else config.beta
        config.generation_kwargs = own
        try:
            super().__init__(
                policy,
                rewards,
                args=config,
                train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(prompts))]}),
                processing_class=tokenizer,
                peft_config=peft_config,
            )
        except (ValueError, TypeError) as error:
            raise InputError(str(error).strip().splitlines()[0], field="ppo.settings") from error
        self.beta = config.beta = beta
        if reference is not None and beta:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def log_measured(self, line: dict[str, Any]) -> None:
        """A line of metrics without what TRL gathers for its own next one."""
        TransformersTrainer.log(self, line)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self._prompt_ids[int(number)]) for number in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        replies = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        cut = [reply[: _length(reply, self._ends)] for reply in replies]
        self._meter.tokens_sampled += sum(map(len, cut))
        return cut


def _length(reply: Sequence[int], ends: set[int]) -> int:
    return next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))


class Guard(TrainerCallback):
    """Stops a run whose loss, reward or weights are not finite any more."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the weights."""
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergedError(
                    f"step {state.global_step}: {name} has numbers that are not finite. Nothing was saved. "
                    "Lower ppo.settings.learning_rate, or raise beta."
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at what TRL logs."""
        for name in ("loss", "reward", "kl", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise DivergedError(f"step {state.global_step}: {name} is {value}. Nothing was saved.")
