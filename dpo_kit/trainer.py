"""PreferenceTrainer: a transformers.Trainer whose step is exactly `batch_size` preference pairs.

A dataloader batch holds one rank's pairs of one step, planned into micro-batches by the collator (so
in the dataloader's workers, ahead of time). `training_step` runs them with one gradient
synchronisation. What is trained is the objective's business (losses/), what is computed is the
plan's (packing.py); the optimiser, schedules, logging and checkpoints are transformers' own.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from dpo_kit.callbacks import At, MetricsFile, Progress
from dpo_kit.capacity import measured_budget
from dpo_kit.checkpoints import CheckpointingTrainer
from dpo_kit.checks import STOPPED, check_finite, check_step_zero
from dpo_kit.compilation import compile_blocks
from dpo_kit.config import PreferenceConfig
from dpo_kit.dealing import PromptGroups
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError
from dpo_kit.filling import Filled, fill, rows_ahead
from dpo_kit.host_memory import keep_freed_memory
from dpo_kit.losses import LogProbs, Objective, make_objective
from dpo_kit.metrics import DisplacementWatch, WeightedMeans, pair_metrics
from dpo_kit.models import (
    tree_attention,
)
from dpo_kit.packing import Layout, MicroBatch, plan_step
from dpo_kit.planning import Planner
from dpo_kit.preparation import own_forward, prepared_policy, settle_layout, tokenized
from dpo_kit.reference import CachedReference, MovingReference, Reference, make_reference
from dpo_kit.step import CoupledStep, Scorer, carried_on, couple

# Pairs on which it is measured what a token takes of the memory.
_CAPACITY_PAIRS = 16

# Relative difference of a sequence's log-prob between a policy and a reference of the same weights:
# (low precision, computed in other micro-batches) -> what is allowed.
_ROUNDING = {(False, False): 1e-5, (False, True): 5e-5, (True, False): 1e-3, (True, True): 5e-2}


def _divisor(weights: Tensor) -> Tensor:
    """What a weighted mean divides by; 1 where every weight is 0, and so is the loss."""
    return torch.where(weights > 0, weights, torch.ones_like(weights))


class PreferenceTrainer(CheckpointingTrainer):
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
            tokenized(data, processing_class, args, self.objective) for data in (train_dataset, eval_dataset)
        )
        policy = prepared_policy(model, peft_config, rewards=self.objective.needs_rewards)
        if isinstance(train_dataset, Dataset) and len(train_dataset) < args.per_device_train_batch_size:
            message = (
                f"the data has {len(train_dataset)} pairs, fewer than one step takes ({args.batch_size})"
            )
            warnings.warn(message, DpoKitWarning, stacklevel=2)
        self._planner = Planner(args, self.objective)
        self._means = {"train": WeightedMeans(), "eval": WeightedMeans()}
        self._displacement = DisplacementWatch()
        self._stepped = False
        self._logged_at, self._logged_pairs = time.perf_counter(), 0
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._planner,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                MetricsFile(),
                Progress(),
                At(before_first_step=self._settle_token_budget, after_step=self._after_step),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        # The mean over a step's pairs is taken in training_step.
        self.model_accepts_loss_kwargs = False
        self.reference = self._make_reference(ref_model)
        if self.reference.model is not None:
            self.reference.model.to(args.device)
        self.filled = Filled()
        metrics = tuple(args.token_metrics)
        self._scorer = Scorer(self.objective, self.reference, self.accelerator.autocast, metrics)
        self._planner.with_keys = self.reference.needs_keys
        self._settle_layout(train_dataset if train_dataset is not None else eval_dataset)
        if args.compile_blocks:
            for compiled in filter(None, (self._policy, self.reference.model)):
                compile_blocks(compiled)

    def _make_reference(self, given: Any) -> Reference:
        args, policy, objective = self.args, self._policy, self.objective
        if given is policy:
            raise InputError(
                "the reference is the very object that is trained",
                field="ref_model",
                mend="Leave it out: the reference is then the policy as it was before the first step.",
            )
        return make_reference(
            "none" if objective.needs_rewards else args.reference_mode,
            policy,
            needed=objective.needs_reference,
            given=own_forward(given) if isinstance(given, nn.Module) else given,
            cacheable="reference_kl" not in objective.extras,
            tokens=objective.needs_reference_tokens,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
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
        policy, reference = self._policy, self.reference
        # A copy of the policy needs no check of its own.
        others = [] if reference.model is None or reference.is_policy else [reference.model]
        self._planner.layout = settle_layout(
            [policy, *others], dataset, self.args, self._planner.example, self.accelerator.autocast
        )

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out: "tree" or "padded"."""
        return self._planner.layout

    def _settle_token_budget(self) -> None:
        """On CUDA, "auto" is what the free memory allows; the same on all ranks."""
        args, data = self.args, self.train_dataset
        fixed = args.tokens_per_micro_batch != "auto" or args.device.type != "cuda"
        # A sharded model takes other memory than what one rank can measure alone.
        if fixed or self.is_fsdp_enabled or self.is_deepspeed_enabled or len(data) < 2:  # type: ignore[arg-type]
            return
        pairs = [self._planner.example(row) for row in data.select(range(min(len(data), _CAPACITY_PAIRS)))]  # type: ignore[union-attr, arg-type]
        with self.accelerator.autocast(), self._attention(self._policy):
            fit = measured_budget(
                self._policy.train(),
                lambda part: plan_step(part, sys.maxsize, self.layout, args.backend)[0],
                pairs,
            )
        args.auto_tokens = int(self.accelerator.gather(torch.tensor([fit], device=args.device)).min())

    def fill_reference(self) -> None:
        """Have a cached reference compute what it lacks for this run's data; others need nothing.

        Of the training data only the pairs that the run comes to. `train` calls this, while the policy is
        what the reference is.
        """
        if isinstance(self.reference, CachedReference):
            order: Any = self.get_train_dataloader
            places = rows_ahead(self.train_dataset, self.args, lambda: order().batch_sampler)
            self._fill(self.train_dataset, places)
        self._fill(self.eval_dataset)

    def _fill(self, dataset: Any, places: Sequence[int] | None = None) -> None:
        if dataset is None or not isinstance(self.reference, CachedReference):
            return
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            fill(self.reference, part, places, self._planner, self.accelerator, self.filled)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """What the dataloaders read: the columns that a plan needs, without a Python object per token."""
        return self._planner.rows_of(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset
        if self.args.group_by_prompt:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return PromptGroups(data, self.args.per_device_train_batch_size, seed)
        return super()._get_train_sampler(data)

    def _losses(self, model: nn.Module, batch: MicroBatch, split: str | None) -> Tensor:
        """[P] loss of each example; its metrics are taken in where they belong to a split."""
        logps = self._scorer(model, batch)
        losses = self.objective(logps)
        self._watch(logps, losses, batch.weights, batch.sources, split)
        return losses

    def _coupled(
        self, model: nn.Module, inputs: dict[str, Any], weights: Tensor, split: str | None
    ) -> CoupledStep:
        """A whole step's losses, where one depends on the others."""
        batches = inputs["micro_batches"]
        # Held-out examples are coupled within what one rank evaluates at once.
        ranks = self.args.world_size if split == "train" else 1
        step = couple(self._scorer, model, inputs, weights, self._counts.running, self.accelerator, ranks)
        sources = [source for batch in batches for source in batch.sources]
        self._watch(step.logps, step.losses, weights, sources, split)
        return step

    def _watch(
        self, logps: LogProbs, losses: Tensor, weights: Tensor, sources: Sequence[str], split: str | None
    ) -> None:
        is_first = split == "train" and self.state.global_step == 0 and not self._stepped
        if is_first and self.reference.is_policy:
            low_precision = self.args.bf16 or self.args.fp16 or self._low_precision
            # Cached values were computed in other micro-batches, and low precision rounds otherwise there.
            rounding = _ROUNDING[low_precision, self.reference.needs_keys]
            check_step_zero(logps, sources, allowed=rounding)
        if split is not None:
            self._means[split].add(pair_metrics(logps, losses, self.objective.beta), weights)

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
        if self.objective.couples_examples:
            parts = [self._scorer(model, batch) for batch in batches]
            strangers = inputs.get("mismatched")
            mismatched = strangers and self._scorer.logratios(model, strangers, self.args.device)
            losses = CoupledStep(self.objective, parts, weights, mismatched, self._counts.running).losses
        else:
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
        step, gradients = None, []
        if self.objective.couples_examples:
            with self._attention(model):
                step = self._coupled(model, inputs, weights, "train")
            self._counts.running = step.running
            gradients = step.gradients(weight) if step.is_cut else []
        step_losses: list[Tensor] = []
        for place, planned in enumerate(batches):
            batch = planned.to(self.args.device)
            is_last = place == len(batches) - 1
            with self._attention(model), self._sync(model, is_last):
                if step is None:
                    losses = self._losses(model, batch, "train")
                    loss = (losses * batch.weights).sum() / weight
                    step_losses.append(losses.detach())
                elif gradients:
                    loss = carried_on(self._scorer(model, batch, again=True), gradients[place])
                else:
                    loss = step.loss(weight)
                self.accelerator.backward(loss)
            self._counts.add(batch)
        self._stepped = True
        losses = torch.cat(step_losses) if step is None else step.losses.detach()
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
        means = self._means[split]
        self._means[split] = WeightedMeans()
        if self.args.world_size > 1:
            # A rank may have had no example at all, and so no names.
            means = WeightedMeans.merged(gather_object([means.cpu()]))
        return means.means()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add preference metrics and speed to a line of training logs; warn where it goes wrong."""
        if "loss" in logs and "learning_rate" in logs:
            now, pairs = time.perf_counter(), self._counts.pairs - self._logged_pairs
            logs |= self._take_means("train")
            if advice := self._displacement.advice(logs):
                warnings.warn(f"step {self.state.global_step}: {advice}", DpoKitWarning, stacklevel=2)
            tokens = torch.tensor([self._counts.tokens], device=self.args.device)
            logs["num_tokens"] = int(self.accelerator.gather(tokens).sum())
            logs["pairs_per_second"] = pairs * self.args.world_size / max(now - self._logged_at, 1e-9)
            self._logged_at, self._logged_pairs = now, self._counts.pairs
        super().log(logs, start_time)

    @property
    def pairs_seen(self) -> int:
        """Pairs trained on so far, over all ranks."""
        return self._counts.pairs * self.args.world_size

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """As transformers has it; `resume_from_checkpoint=True` is the newest of checkpoints/step-N.

        Checkpoints of an earlier run in the same folder are put aside under another name.

        Raises:
            InputError: there is none.
        """
        on_cpu = self.args.device.type == "cpu"
        with keep_freed_memory() if on_cpu else contextlib.nullcontext():
            # Before a checkpoint is loaded: the policy may be what the reference is.
            self.fill_reference()
            return super().train(resume_from_checkpoint, **keywords)

    def _load_more(self, folder: Path) -> None:
        super()._load_more(folder)
        self._logged_pairs = self._counts.pairs
        if isinstance(self.reference, MovingReference):
            self.reference.load(folder)

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
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        self._fill(self.eval_dataset[data] if isinstance(data, str) else data)  # type: ignore[index]
        # Every held-out pair counts once, even if a rank then has fewer; but all ranks of a sharded model
        # must run alike.
        even = self.accelerator.even_batches
        self.accelerator.even_batches = self.is_fsdp_enabled or self.is_deepspeed_enabled
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.accelerator.even_batches = even

    @property
    def tokens_saved_share(self) -> float:
        """Share of the tokens of separate sequences that the tree did not have to compute."""
        return self._counts.saved_share

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
                for sources, losses in self._held_out(model, inputs):
                    check_finite(sources, losses, "in evaluation")
                    pairs += len(losses)
        self._logged_at += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._take_means("eval").items()}
        counted = int(self.accelerator.gather(torch.tensor([pairs], device=self.args.device)).sum())
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=counted)  # type: ignore[arg-type]

    def _held_out(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[tuple[list[str], Tensor]]:
        """Where they come from and their losses, of each micro-batch, or of all at once."""
        batches: list[MicroBatch] = inputs["micro_batches"]
        if self.objective.couples_examples:
            weights = torch.cat([batch.weights for batch in batches]).to(self.args.device)
            step = self._coupled(model, inputs, weights, "eval")
            yield [source for batch in batches for source in batch.sources], step.losses
            return
        for planned in batches:
            batch = planned.to(self.args.device)
            yield batch.sources, self._losses(model, batch, "eval")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six per parameter and distinct token, the reference's forward left out."""
        tokens = sum(batch.num_tokens for batch in inputs["micro_batches"])
        return 6 * tokens * sum(p.numel() for p in self._policy.parameters())
