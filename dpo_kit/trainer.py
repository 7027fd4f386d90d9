"""PreferenceTrainer: a transformers.Trainer whose step is exactly `batch_size` preference pairs.

What it is given becomes a policy, a reference, data of token ids and a layout, checked against each other.
What a step does with them is in `loop`. The optimiser, schedules and logging are transformers' own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dpo_kit import ranks, sharding
from dpo_kit.callbacks import At, MetricsFile, Progress
from dpo_kit.capacity import measured_budget
from dpo_kit.checkpoints import Counts
from dpo_kit.compilation import compile_blocks
from dpo_kit.config import PreferenceConfig
from dpo_kit.dealing import PromptGroups, TokenRows
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.filling import Filled, fill, rows_ahead
from dpo_kit.host_memory import keep_freed_memory
from dpo_kit.loop import TrainingLoop
from dpo_kit.losses import Objective, make_objective
from dpo_kit.matrix import check_combination
from dpo_kit.models import unwrap
from dpo_kit.optimisers import check_optimiser
from dpo_kit.packing import Layout
from dpo_kit.planning import Planner
from dpo_kit.preparation import (
    own_forward,
    prepared_policy,
    probe_of,
    settle_attention,
    settle_layout,
    settle_padding,
    tokenized,
)
from dpo_kit.rank_batches import Costs, RankBatches, RowWork, agreed_sampler, step_loader
from dpo_kit.reference import CachedReference, MovingReference, Reference, make_reference
from dpo_kit.step import Scorer
from dpo_kit.tokenization import longest_sequence

# What accelerate's names for it mean; an accelerate configuration may set it beside the arguments.
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Pairs on which it is measured what a token takes of the memory.
_CAPACITY_PAIRS = 16


class PreferenceTrainer(TrainingLoop):
    """Train a policy on preference pairs.

    Args:
        model: the policy: a causal LM, or a folder or hub id to load one from.
        ref_model: the reference; default: what `args.reference_mode` says, the policy before its first step.
            Where its log-probs are cached (mode auto), all data that will be evaluated should be given as
            `eval_dataset`: later the policy is another, and can only be had again from its files.
        args: the settings.
        train_dataset: canonical rows (prompt, chosen, rejected), or rows that are tokenised already
            (prompt_ids, chosen_ids, rejected_ids; see `tokenize_pairs`).
        eval_dataset: likewise.
        processing_class: the tokenizer; needed for rows of text and saved with the model.
        peft_config: a peft configuration; the policy becomes the model with that adapter.
        callbacks: of transformers.
        optimizers: (optimizer, scheduler), as transformers has it.

    Raises:
        InputError: settings, data or model that cannot work together.
    """

    args: PreferenceConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module,
        ref_model: str | Path | PreTrainedModel | nn.Module | Reference | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = PreferenceConfig(output_dir="runs/preference") if args is None else args
        # Measured by another trainer, for another model.
        args.auto_tokens = None
        sharding.check_wrappers(args)
        check_optimiser(args)
        self.objective: Objective = make_objective(args.loss)
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, args, self.objective) for data in (train_dataset, eval_dataset)
        )
        if isinstance(model, nn.Module) and ref_model is model:
            raise InputError(
                "the reference is the very object that is trained",
                field="ref_model",
                mend="Leave it out: the reference is then the policy as it was before the first step.",
            )
        policy = prepared_policy(model, peft_config, rewards=self.objective.needs_rewards, seed=args.seed)
        sharding.check_model(policy)
        if self.objective.needs_rewards:
            settle_padding(policy, processing_class, train_dataset)
        if isinstance(train_dataset, Dataset) and len(train_dataset) < args.per_device_train_batch_size:
            message = (
                f"the data has {len(train_dataset)} pairs, fewer than one step takes ({args.batch_size})"
            )
            warnings.warn(message, DpoKitWarning, stacklevel=2)
        self.planner = Planner(args, self.objective)
        self._metrics_file = MetricsFile()
        super().__init__(
            model=policy,
            args=args,
            data_collator=self.planner,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                self._metrics_file,
                Progress(),
                At(before_first_step=self._before_first_step, after_step=self._after_step),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        # The mean over a step's pairs is taken in training_step.
        self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled:
            sharding.fit_to_model(self.accelerator.state.fsdp_plugin, policy)
        self.reference = self._make_reference(ref_model)
        if self.is_fsdp_enabled:
            sharding.check_reference(self.accelerator.state.fsdp_plugin, self.reference)
        if self.reference.model is not None:
            self.reference.model.to(args.device)
        self.filled = Filled()
        self._filled_for: Any = None
        metrics = tuple(args.token_metrics)
        self._scorer = Scorer(self.objective, self.reference, self.accelerator.autocast, metrics)
        self.planner.with_keys = self.reference.needs_keys
        self._settle_layout(train_dataset if train_dataset is not None else eval_dataset)
        if args.compile_blocks:
            for compiled in filter(None, (self._policy, self.reference.model)):
                compile_blocks(compiled)

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers has it, and on processors FSDP is real too."""
        with sharding.environment_kept():
            super().create_accelerator_and_postprocess()
        if sharding.shard_on_processors(self.accelerator, self.args):
            self.is_fsdp_enabled = True
        sharding.prepare_once(self.accelerator)

    def shard(self) -> None:
        """Shard the policy over the ranks, once, where that is asked for: on all ranks together.

        Before anything is computed with it, so that no rank ever has all of it on its device.
        """
        if self.is_fsdp_enabled and not sharding.is_sharded(self.model):
            self.create_optimizer()
            model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model = self.model_wrapped = model
            if self.layout == "tree":
                settle_attention([model], self._probe, self.args, self.accelerator.autocast)

    def _make_reference(self, given: Any) -> Reference:
        args, policy, objective = self.args, self._policy, self.objective
        return make_reference(
            "none" if objective.needs_rewards else args.reference_mode,
            policy,
            needed=objective.needs_reference,
            given=own_forward(given) if isinstance(given, nn.Module) else given,
            cacheable=not objective.needs_distributions,
            tokens=objective.needs_reference_tokens,
            autocast=_AUTOCAST.get(self.accelerator.mixed_precision),
            cache_dir=args.reference_cache_dir,
            adapter=args.reference_adapter,
            update_every=args.reference_update_every,
            update_weight=args.reference_update_weight,
        )

    def _settle_layout(self, dataset: Any) -> None:
        """The tree where both models may be trusted with it; see `scoring.choose_layout`.

        Without a data set this waits for the first one that is evaluated.
        """
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        self._settled = dataset is not None
        if dataset is None:
            return
        self.planner.longest, place = longest_sequence(dataset)
        self._probe = probe_of(dataset, place, self.planner.example)
        if self.args.world_size > 1:
            self.planner.filler = min(
                self._probe, key=lambda one: len(one.prompt) + sum(map(len, one.replies))
            )
        policy, reference = self._policy, self.reference
        # The other ranks' models are the same, or have no weights yet.
        self.planner.layout, self.args.attention = ranks.by_first(self._checked_layout)
        device, sharded = self.args.device.type, self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_combination(policy, reference, self.planner.layout, device, sharded=sharded)

    def _checked_layout(self) -> tuple[Layout, str]:
        """The layout, and the attention backend, that policy and reference give the right log-probs with."""
        args, reference = self.args, self.reference
        # A copy of the policy needs no check of its own.
        others = [] if reference.model is None or reference.is_policy else [reference.model]
        models = [self._policy, *others]
        # What will be sharded is not on its device yet.
        backend = "gathered" if self.is_fsdp_enabled else args.backend
        assert self.planner.longest is not None
        layout = settle_layout(models, self._probe, self.planner.longest, args, backend)
        if layout == "tree" and not self.is_fsdp_enabled:
            settle_attention(models, self._probe, args, self.accelerator.autocast)
        return layout, args.attention

    def _before_first_step(self) -> None:
        self._settle_token_budget()
        self._make_up_for_evaluation()

    def _make_up_for_evaluation(self) -> None:
        """Evaluate at the step that is resumed from, where a run that was stopped had no time for it."""
        args, step = self.args, self.state.global_step
        due = args.eval_strategy == "steps" and step > max(0, args.eval_delay)
        if not due or self.eval_dataset is None or step % self.state.eval_steps:
            return
        known = (line for line in self.state.log_history if line.get("step") == step)
        if not any(key.startswith("eval_") and key.endswith("loss") for line in known for key in line):
            self.evaluate()

    def _settle_token_budget(self) -> None:
        """On CUDA, "auto" is what the free memory allows; the same on all ranks."""
        args, data = self.args, self.train_dataset
        fixed = args.tokens_per_micro_batch != "auto" or args.device.type != "cuda"
        # A sharded model takes other memory than what one rank can measure alone.
        if fixed or self.is_fsdp_enabled or self.is_deepspeed_enabled or len(data) < 2:  # type: ignore[arg-type]
            return
        pairs = [self.planner.example(row) for row in data.select(range(min(len(data), _CAPACITY_PAIRS)))]  # type: ignore[union-attr, arg-type]
        with self.accelerator.autocast(), self._attention(self._policy):
            fit = measured_budget(self._policy.train(), self.planner.whole, pairs)
        args.auto_tokens = int(self.accelerator.gather(torch.tensor([fit], device=args.device)).min())

    def fill_reference(self) -> None:
        """Have a cached reference compute what it lacks for this run's data; others need nothing.

        Of the training data only the pairs that the run comes to. `train` calls this, while the policy is
        what the reference is.
        """
        # A second call, such as `train`'s after one's own, finds nothing to do, and need not look.
        asked = self.train_dataset, self.eval_dataset, self.args.max_steps
        if not isinstance(self.reference, CachedReference) or asked == self._filled_for:
            return
        places = rows_ahead(self.train_dataset, self.args, lambda: self._agreed(self._get_train_sampler()))
        self._fill(self.train_dataset, places)
        self._fill(self.eval_dataset)
        self._filled_for = asked

    def _fill(self, dataset: Any, places: Sequence[int] | None = None) -> None:
        if dataset is None or not isinstance(self.reference, CachedReference):
            return
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            # In shards it is run by all ranks together, and is what it was until its first step.
            at_start = self.reference.is_policy and self.state.global_step == 0
            together = self.model if at_start and sharding.is_sharded(self.model) else None
            fill(self.reference, part, places, self.planner, self.filled, together)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """What the dataloaders read: the columns that a plan needs, without a Python object per token."""
        return self.planner.rows_of(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset
        if self.args.group_by_prompt:
            assert self.args.batch_size is not None
            return PromptGroups(data, self.args.batch_size, self._data_seed)
        return super()._get_train_sampler(data)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """As transformers has it, but the rows of a step are dealt by `RankBatches`, not by accelerate."""
        args = self.args
        if not isinstance(dataset, Dataset):
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        rows, sampler = self.planner.rows_of(dataset), sampler_fn(dataset)
        batches = RankBatches(
            SequentialSampler(dataset) if sampler is None else self._agreed(sampler),
            batch_size * args.world_size,
            # Every held-out pair counts.
            drop_last=args.dataloader_drop_last and is_training,
            rank=args.process_index,
            ranks=args.world_size,
            work=self._row_work(rows, is_training),
        )
        prepared = step_loader(rows, batches, self.data_collator, args, self.accelerator)
        if dataloader_key is not None and args.dataloader_persistent_workers:
            self._eval_dataloaders = getattr(self, "_eval_dataloaders", {}) | {dataloader_key: prepared}
        return prepared

    def _agreed(self, sampler: Any) -> Any:
        args, seedable = self.args, self.accelerator.use_seedable_sampler
        return agreed_sampler(sampler, self._data_seed, args.world_size, seedable=seedable)

    def _row_work(self, rows: TokenRows, is_training: bool) -> RowWork | None:
        """What rows are dealt by; None where there is one rank, and where those that are evaluated at once
        are coupled and so must be the same on any number of ranks.
        """
        objective = self.objective
        if self.args.world_size == 1 or (objective.couples_examples and not is_training):
            return None
        config = unwrap(self._policy).config
        costs = Costs.of(config, with_head=not objective.needs_rewards)
        return RowWork(rows, costs, with_rejected=objective.needs_rejected)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """Fill a cached reference, then train; see `dpo_kit.checkpoints.CheckpointingTrainer.train`."""
        on_cpu = self.args.device.type == "cpu"
        with keep_freed_memory() if on_cpu else contextlib.nullcontext():
            self.shard()
            # Before a checkpoint is loaded: the policy may be what the reference is.
            self.fill_reference()
            return super().train(resume_from_checkpoint, **keywords)

    def _load_more(self, folder: Path) -> None:
        super()._load_more(folder)
        self.filled.tokens += self._counts.reference_tokens
        if isinstance(self.reference, MovingReference):
            self.reference.load(folder)

    def _counts_now(self) -> Counts:
        return replace(super()._counts_now(), reference_tokens=sum(ranks.gather(self.filled.tokens)))

    def _finished(self, checkpoint: Path) -> Any:
        done = super()._finished(checkpoint)
        if done is not None:
            # It cuts the file back to what the checkpoint knows of.
            self._metrics_file.on_train_begin(self.args, self.state, self.control)
        return done

    def _save_more(self, folder: Path) -> None:
        super()._save_more(folder)
        if isinstance(self.reference, MovingReference):
            self.reference.save(folder)

    def _after_step(self, step: int) -> None:
        if isinstance(self.reference, MovingReference):
            self.reference.after_step(self._policy, step)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As transformers has it, for rows of text too; layout and reference are settled if they were not."""
        if isinstance(eval_dataset, Dataset):
            eval_dataset = tokenized(eval_dataset, self.processing_class, self.args, self.objective)
            if not self._settled:
                self._settle_layout(eval_dataset)
        self.shard()
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        self._fill(self.eval_dataset[data] if isinstance(data, str) else data)  # type: ignore[index]
        return super().get_eval_dataloader(eval_dataset)
