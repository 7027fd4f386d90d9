"""Watches a training run from outside: which pairs each step held, when it ended, what it left in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_kit.bench.memory import MemoryMeter, bytes_of
from dpo_kit.bench.profile import StepProfile
from dpo_kit.examples import Example, example_of
from dpo_kit.trainer import PreferenceTrainer


@dataclass
class _Rows:
    """A step's rows, in a wrapper that nobody looks into on the way from the collator to the step."""

    rows: list[dict[str, Any]]


class StepWatch(TrainerCallback):
    """Takes the measures of a trainer's first steps: `warm_up` that do not count, `steps` that do, and one
    more under the profiler. A step lasts from the end of the one before it to its own end, so planning
    and data belong to it.

    Attributes:
        pairs: of each measured step.
        seconds: of each measured step.
        peak_bytes: most memory held during the measured steps.
        gradient_bytes: of the gradients, before the optimiser takes them.
        profile: of the last step.
    """

    def __init__(self, trainer: PreferenceTrainer, memory: MemoryMeter, warm_up: int, steps: int) -> None:
        self._memory, self._warm_up, self._last = memory, warm_up, warm_up + steps
        self._trainer = trainer
        self._pairs: list[list[Example]] = []
        self._ended: list[float] = []
        self.peak_bytes = self.gradient_bytes = 0
        self.profile = StepProfile(trainer)
        self._watch_pairs(trainer)
        trainer.add_callback(self)

    def _watch_pairs(self, trainer: PreferenceTrainer) -> None:
        plan, step = trainer.data_collator, trainer.training_step
        paired = trainer.objective.needs_rejected

        def plan_and_keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {**plan(rows), "rows": _Rows(rows)}

        def keep_and_step(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            rows = inputs.pop("rows").rows
            self._pairs.append([example_of(row, with_rejected=paired) for row in rows])
            return step(model, inputs, *rest, **named)

        # The data loader hands rows to the collator and its result to the step: nothing else sees both.
        trainer.data_collator = plan_and_keep
        trainer.training_step = keep_and_step  # type: ignore[method-assign]

    @property
    def pairs(self) -> list[list[Example]]:
        return self._pairs[self._warm_up : self._last]

    @property
    def seconds(self) -> list[float]:
        ended = self._ended[self._warm_up - 1 : self._last]
        return [after - before for before, after in pairwise(ended)]

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Count the gradients."""
        policy: Any = self._trainer.model
        gradients = [p.grad for p in policy.parameters()]
        self.gradient_bytes = bytes_of(g for g in gradients if g is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time, and begin or end what goes from step to step."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        if state.global_step == self._last + 1:
            self.profile.stop()
        self._ended.append(time.perf_counter())
        if state.global_step == self._warm_up:
            self._memory.reset_peak()
        if state.global_step == self._last:
            self.peak_bytes = self._memory.peak()
            self.profile.start()
