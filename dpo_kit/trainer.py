"""PreferenceTrainer: a transformers.Trainer whose step is exactly `batch_size` preference pairs.

A dataloader batch holds one rank's pairs of one step, planned into micro-batches by the collator (so
in the dataloader's workers, ahead of time). `training_step` runs them with one gradient
synchronisation. What is trained is the objective's business (losses/), what is computed is the
plan's (packing.py); the optimiser, schedules, logging and checkpoints are transformers' own.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from dpo_kit.callbacks import MetricsFile, Progress
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError, TrainingError
from dpo_kit.losses import LogProbs, Objective, make_objective
from dpo_kit.metrics import WeightedMeans, pair_metrics
from dpo_kit.models import disable_dropout, load_model, use_plain_attention, use_tree_attention
from dpo_kit.packing import Layout, MicroBatch, PairTokens, plan_step
from dpo_kit.reference import Reference, make_reference
from dpo_kit.scoring import choose_layout, sequence_logprobs
from dpo_kit.tokenization import tokenize_pairs

# Rows of the training data among which the start-up check looks for its probe.
_PROBE_ROWS = 256

_STOPPED = (
    "The weights are those of the step before and the newest checkpoint is kept. "
    "A smaller learning rate, more warm-up or fp32 may mend it."
)


def _tokenized(
    dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig
) -> Dataset | None:
    """Rows of text -> rows of ids; rows of ids as they are."""
    if dataset is None or "prompt_ids" in dataset.column_names:
        return dataset
    if tokenizer is None:
        raise InputError(
            "rows of text need a tokenizer", field="processing_class", mend="Give processing_class=tokenizer."
        )
    # One process tokenises and the others read what it wrote.
    with args.main_process_first(desc="tokenising"):
        found = tokenize_pairs(dataset, tokenizer, max_length=args.max_length, overlong=args.overlong)
    left_out = {kind: n for kind, n in found.counts.items() if n and kind not in ("rows", "kept")}
    if left_out:
        message = f"{found.counts['kept']} of {found.counts['rows']} pairs kept: {left_out}"
        warnings.warn(message, DpoKitWarning, stacklevel=3)
    return found.dataset


def _total(weights: Tensor) -> Tensor:
    """What a weighted mean divides by; 1 where every weight is 0, and so is the loss."""
    total = weights.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


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
        self.objective: Objective = make_objective(args.loss)
        policy: nn.Module = model if isinstance(model, nn.Module) else load_model(model)
        if isinstance(ref_model, (str, Path)):
            ref_model = load_model(ref_model, dtype=next(policy.parameters()).dtype)
        if disable_dropout(policy):
            warnings.warn("dropout is off: shared prefixes would correlate it", DpoKitWarning, stacklevel=2)
        train_dataset, eval_dataset = (
            _tokenized(data, processing_class, args) for data in (train_dataset, eval_dataset)
        )
        self.reference = make_reference(
            args.reference_mode, policy, needed=self.objective.needs_reference, given=ref_model
        )
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        self._means = {"train": WeightedMeans(), "eval": WeightedMeans()}
        self._tokens = self._separate_tokens = self._pairs = 0
        self._logged_at, self._logged_pairs = time.perf_counter(), 0
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._plan,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[MetricsFile(), Progress(), *(callbacks or [])],
            optimizers=optimizers,
        )
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        # The mean over a step's pairs is taken in training_step.
        self.model_accepts_loss_kwargs = False
        if self.reference.model is not None:
            self.reference.model.to(args.device)
        self.layout: Layout = self._settle_layout(
            train_dataset if train_dataset is not None else eval_dataset
        )

    def _settle_layout(self, dataset: Dataset | None) -> Layout:
        """The tree where both models may be trusted with it; see `scoring.choose_layout`."""
        models = [m for m in (self.model, self.reference.model) if m is not None]
        if self.args.layout != "auto" or dataset is None:
            layout: Layout = "padded" if self.args.layout == "padded" else "tree"
        else:
            rows = dataset.select(range(min(len(dataset), _PROBE_ROWS)))
            pairs = [self._pair(row) for row in rows]
            # A copy of the policy needs no check of its own.
            checked = models[:1] if self.reference.is_policy else models
            found = [choose_layout(model, pairs) for model in checked]
            layout = "tree" if all(choice == "tree" for choice, _ in found) else "padded"
            for _, reason in found:
                if reason:
                    message = f"{reason}; separate padded sequences are used, which is slower"
                    warnings.warn(message, DpoKitWarning, stacklevel=4)
        for model in models:
            (use_tree_attention if layout == "tree" else use_plain_attention)(model)
        return layout

    def _pair(self, row: dict[str, Any]) -> PairTokens:
        return PairTokens.from_row(row, with_rejected=self.objective.needs_rejected)

    def _plan(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[MicroBatch]]:
        """The collator: rows of one step -> its micro-batches."""
        pairs = [self._pair(row) for row in rows]
        return {"micro_batches": plan_step(pairs, self.args.token_budget, self.layout)}

    def _log_probs(self, model: nn.Module, batch: MicroBatch) -> LogProbs:
        """Score a micro-batch under policy and reference."""
        # Both alike: transformers casts the prepared policy alone.
        with self.accelerator.autocast():
            policy = sequence_logprobs(model, batch)
            reference = self.reference.logprobs(batch)
        pairs = batch.num_pairs
        paired = batch.num_sequences > pairs
        return LogProbs(
            chosen=policy.sequences[:pairs],
            rejected=policy.sequences[pairs:] if paired else None,
            reference_chosen=None if reference is None else reference[:pairs],
            reference_rejected=reference[pairs:] if reference is not None and paired else None,
            chosen_lengths=batch.lengths[:pairs],
            rejected_lengths=batch.lengths[pairs:] if paired else None,
            margins=batch.margins,
            token_logps=policy.entries,
            token_sequence=batch.entry_sequence,
        )

    def _losses(self, model: nn.Module, batch: MicroBatch, split: str | None) -> Tensor:
        """[P] loss of each pair; its metrics are taken in where they belong to a split."""
        logps = self._log_probs(model, batch)
        losses = self.objective(logps)
        self._check(batch, logps, losses, first=split == "train" and self.state.global_step == 0)
        if split is not None:
            self._means[split].add(pair_metrics(logps, losses, self.objective.beta), batch.weights)
        return losses

    def _check(self, batch: MicroBatch, logps: LogProbs, losses: Tensor, first: bool) -> None:
        """Stop on a loss that is not finite, and on a reference that is not the policy at step 0."""
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            bad = [batch.sources[i] or f"pair {i}" for i in (~finite).nonzero().flatten().tolist()]
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}, on {len(bad)} of "
                f"{batch.num_pairs} pairs: {', '.join(bad[:5])}. {_STOPPED}"
            )
        if not (first and self.reference.is_policy and logps.reference_chosen is not None):
            return
        allowed = 1e-3 if self.args.bf16 or self.args.fp16 or self._low_precision else 1e-5
        for policy, reference in (
            (logps.chosen, logps.reference_chosen),
            (logps.rejected, logps.reference_rejected),
        ):
            if policy is None or reference is None:
                continue
            difference = (policy - reference).abs() / reference.abs().clamp(min=1)
            worst = int(difference.argmax())
            if difference[worst] > allowed:
                raise TrainingError(
                    "at step 0 the policy must be the reference, but on "
                    f"{batch.sources[worst] or 'a pair'} its log-prob is {policy[worst].item():.6g} and "
                    f"the reference's {reference[worst].item():.6g}"
                )

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
        loss = (losses * weights).sum() / _total(weights)
        return (loss, {"losses": losses}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over a step's micro-batches.

        Returns:
            The mean loss of this rank's pairs, times ranks over all ranks' weight, detached.
        """
        model.train()
        if not self._pairs:
            self._logged_at = time.perf_counter()
        batches: list[MicroBatch] = inputs["micro_batches"]
        weight = _total(torch.cat([batch.weights for batch in batches]).to(self.args.device))
        if self.args.world_size > 1:
            # DDP averages over ranks; with this the average is the mean over all ranks' pairs.
            weight = self.accelerator.reduce(weight, "mean")
        step_loss = torch.zeros((), device=self.args.device)
        for place, planned in enumerate(batches):
            batch = planned.to(self.args.device)
            is_last = place == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                losses = self._losses(model, batch, "train")
                loss = (losses * batch.weights).sum() / weight
                self.accelerator.backward(loss)
            step_loss += loss.detach()
            self._tokens += batch.num_tokens
            self._separate_tokens += batch.num_separate_tokens
            self._pairs += batch.num_pairs
        return step_loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise TrainingError(
                f"the gradient is not finite at step {self.state.global_step + 1}. {_STOPPED}"
            )
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
                    self._losses(model, batch, "eval")
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
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        step = self.state.global_step
        written = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        final = self.checkpoint_folder / f"step-{step}"
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / "trainer_state.json"))
        if final.exists():
            written.rename(final.with_name(f".replaced-{step}"))
        else:
            written.rename(final)
        rotate_checkpoints(
            output_dir=str(self.checkpoint_folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            checkpoint_prefix="step",
        )
