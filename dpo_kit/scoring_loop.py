"""Planned examples -> their losses, under a trainer: what is logged of them, in training and held out.

How the losses train the policy is `loop`'s; what an example's loss is, the objective's.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from dpo_kit import ranks
from dpo_kit.checkpoints import CheckpointingTrainer, Counts
from dpo_kit.checks import check_finite, check_step_zero
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning
from dpo_kit.losses import LogProbs, Objective
from dpo_kit.metrics import DisplacementWatch, WeightedMeans, pair_metrics
from dpo_kit.models import tree_attention
from dpo_kit.nonfinite import Scored
from dpo_kit.packing import Layout, MicroBatch
from dpo_kit.planning import Planner
from dpo_kit.quantised import count_parameters, is_low_precision
from dpo_kit.reference import Reference
from dpo_kit.step import CoupledStep, Scorer, Totals, couple, sources_of, weights_of

# Relative difference of a sequence's log-prob between a policy and a reference of the same weights:
# (low precision, computed in other micro-batches) -> what is allowed.
_ROUNDING = {(False, False): 1e-5, (False, True): 5e-5, (True, False): 1e-3, (True, True): 5e-2}


class ScoringLoop(CheckpointingTrainer):
    """Scores planned examples under policy and reference, and watches them.

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
        # Of the step that is being computed: taken in when it is whole.
        self._scored: list[Scored] = []
        self._logged_at, self._logged_pairs = time.perf_counter(), 0
        super().__init__(*args, **keywords)

    @property
    def _is_sharded(self) -> bool:
        """Whether every pass through the model is one of all ranks together."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out: "tree" or "padded"."""
        return self.planner.layout

    def _load_more(self, folder: Path) -> None:
        super()._load_more(folder)
        self._logged_pairs = self._counts.over_ranks().pairs
        if ranks.is_first():
            self._means["train"] = WeightedMeans.of_state(self._counts.unlogged, self.args.device)

    def _counts_now(self) -> Counts:
        means = WeightedMeans.merged(ranks.gather(self._means["train"].cpu()))
        return replace(super()._counts_now(), unlogged=means.state())

    def _losses(self, model: nn.Module, batch: MicroBatch, split: str | None) -> Tensor:
        """[P] loss of each example; its metrics are taken in where they belong to a split."""
        logps = self._scorer(model, batch)
        losses = self.objective(logps)
        self._watch(logps, losses, batch.weights, batch.sources, split)
        return losses

    def _coupled(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        split: str | None,
        totals: Totals,
        *,
        with_graph: bool = False,
    ) -> CoupledStep:
        """A whole step's losses, where one depends on the others."""
        # Held-out examples are coupled within what one rank evaluates at once.
        together, device = self.args.world_size if split == "train" else 1, self.args.device
        running = self._counts.running
        step = couple(self._scorer, model, inputs, running, totals, device, together, with_graph=with_graph)
        if step.logps is not None:
            self._watch(step.logps, step.losses, step.weights, sources_of(inputs["micro_batches"]), split)
        return step

    def _watch(
        self, logps: LogProbs, losses: Tensor, weights: Tensor, sources: Sequence[str], split: str | None
    ) -> None:
        at_start = split == "train" and self.state.global_step == 0 and not self._stepped
        if at_start and self.reference.is_policy:
            low_precision = self.accelerator.mixed_precision != "no" or self._low_precision
            # Cached values were computed in other micro-batches, and low precision rounds otherwise there.
            cached = self.reference.needs_keys
            check_step_zero(
                logps, sources, _ROUNDING[low_precision, cached], independent=low_precision and cached
            )
        if split is not None:
            self._scored.append(Scored(logps.detached(), losses.detach(), weights, sources))

    def _take_in(self, split: str) -> None:
        """Count what was scored among a split's metrics."""
        per_token = self.objective.per_token
        for part in self._scored:
            found = pair_metrics(part.logps, part.losses, self.objective.beta, per_token=per_token)
            self._means[split].add(found, part.weights)

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _low_precision(self) -> bool:
        return is_low_precision(self._policy)

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
        totals = Totals.of(inputs, self.accelerator, 1, sharded=False)
        if self.objective.couples_examples:
            losses = self._coupled(model, inputs, None, totals, with_graph=True).losses
        else:
            losses = torch.cat([self._losses(model, batch, None) for batch in batches])
        loss = (losses * weights).sum() / totals.divisor
        return (loss, {"losses": losses}) if return_outputs else loss

    def _attention(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward: gradient checkpointing computes the forward in the backward."""
        return tree_attention(model) if self.layout == "tree" else contextlib.nullcontext()

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
            now, counts = time.perf_counter(), self._counts.over_ranks()
            logs |= self._take_means("train")
            if advice := self._displacement.advice(logs):
                warnings.warn(f"step {self.state.global_step}: {advice}", DpoKitWarning, stacklevel=2)
            logs["num_tokens"] = counts.tokens
            logs["pairs_per_second"] = (counts.pairs - self._logged_pairs) / max(now - self._logged_at, 1e-9)
            self._logged_at, self._logged_pairs = now, counts.pairs
        super().log(logs, start_time)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Within it, neither `train_seconds` nor the pairs per second that are logged count the time."""
        started = time.perf_counter()
        with super().clock_stopped():
            yield
        self._logged_at += time.perf_counter() - started

    def cost(self) -> dict[str, float]:
        """What training took so far: seconds, and all ranks' tokens through the policy, forward and backward.

        On all ranks together.
        """
        return {"seconds": self.train_seconds, "tokens": sum(ranks.gather(self._counts.tokens))}

    @property
    def pairs_seen(self) -> int:
        """Pairs trained on so far, over all ranks; on all of them together."""
        return self._counts.over_ranks().pairs

    @property
    def tokens_saved_share(self) -> float:
        """Share of the tokens of separate sequences that the tree did not compute; on all ranks together."""
        return self._counts.over_ranks().saved_share

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
        if not self._is_sharded:
            model.to(self.args.device)
        model.eval()
        started, pairs = time.perf_counter(), 0
        with torch.no_grad():
            for inputs in dataloader:
                self._scored = []
                for sources, losses in self._held_out(model, inputs):
                    check_finite(sources, losses, "in evaluation")
                    pairs += len(losses)
                self._take_in("eval")
        self._logged_at += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._take_means("eval").items()}
        counted = int(self.accelerator.gather(torch.tensor([pairs], device=self.args.device)).sum())
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=counted)  # type: ignore[arg-type]

    def _held_out(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[tuple[list[str], Tensor]]:
        """Where they come from and their losses, of each micro-batch, or of all at once."""
        batches: list[MicroBatch] = inputs["micro_batches"]
        together = self.args.world_size if self._is_sharded else 1
        totals = Totals.of(inputs, self.accelerator, together, sharded=self._is_sharded)
        if self.objective.couples_examples and batches:
            yield sources_of(batches), self._coupled(model, inputs, "eval", totals).losses
            return
        fillers = totals.fillers(len(batches), totals.micro_batches)
        if self.objective.couples_examples:
            fillers += totals.fillers(0, totals.mismatched)
        for _ in range(fillers):
            self._scorer.nothing(model, inputs["filler"].to(self.args.device))
        for planned in batches:
            batch = planned.to(self.args.device)
            yield batch.sources, self._losses(model, batch, "eval")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six per parameter and distinct token, the reference's forward left out."""
        tokens = sum(batch.num_tokens for batch in inputs["micro_batches"])
        return 6 * tokens * count_parameters(self._policy)
