"""The loop that trains: a step over its micro-batches, and what is done where that does not go well.

A dataloader batch holds one rank's pairs of one step, planned into micro-batches by the collator (so
in the dataloader's workers, ahead of time). `training_step` runs them with one gradient
synchronisation. What is trained is the objective's business (losses/), what is computed is the
plan's (packing.py); how all of it comes about is the trainer's.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.checkpoints import Counts
from dpo_kit.errors import RankWarning, TrainingError
from dpo_kit.nonfinite import NonFinite
from dpo_kit.packing import MicroBatch
from dpo_kit.scoring_loop import ScoringLoop
from dpo_kit.step import Totals, carried_on, weights_of
from dpo_kit.stopping import StopOnSignal


class TrainingLoop(ScoringLoop):
    """Trains a policy on planned steps."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._stop = StopOnSignal()
        self._is_finite = True
        super().__init__(*args, **keywords)
        self.add_callback(self._stop)
        folder = Path(str(self.args.output_dir))
        self._nonfinite = NonFinite(folder, self.args.on_nonfinite == "skip", self.args.max_nonfinite)

    def _load_more(self, folder: Path) -> None:
        super()._load_more(folder)
        self._nonfinite.in_a_row = self._counts.left_out

    def _counts_now(self) -> Counts:
        return replace(super()._counts_now(), left_out=self._nonfinite.in_a_row)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """As `CheckpointingTrainer.train`; a signal ends it after the step, with a checkpoint.

        Raises:
            StoppedError: SIGINT or SIGTERM came.
        """
        with self._stop.listening():
            return super().train(resume_from_checkpoint, **keywords)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over a step's micro-batches.

        Where a CUDA device has no memory left for that, it is done again in smaller ones: the same gradient.

        Returns:
            The mean loss of this rank's pairs, times ranks over all ranks' weight, detached.

        Raises:
            TrainingError: memory ran out where the step cannot be cut smaller.
        """
        model.train()
        if not self._stepped:
            self._logged_at = time.perf_counter()
        ranks, sharded = self.args.world_size, self._is_sharded
        inputs = self._fitting(inputs)
        totals = Totals.of(inputs, self.accelerator, ranks, sharded=sharded, signal=self._stop.told)
        self._stop.agreed, running = totals.signal, self._counts.running
        while (losses := self._attempt(model, inputs, totals)) is None:
            inputs = self._fitting(inputs)
            if ranks == 1:
                totals = Totals.of(inputs, self.accelerator, 1, sharded=False)
        self._stepped = True
        weights = weights_of(inputs["micro_batches"]).to(losses.device)
        self._is_finite = self._all_finite(losses)
        if self._is_finite:
            for batch in inputs["micro_batches"]:
                self._counts.add(batch)
            self._take_in("train")
        else:
            self._counts.running = running
        loss = (losses * weights).sum() / totals.divisor
        # Where one rank's is not finite, none has a part in the mean that is logged.
        return loss if self._is_finite else torch.full_like(loss, torch.nan)

    def _fitting(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A planned step, cut again where it was planned before memory ran out."""
        if inputs.get("token_budget", 0) > self.args.token_budget:
            inputs |= self.planner.cut(inputs["examples"], inputs.get("strangers"))
        return inputs

    def _attempt(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> Tensor | None:
        """[P] losses of a step, its gradients computed; None where memory ran out: a smaller cut may do."""
        self._scored = []
        running, self._synchronising = self._counts.running, False
        try:
            return self._run(model, inputs, totals)
        except torch.OutOfMemoryError as error:
            problem = str(error).splitlines()[0]
        # Outside of the clause, whose error holds the frames and with them the tensors.
        self._halve_budget(problem, inputs)
        self._counts.running = running
        model.zero_grad()
        torch.cuda.empty_cache()
        return None

    def _halve_budget(self, problem: str, inputs: dict[str, Any]) -> None:
        """Raises TrainingError where that would not help, or other ranks are in the middle of the step."""
        largest = max((batch.input_ids.numel() for batch in inputs["micro_batches"]), default=0)
        budget = min(self.args.token_budget, largest) // 2
        examples = max((batch.num_pairs for batch in inputs["micro_batches"]), default=0)
        together = self.args.world_size > 1 and (
            self._is_sharded or self._synchronising or self.objective.couples_examples
        )
        if together or examples < 2:
            why = "the ranks are in the midst of a step together" if together else "one example fills it"
            raise TrainingError(
                f"memory ran out at step {self.state.global_step + 1}, in a micro-batch of {largest} tokens, "
                f"which is not cut smaller: {why} ({problem}). The newest checkpoint is kept. Set "
                "train.tokens_per_micro_batch to less than that, gradient_checkpointing, or data.max_length."
            )
        self.args.reduced_tokens = budget
        message = f"memory ran out ({problem}): micro-batches have {budget} tokens from here on"
        warnings.warn(message, RankWarning, stacklevel=2)

    def _run(self, model: nn.Module, inputs: dict[str, Any], totals: Totals) -> Tensor:
        """[P] losses of this rank's pairs; gradients are computed, and meet across ranks in the last pass."""
        batches: list[MicroBatch] = inputs["micro_batches"]
        fillers = totals.fillers(len(batches), totals.micro_batches)
        step, gradients = None, []
        if self.objective.couples_examples:
            with self._attention(model):
                step = self._coupled(model, inputs, "train", totals)
            self._counts.running = step.running
            gradients = step.gradients(totals.divisor) if step.is_cut else []
        losses: list[Tensor] = []
        for place in range(-fillers, len(batches)):
            self._synchronising = place == len(batches) - 1
            batch = (batches[place] if place >= 0 else inputs["filler"]).to(self.args.device)
            with self._attention(model), self._sync(model, self._synchronising):
                if place < 0:
                    known = None if step is None else step.nothing
                    loss = self._scorer.nothing(model, batch) if known is None else known
                elif step is None:
                    own = self._losses(model, batch, "train")
                    loss = (own * batch.weights).sum() / totals.divisor
                    losses.append(own.detach())
                elif gradients:
                    loss = carried_on(self._scorer(model, batch, again=True), gradients[place])
                else:
                    loss = step.loss(totals.divisor)
                self.accelerator.backward(loss)
        if step is not None:
            return step.losses.detach()
        return torch.cat(losses) if losses else torch.zeros(0, device=self.args.device)

    def _all_finite(self, losses: Tensor) -> bool:
        """Of all ranks; waits for the device once."""
        bad = (~torch.isfinite(losses)).any().float()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        return not bool(bad)

    def _sync(self, model: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients meet across ranks once a step; with `sync_each_batch`, in shards after each pass."""
        settings = self.accelerator.gradient_state.plugin_kwargs
        each = self._is_sharded and settings.get("sync_each_batch", False)
        return contextlib.nullcontext() if now or each else self.accelerator.no_sync(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm; None where the step is left out, since its loss or gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (fp16) skips steps of its own accord.
        checked = norm is not None and self.accelerator.scaler is None
        if self._is_finite and (not checked or bool(torch.isfinite(torch.as_tensor(norm)))):
            self._nonfinite.finite()
            return norm
        what = "gradient" if self._is_finite else "loss"
        self._nonfinite.found(what, self.state.global_step + 1, self._scored)
        # An optimiser passes over parameters that have none.
        model.zero_grad(set_to_none=True)
        return None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers has it; save_strategy "best" saves where it is true, and so where a run stops."""
        return super()._determine_best_metric(metrics, trial) or bool(self._stop.agreed)
