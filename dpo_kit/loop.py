"""The loop that trains: a step over its micro-batches, held-out pairs, and what both log.

A dataloader batch holds one rank's pairs of one step, planned into micro-batches by the collator (so
in the dataloader's workers, ahead of time). `training_step` runs them with one gradient
synchronisation. What is trained is the objective's business (losses/), what is computed is the
plan's (packing.py); how all of it comes about is the trainer's.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from dpo_kit.checkpoints import CheckpointingTrainer
from dpo_kit.checks import STOPPED, check_finite, check_step_zero
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DivergedError, DpoKitWarning
from dpo_kit.losses import LogProbs, Objective
from dpo_kit.metrics import DisplacementWatch, WeightedMeans, pair_metrics
from dpo_kit.models import tree_attention
from dpo_kit.packing import Layout, MicroBatch
from dpo_kit.planning import Planner
from dpo_kit.reference import Reference
from dpo_kit.step import CoupledStep, Scorer, carried_on, couple, sources_of, weights_of

# Relative difference of a sequence's log-prob between a policy and a reference of the same weights:
# (low precision, computed in other micro-batches) -> what is allowed.
_ROUNDING = {(False, False): 1e-5, (False, True): 5e-5, (True, False): 1e-3, (True, True): 5e-2}


def _divisor(weights: Tensor) -> Tensor:
    """What a weighted mean divides by; 1 where every weight is 0, and so is the loss."""
    return torch.where(weights > 0, weights, torch.ones_like(weights))


class TrainingLoop(CheckpointingTrainer):
    """Trains a policy on planned steps.

    Attributes:
        args: the settings.
        objective: what is trained.
        reference: what the policy is compared with.
        planner: makes micro-batches of rows.
    """

    args: PreferenceConfig
    objective: Objective
    reference: Reference
    planner: Planner
    _scorer: Scorer

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._means = {"train": WeightedMeans(), "eval": WeightedMeans()}
        self._displacement = DisplacementWatch()
        self._stepped = False
        self._logged_at, self._logged_pairs = time.perf_counter(), 0
        super().__init__(*args, **keywords)

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out: "tree" or "padded"."""
        return self.planner.layout

    def _load_more(self, folder: Path) -> None:
        super()._load_more(folder)
        self._logged_pairs = self._counts.pairs

    def _losses(self, model: nn.Module, batch: MicroBatch, split: str | None) -> Tensor:
        """[P] loss of each example; its metrics are taken in where they belong to a split."""
        logps = self._scorer(model, batch)
        losses = self.objective(logps)
        self._watch(logps, losses, batch.weights, batch.sources, split)
        return losses

    def _coupled(
        self, model: nn.Module, inputs: dict[str, Any], split: str | None, *, with_graph: bool = False
    ) -> CoupledStep:
        """A whole step's losses, where one depends on the others."""
        # Held-out examples are coupled within what one rank evaluates at once.
        ranks = self.args.world_size if split == "train" else 1
        running = self._counts.running
        step = couple(self._scorer, model, inputs, running, self.accelerator, ranks, with_graph=with_graph)
        self._watch(step.logps, step.losses, step.weights, sources_of(inputs["micro_batches"]), split)
        return step

    def _watch(
        self, logps: LogProbs, losses: Tensor, weights: Tensor, sources: Sequence[str], split: str | None
    ) -> None:
        is_first = split == "train" and self.state.global_step == 0 and not self._stepped
        if is_first and self.reference.is_policy:
            low_precision = self.accelerator.mixed_precision != "no" or self._low_precision
            # Cached values were computed in other micro-batches, and low precision rounds otherwise there.
            cached = self.reference.needs_keys
            check_step_zero(
                logps, sources, _ROUNDING[low_precision, cached], independent=low_precision and cached
            )
        if split is not None:
            found = pair_metrics(logps, losses, self.objective.beta, per_token=self.objective.per_token)
            self._means[split].add(found, weights)

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
        weights = weights_of(batches)
        if self.objective.couples_examples:
            losses = self._coupled(model, inputs, None, with_graph=True).losses
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
        weights = weights_of(batches).to(self.args.device)
        weight = weights.sum()
        if self.args.world_size > 1:
            # DDP averages over ranks; with this the average is the mean over all ranks' pairs.
            weight = self.accelerator.reduce(weight, "mean")
        weight = _divisor(weight)
        step, gradients = None, []
        if self.objective.couples_examples:
            with self._attention(model):
                step = self._coupled(model, inputs, "train")
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
        check_finite(sources_of(batches), losses, f"at step {self.state.global_step + 1}")
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
            raise DivergedError(f"the gradient is not finite at step {self.state.global_step + 1}. {STOPPED}")
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

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Within it, neither `train_seconds` nor the pairs per second that are logged count the time."""
        started = time.perf_counter()
        with super().clock_stopped():
            yield
        self._logged_at += time.perf_counter() - started

    def cost(self) -> dict[str, float]:
        """What training took so far: seconds, and tokens through the policy, forward and backward."""
        return {"seconds": self.train_seconds, "tokens": self._counts.tokens * self.args.world_size}

    @property
    def pairs_seen(self) -> int:
        """Pairs trained on so far, over all ranks."""
        return self._counts.pairs * self.args.world_size

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
            yield sources_of(batches), self._coupled(model, inputs, "eval").losses
            return
        for planned in batches:
            batch = planned.to(self.args.device)
            yield batch.sources, self._losses(model, batch, "eval")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six per parameter and distinct token, the reference's forward left out."""
        tokens = sum(batch.num_tokens for batch in inputs["micro_batches"])
        return 6 * tokens * sum(p.numel() for p in self._policy.parameters())
