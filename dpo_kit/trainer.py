"""PreferenceTrainer: a transformers.Trainer whose step is exactly `batch_size` preference pairs.

A dataloader batch holds one rank's pairs of one step, planned into micro-batches by the collator (so
in the dataloader's workers, ahead of time). `training_step` runs them with one gradient
synchronisation. What is trained is the objective's business (losses/), what is computed is the
plan's (packing.py); the optimiser, schedules, logging and checkpoints are transformers' own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from dpo_kit.callbacks import BeforeFirstStep, MetricsFile, Progress
from dpo_kit.capacity import measured_budget
from dpo_kit.checkpoints import name_whole, newest_checkpoint, put_aside
from dpo_kit.checks import STOPPED, check_finite, check_step_zero
from dpo_kit.compilation import compile_blocks
from dpo_kit.config import PreferenceConfig
from dpo_kit.dealing import PromptGroups, TokenRows
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError
from dpo_kit.examples import PairTokens
from dpo_kit.host_memory import keep_freed_memory
from dpo_kit.losses import LogProbs, Objective, make_objective
from dpo_kit.metrics import WeightedMeans, pair_metrics
from dpo_kit.models import disable_dropout, load_model, output_head, tree_attention
from dpo_kit.packing import Layout, MicroBatch, plan_step
from dpo_kit.preparation import own_forward, settle_layout, tokenized
from dpo_kit.reference import Reference, make_reference
from dpo_kit.scoring import sequence_logprobs

# Pairs on which it is measured what a token takes of the memory.
_CAPACITY_PAIRS = 16

# Tokens computed, tokens of separate sequences, pairs and seconds so far: a resumed run counts on.
_COUNTS_FILE = "counts.json"


def _divisor(weights: Tensor) -> Tensor:
    """What a weighted mean divides by; 1 where every weight is 0, and so is the loss."""
    return torch.where(weights > 0, weights, torch.ones_like(weights))


class PreferenceTrainer(Trainer):
    """Train a policy on preference pairs.

    Args:
        model: the policy: a causal LM, or a folder or hub id to load one from.
        ref_model: the reference; default: what `args.reference_mode` says, a frozen copy of the policy.
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
        self.objective: Objective = make_objective(args.loss)
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, args) for data in (train_dataset, eval_dataset)
        )
        policy = own_forward(model if isinstance(model, nn.Module) else load_model(model))
        self.reference = self._make_reference(policy, ref_model, args)
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        if disable_dropout(policy):
            warnings.warn("dropout is off: shared prefixes would correlate it", DpoKitWarning, stacklevel=2)
        output_head(policy)
        if isinstance(train_dataset, Dataset) and len(train_dataset) < args.per_device_train_batch_size:
            message = (
                f"the data has {len(train_dataset)} pairs, fewer than one step takes ({args.batch_size})"
            )
            warnings.warn(message, DpoKitWarning, stacklevel=2)
        self._means = {"train": WeightedMeans(), "eval": WeightedMeans()}
        self._tokens = self._separate_tokens = self._pairs = 0
        self._stepped = False
        self._seconds, self._began = 0.0, 0.0
        self._logged_at, self._logged_pairs = time.perf_counter(), 0
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._plan,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                MetricsFile(),
                Progress(),
                BeforeFirstStep(self._settle_token_budget),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        # The mean over a step's pairs is taken in training_step.
        self.model_accepts_loss_kwargs = False
        if self.reference.model is not None:
            self.reference.model.to(args.device)
        self.layout: Layout = "padded"
        self._settle_layout(train_dataset if train_dataset is not None else eval_dataset)
        if args.compile_blocks:
            for compiled in filter(None, (self._policy, self.reference.model)):
                compile_blocks(compiled)

    def _make_reference(self, policy: nn.Module, given: Any, args: PreferenceConfig) -> Reference:
        if given is policy:
            raise InputError(
                "the reference is the very object that is trained",
                field="ref_model",
                mend="Leave it out: the reference is then a frozen copy of the policy.",
            )
        needed = self.objective.needs_reference
        if not needed and args.reference_mode == "auto":
            given = None
        if isinstance(given, (str, Path)):
            given = load_model(given, dtype=next(policy.parameters()).dtype)
        if isinstance(given, nn.Module):
            given = own_forward(given)
        return make_reference(args.reference_mode, policy, needed=needed, given=given)

    def _settle_layout(self, dataset: Any) -> None:
        """The tree where both models may be trusted with it; see `scoring.choose_layout`.

        Without a data set this waits for the first one that is evaluated.
        """
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        self._settled = dataset is not None
        if dataset is None:
            return
        policy, reference = self._policy, self.reference
        # A copy of the policy needs no check of its own.
        others = [] if reference.model is None or reference.is_policy else [reference.model]
        self.layout = settle_layout(
            [policy, *others], dataset, self.args, self._pair, self.accelerator.autocast
        )

    def _settle_token_budget(self) -> None:
        """On CUDA, "auto" is what the free memory allows; the same on all ranks."""
        args, data = self.args, self.train_dataset
        fixed = args.tokens_per_micro_batch != "auto" or args.device.type != "cuda"
        # A sharded model takes other memory than what one rank can measure alone.
        if fixed or self.is_fsdp_enabled or self.is_deepspeed_enabled or len(data) < 2:  # type: ignore[arg-type]
            return
        pairs = [self._pair(row) for row in data.select(range(min(len(data), _CAPACITY_PAIRS)))]  # type: ignore[union-attr, arg-type]
        with self.accelerator.autocast(), self._attention(self._policy):
            fit = measured_budget(
                self._policy.train(),
                lambda part: plan_step(part, sys.maxsize, self.layout, args.backend)[0],
                pairs,
            )
        args.auto_tokens = int(self.accelerator.gather(torch.tensor([fit], device=args.device)).min())

    def _pair(self, row: dict[str, Any]) -> PairTokens:
        return PairTokens.from_row(row, with_rejected=self.objective.needs_rejected)

    def _plan(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[MicroBatch]]:
        """The collator: rows of one step -> its micro-batches."""
        pairs = [self._pair(row) for row in rows]
        return {"micro_batches": plan_step(pairs, self.args.token_budget, self.layout, self.args.backend)}

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """What the dataloaders read: the columns that a plan needs, without a Python object per token."""
        return TokenRows(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset
        if self.args.group_by_prompt:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return PromptGroups(data, self.args.per_device_train_batch_size, seed)
        return super()._get_train_sampler(data)

    def _log_probs(self, model: nn.Module, batch: MicroBatch) -> LogProbs:
        """Score a micro-batch under policy and reference."""
        # Both alike: transformers casts the prepared policy alone. The reference first, while the policy's
        # activations do not take the memory yet.
        with self.accelerator.autocast():
            reference = self.reference.logprobs(batch)
            policy = sequence_logprobs(model, batch)
        return LogProbs(
            policy=policy.sequences,
            example=batch.sequence_example,
            num_examples=batch.num_pairs,
            shape=batch.shape,
            reference=reference,
            lengths=batch.lengths,
            scores=batch.scores,
            margins=batch.margins,
            token_logps=policy.entries,
            token_sequence=batch.entry_sequence,
        )

    def _losses(self, model: nn.Module, batch: MicroBatch, split: str | None) -> Tensor:
        """[P] loss of each pair; its metrics are taken in where they belong to a split."""
        logps = self._log_probs(model, batch)
        losses = self.objective(logps)
        is_first = split == "train" and self.state.global_step == 0 and not self._stepped
        if is_first and self.reference.is_policy:
            low_precision = self.args.bf16 or self.args.fp16 or self._low_precision
            check_step_zero(logps, batch.sources, allowed=1e-3 if low_precision else 1e-5)
        if split is not None:
            self._means[split].add(pair_metrics(logps, losses, self.objective.beta), batch.weights)
        return losses

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _low_precision(self) -> bool:
        return next(self._policy.parameters()).dtype in (torch.bfloat16, torch.float16)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a planned batch with its graph, all micro-batches at once (for inspection)."""
        batches = [batch.to(self.args.device) for batch in inputs["micro_batches"]]
        weights = torch.cat([batch.weights for batch in batches])
        losses = torch.cat([self._losses(model, batch, None) for batch in batches])
        loss = (losses * weights).sum() / _divisor(weights.sum())
        return (loss, {"losses": losses}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over a step's micro-batches.

        Returns:
            The mean loss of this rank's pairs, times ranks over all ranks' weight, detached.
        """
        model.train()
        if not self._stepped:
            self._logged_at = time.perf_counter()
        batches: list[MicroBatch] = inputs["micro_batches"]
        weights = torch.cat([batch.weights for batch in batches]).to(self.args.device)
        weight = weights.sum()
        if self.args.world_size > 1:
            # DDP averages over ranks; with this the average is the mean over all ranks' pairs.
            weight = self.accelerator.reduce(weight, "mean")
        weight = _divisor(weight)
        step_losses: list[Tensor] = []
        for place, planned in enumerate(batches):
            batch = planned.to(self.args.device)
            is_last = place == len(batches) - 1
            with self._attention(model), self._sync(model, is_last):
                losses = self._losses(model, batch, "train")
                self.accelerator.backward((losses * batch.weights).sum() / weight)
            step_losses.append(losses.detach())
            self._tokens += batch.num_tokens
            self._separate_tokens += batch.num_separate_tokens
            self._pairs += batch.num_pairs
        self._stepped = True
        losses = torch.cat(step_losses)
        sources = [source for batch in batches for source in batch.sources]
        check_finite(sources, losses, f"at step {self.state.global_step + 1}")
        return (losses * weights).sum() / weight

    def _attention(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward: gradient checkpointing computes the forward in the backward."""
        return tree_attention(model) if self.layout == "tree" else contextlib.nullcontext()

    def _sync(self, model: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients meet across ranks once a step."""
        return contextlib.nullcontext() if now else self.accelerator.no_sync(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (fp16) skips such steps by itself.
        checked = norm is not None and self.accelerator.scaler is None
        if checked and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise TrainingError(f"the gradient is not finite at step {self.state.global_step + 1}. {STOPPED}")
        return norm

    def _take_means(self, split: str) -> dict[str, float]:
        """Means over all ranks since the last time."""
        names, state = self._means[split].state()
        self._means[split] = WeightedMeans()
        if self.args.world_size > 1 and names:
            state = self.accelerator.reduce(state.to(self.args.device), "sum")
        return WeightedMeans.means(names, state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add preference metrics and speed to a line of training logs."""
        if "loss" in logs and "learning_rate" in logs:
            now, pairs = time.perf_counter(), self._pairs - self._logged_pairs
            logs |= self._take_means("train")
            logs["num_tokens"] = self._tokens
            logs["pairs_per_second"] = pairs * self.args.world_size / max(now - self._logged_at, 1e-9)
            self._logged_at, self._logged_pairs = now, self._pairs
        super().log(logs, start_time)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """As transformers has it; `resume_from_checkpoint=True` is the newest of checkpoints/step-N.

        Checkpoints of an earlier run in the same folder are put aside under another name.

        Raises:
            InputError: there is none.
        """
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(Path(str(self.args.output_dir)))
            if newest is None:
                raise InputError("there is no checkpoint to resume from", file=self.checkpoint_folder)
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint and (counts := Path(resume_from_checkpoint) / _COUNTS_FILE).exists():
            self._tokens, self._separate_tokens, self._pairs, self._seconds = json.loads(counts.read_text())
            self._logged_pairs = self._pairs
        self._began = time.perf_counter()
        if resume_from_checkpoint and (done := self._finished(Path(resume_from_checkpoint))):
            return done
        if not resume_from_checkpoint and self.args.should_save and self.checkpoint_folder.exists():
            put_aside(self.checkpoint_folder)
        on_cpu = self.args.device.type == "cpu"
        with keep_freed_memory() if on_cpu else contextlib.nullcontext():
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **keywords)

    def _finished(self, checkpoint: Path) -> TrainOutput | None:
        """Load a checkpoint that has all its steps: transformers would train one more in mid-epoch."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return TrainOutput(state.global_step, 0.0, {"train_loss": 0.0})

    @property
    def train_seconds(self) -> float:
        """Time in `train` so far, that of the runs it was resumed from included."""
        return self._seconds + (time.perf_counter() - self._began if self._began else 0.0)

    @property
    def pairs_seen(self) -> int:
        """Pairs trained on so far, over all ranks."""
        return self._pairs * self.args.world_size

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As transformers has it, for rows of text too; the layout is settled where it was not yet."""
        if isinstance(eval_dataset, Dataset):
            eval_dataset = tokenized(eval_dataset, self.processing_class, self.args)
            if not self._settled:
                self._settle_layout(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    @property
    def tokens_saved_share(self) -> float:
        """Share of the tokens of separate sequences that the tree did not have to compute."""
        return 1 - self._tokens / self._separate_tokens if self._separate_tokens else 0.0

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics of every pair of a data set; nothing is trained and no logits are kept."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        model.to(self.args.device).eval()
        started, pairs = time.perf_counter(), 0
        with torch.no_grad():
            for inputs in dataloader:
                for planned in inputs["micro_batches"]:
                    batch = planned.to(self.args.device)
                    check_finite(batch.sources, self._losses(model, batch, "eval"), "in evaluation")
                    pairs += batch.num_pairs
        self._logged_at += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._take_means("eval").items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=pairs)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six per parameter and distinct token, the reference's forward left out."""
        tokens = sum(batch.num_tokens for batch in inputs["micro_batches"])
        return 6 * tokens * sum(p.numel() for p in self._policy.parameters())

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints/step-N lie."""
        return Path(str(self.args.output_dir)) / "checkpoints"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_folder / ".writing")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that a folder step-N is always whole."""
        if not all(bool(torch.isfinite(p).all()) for p in self._policy.parameters() if p.requires_grad):
            raise TrainingError(
                f"the weights are not finite at step {self.state.global_step}, and are not saved. The newest "
                "checkpoint is kept. A smaller learning rate or more warm-up may mend it."
            )
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        step = self.state.global_step
        written = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        final = self.checkpoint_folder / f"step-{step}"
        counts = [self._tokens, self._separate_tokens, self._pairs, self.train_seconds]
        (written / _COUNTS_FILE).write_text(json.dumps(counts))
        name_whole(written, final, self.state)
        rotate_checkpoints(
            output_dir=str(self.checkpoint_folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            checkpoint_prefix="step",
        )
