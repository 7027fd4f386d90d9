"""What listens to TRL's PPO: it steers kl_coef, stops a run whose numbers are lost, and says how it goes.

Knows no trl: TRL's loop logs once in each update, and reads its `args` anew in the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from dpo_kit.errors import DivergedError


def adapted(coefficient: float, kl: float, target: float, rate: float) -> float:
    """kl_coef after an update: beta * (1 + K e), e = clip(KL / target - 1, -0.2, 0.2).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; K is `rate`, 0.1 there.
    """
    return coefficient * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def adaptation_rate(updates: int) -> float:
    """K of `adapted` for a run of so many updates.

    The paper's 0.1 is for thousands of updates. Here an error at its bound throughout half of the run changes
    kl_coef a hundredfold, however long the run is, and K is 1 at most.
    """
    return min(1.0, 5 * (100 ** (2 / max(updates, 2)) - 1))


class KlSteering(TrainerCallback):
    """Logs the kl_coef of each update (`objective/kl_coef`), and adapts it where there is a target.

    TRL reads `args.kl_coef` anew in every update. Its `objective/kl` is the mean over replies of the sampled
    log-ratio to the reference, at PPO's temperature.
    """

    def __init__(self, target: float | None) -> None:
        self.target = target

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """After an update."""
        if not logs or "objective/kl" not in logs:
            return
        logs["objective/kl_coef"] = args.kl_coef
        if self.target is not None:
            rate = adaptation_rate(state.max_steps)
            args.kl_coef = adapted(args.kl_coef, logs["objective/kl"], self.target, rate)


class Guard(TrainerCallback):
    """Stops a run whose figures or weights are not finite any more.

    Args:
        policy: gives what is trained.
        advice: what may help.
    """

    def __init__(self, policy: Callable[[], nn.Module], advice: str) -> None:
        self._policy, self._advice = policy, advice

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at what TRL logs."""
        for name, value in (logs or {}).items():
            if name.startswith(("objective/", "loss/")) and not math.isfinite(value):
                raise DivergedError(f"step {state.global_step}: {name} is {value}. {self._advice}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the weights."""
        for name, parameter in self._policy().named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergedError(
                    f"step {state.global_step}: {name} has numbers that are not finite. {self._advice}"
                )


class Lines(TrainerCallback):
    """Says how it goes, in some twenty lines a run."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A line now and then."""
        step, steps = state.global_step, state.max_steps
        if logs and "objective/kl" in logs and (step % max(1, steps // 20) == 0 or step == steps):
            self._say(
                f"update {step}/{steps}: score {logs['objective/scores']:+.3f}, "
                f"KL {logs['objective/kl']:.2f}, kl_coef {logs['objective/kl_coef']:.3g}"
            )
