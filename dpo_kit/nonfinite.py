"""Steps whose loss or gradient is not finite: what is written of them, and whether the run goes on."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from dpo_kit import ranks
from dpo_kit.errors import DivergedError, DpoKitWarning
from dpo_kit.losses import LogProbs

NONFINITE_FILE = "nonfinite.jsonl"


@dataclass
class Scored:
    """Some examples of a step, as they were scored.

    Attributes:
        logps: of their sequences.
        losses: [P] of them.
        weights: [P] of them.
        sources: P places in the data.
    """

    logps: LogProbs
    losses: Tensor
    weights: Tensor
    sources: Sequence[str]

    def lines(self) -> list[dict[str, Any]]:
        """For each example: source, loss, and what policy and reference say of its replies, best first."""
        found: list[dict[str, Any]] = [
            {"source": source, "loss": _number(loss)}
            for source, loss in zip(self.sources, self.losses.tolist(), strict=True)
        ]
        fields = {"logps": self.logps.policy, "reference_logps": self.logps.reference}
        fields["rewards"] = self.logps.rewards
        for name, values in fields.items():
            for example, value in zip(self.logps.example.tolist(), _list(values), strict=False):
                found[example].setdefault(name, []).append(_number(value))
        return found


@dataclass
class NonFinite:
    """Watches over the steps of a run.

    Args:
        folder: of the run; nonfinite.jsonl is appended to there.
        skip: whether such a step is left out and the run goes on.
        most: steps in a row that are left out at most.

    Attributes:
        in_a_row: steps that were left out until now.
    """

    folder: Path
    skip: bool
    most: int
    in_a_row: int = field(default=0, init=False)

    def finite(self) -> None:
        """A step was well."""
        self.in_a_row = 0

    def found(self, what: str, step: int, scored: Sequence[Scored]) -> None:
        """Write what is known of a step, on all ranks together; returns where it is to be left out.

        Args:
            what: "loss" or "gradient".
            step: its number, from 1.
            scored: this rank's examples.

        Raises:
            DivergedError: the run stops.
        """
        lines = [line for part in scored for line in part.lines()]
        if ranks.ranks() > 1:
            lines = gather_object(lines)
        path = self.folder / NONFINITE_FILE
        if ranks.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "what": what, "pairs": lines}) + "\n")
        said = f"the {what} is not finite at step {step}{_named(lines)}"
        mend = "A smaller learning rate, more warm-up or fp32 may mend it."
        about = f"The pairs and their log-probs are in {path}. {mend}"
        if not self.skip:
            raise DivergedError(
                f"{said}. The weights are those of the step before and the newest checkpoint is kept. {about}"
            )
        if self.in_a_row >= self.most:
            raise DivergedError(
                f"{said}, and {self.in_a_row} steps before it were left out already (train.max_nonfinite). "
                f"The newest checkpoint is kept. {about}"
            )
        self.in_a_row += 1
        warnings.warn(f"{said}: the step is left out. {about}", DpoKitWarning, stacklevel=2)


def _named(lines: Sequence[dict[str, Any]]) -> str:
    """Up to five of the pairs whose loss it is, or nothing."""
    bad = [line["source"] or "a pair" for line in lines if isinstance(line["loss"], str)]
    return f", on {len(bad)} of {len(lines)} pairs: {', '.join(bad[:5])}" if bad else ""


def _list(values: Tensor | None) -> list[float]:
    return [] if values is None else values.detach().tolist()


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
