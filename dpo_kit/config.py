"""PreferenceConfig: transformers' TrainingArguments and what preference training adds to them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from dpo_kit.attention import ATTENTION_BACKENDS, attention_backend
from dpo_kit.errors import DpoKitWarning, InputError

# Tokens of one forward and backward pass where the recipe leaves it to us. On a processor larger ones gain
# little and take memory; on CUDA the trainer puts what fits in its place.
AUTO_TOKENS = {"cpu": 1536, "cuda": 16384}

# Extras of the kernel that tell a person something; see `dpo_kit.logprob.token_logprobs`.
TOKEN_METRICS = ("entropy", "top1")


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of a `PreferenceTrainer`; all of TrainingArguments' fields are there too.

    Attributes:
        batch_size: preference pairs in one optimiser step, over all ranks. Default: what
            TrainingArguments would make of per_device_train_batch_size, gradient_accumulation_steps
            and the number of ranks.
        tokens_per_micro_batch: token budget of one forward and backward pass. It changes memory and
            speed, not the gradient. "auto": 1536 on a processor; on CUDA what fits into the memory that is
            free when training starts.
        loss: a name, {name: ..., hyper-parameters}, or a list of {name, weight, ...}.
        reference_mode: where the reference's log-probs come from: "live" (a frozen copy in memory),
            "adapter_off" (a peft policy without its adapter), "adapter" (another adapter of it), "cached"
            (computed once and kept on disk), "moving" (a copy that follows the policy: TR-DPO), "none", or
            "auto": cached where the loss allows it, see `dpo_kit.reference.make_reference`.
        reference_cache_dir: of the cached reference; default $DPO_KIT_CACHE or ~/.cache/dpo_kit.
        reference_adapter: the adapter that "adapter" means: its name in the policy, or a folder to load.
        reference_update_every: steps between two updates of a moving reference.
        reference_update_weight: of the policy in an update, in (0, 1]; 1 replaces the reference.
        token_metrics: statistics of the policy's token distributions to log: "entropy" (nats), "top1"
            (share of tokens that are the most likely ones). Computed only when asked for.
        layout: "tree", "padded", or "auto": the tree where the start-up check finds that the model
            gives the same log-probs on it.
        attention: how a tree's attention is computed: "gathered" (any device), "varlen" or "flex" (CUDA),
            or "auto".
        group_by_prompt: keep the pairs of one prompt together in a step, so that they share its tokens. It
            changes the order of training: see `dpo_kit.dealing.PromptGroups`.
        dataloader_num_workers: processes that plan steps ahead. Default: 1 on CUDA; on a processor, whose
            cores are busy, 0.
        compile_blocks: compile the decoder layers (torch.compile): a minute at the start, and faster
            steps on CUDA.
        max_length: longest prompt plus reply, in tokens; None for no limit.
        overlong: what is done beyond it: "drop", "cut_prompt_left" or "cut_completion_right".
        on_nonfinite: what is done in a step whose loss or gradient is not finite: "stop", or "skip", which
            leaves the weights as they are and goes on with the next step. Either way the step's pairs and
            their log-probs are written to nonfinite.jsonl.
        max_nonfinite: steps in a row that are skipped at most.
        per_device_eval_batch_size: pairs planned together in evaluation; the budget holds there too.
        bf16: autocast to bf16. Default: on where the hardware has it.
    """

    batch_size: int | None = None
    tokens_per_micro_batch: int | str = "auto"
    loss: Any = field(default_factory=lambda: {"name": "dpo"})
    reference_mode: str = "auto"
    reference_cache_dir: str | None = None
    reference_adapter: str | None = None
    reference_update_every: int = 512
    reference_update_weight: float = 0.6
    token_metrics: list[str] = field(default_factory=list)
    layout: str = "auto"
    attention: str = "auto"
    group_by_prompt: bool = False
    compile_blocks: bool = False
    dataloader_num_workers: int | None = None  # type: ignore[assignment]
    max_length: int | None = 1024
    overlong: str = "drop"
    on_nonfinite: str = "stop"
    max_nonfinite: int = 3
    per_device_eval_batch_size: int = 64
    bf16: bool | None = None  # type: ignore[assignment]
    learning_rate: float = 1e-6
    logging_steps: float = 10
    logging_first_step: bool = True
    remove_unused_columns: bool = False
    report_to: str | list[str] | None = "none"

    def __post_init__(self) -> None:
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
            raise InputError(
                "DeepSpeed is not supported: it would make an optimiser step of each micro-batch",
                field="train.deepspeed",
                mend="Shard with FSDP2: train.fsdp: true, or an accelerate configuration with "
                "distributed_type FSDP and fsdp_version 2.",
            )
        # Set by the trainer, once it knows the model and the memory.
        self.auto_tokens: int | None = None
        # Set by the loop, where memory ran out.
        self.reduced_tokens: int | None = None
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = int(torch.cuda.is_available() and not self.use_cpu)
        if self.bf16 is None:
            self.bf16 = bf16_is_fast() and not self.fp16
        # TrainingArguments would take the columns that its models know, and so none of ours.
        self.remove_unused_columns = False
        super().__post_init__()
        if self.n_gpu > 1:
            # nn.DataParallel would scatter a micro-batch whose rows belong together.
            warnings.warn(
                f"one process trains on one of {self.n_gpu} GPUs; start with torchrun or accelerate for all",
                DpoKitWarning,
                stacklevel=2,
            )
            self._n_gpu = 1
        if self.auto_find_batch_size:
            raise InputError(
                "it would change the pairs of a step",
                field="train.auto_find_batch_size",
                mend="Lower tokens_per_micro_batch instead: memory falls and the step stays.",
            )
        settings: Any = self.accelerator_config
        accumulated = (settings.gradient_accumulation_kwargs or {}).get("num_steps", 1)
        if accumulated != 1:
            raise InputError(
                f"a step would be of {accumulated} times as many pairs",
                field="train.accelerator_config.gradient_accumulation_kwargs.num_steps",
                mend="Leave it out: a step is batch_size pairs, however they are cut.",
            )
        self._settle_batch_size()
        tokens = self.tokens_per_micro_batch
        if tokens != "auto" and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise InputError(
                f"expected a number of tokens or auto, got {tokens!r}", field="train.tokens_per_micro_batch"
            )
        if self.dataloader_num_workers < 0:
            raise InputError(
                f"expected 0 or more, got {self.dataloader_num_workers}", field="train.dataloader_num_workers"
            )
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise InputError(
                "a pair has no one length to sort by, and pairs are dealt to ranks by their work as it is",
                field="train.train_sampling_strategy",
                mend="Leave it out, or set sequential.",
            )
        if self.group_by_prompt and self.train_sampling_strategy != "random":
            raise InputError(
                f"it does not go with train_sampling_strategy {self.train_sampling_strategy}",
                field="train.group_by_prompt",
                mend="Set one of the two.",
            )
        if unknown := set(self.token_metrics) - set(TOKEN_METRICS):
            raise InputError(
                f"unknown {', '.join(sorted(unknown))}",
                field="train.token_metrics",
                mend=f"Known: {', '.join(TOKEN_METRICS)}.",
            )
        if self.max_nonfinite < 1:
            raise InputError(f"expected 1 or more, got {self.max_nonfinite}", field="train.max_nonfinite")
        for name, known in (
            ("attention", ["auto", *ATTENTION_BACKENDS]),
            ("layout", ["auto", "tree", "padded"]),
            ("on_nonfinite", ["stop", "skip"]),
        ):
            if (value := getattr(self, name)) not in known:
                mend = f"Known: {', '.join(known)}."
                raise InputError(f"unknown {name} '{value}'", field=f"train.{name}", mend=mend)

    def _settle_batch_size(self) -> None:
        """One dataloader batch is one step of one rank; accumulation happens inside it."""
        ranks = self.world_size
        if self.batch_size is None:
            per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
            self.batch_size = per_rank * ranks
        if self.batch_size < 1 or self.batch_size % ranks:
            raise InputError(
                f"{self.batch_size} pairs cannot be dealt evenly to {ranks} ranks",
                field="train.batch_size",
                mend=f"Use a positive multiple of {ranks}.",
            )
        self.per_device_train_batch_size = self.batch_size // ranks
        self.gradient_accumulation_steps = 1

    @property
    def backend(self) -> str:
        """What computes a tree's attention; see `dpo_kit.attention`."""
        return attention_backend(self.device.type) if self.attention == "auto" else self.attention

    @property
    def token_budget(self) -> int:
        """Tokens of one micro-batch."""
        if self.reduced_tokens is not None:
            return self.reduced_tokens
        if self.tokens_per_micro_batch == "auto":
            if self.auto_tokens is not None:
                return self.auto_tokens
            return AUTO_TOKENS.get(self.device.type, AUTO_TOKENS["cpu"])
        return int(self.tokens_per_micro_batch)
