"""What happened in a run, in words derived from its curves and summary, with warnings where due.

Held-out curves are preferred. A training curve is noisy, so its start and end are means over a fifth of
its lines, and a warning needs them to lie two standard errors apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_kit.report.run_folder import Run
from dpo_kit.report.summary import number

ACCURACY_SLACK = 0.02
MIN_TRAINING_LINES = 10


@dataclass(frozen=True)
class Remark:
    """A sentence or two about the run; a warning is something to look into."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Change:
    """How a metric went from the start of the run to its end; `sign` is 0 where noise could explain it."""

    source: str
    start: float
    end: float
    start_place: str
    end_place: str
    sign: int

    @property
    def verb(self) -> str:
        if number(self.start) == number(self.end):
            return "stayed the same,"
        return "rose" if self.end > self.start else "fell"

    @property
    def span(self) -> str:
        return f"{number(self.start)} → {number(self.end)}"


def remarks(run: Run) -> list[Remark]:
    """Facts first, then warnings; empty only where the run logged nothing that is known here."""
    return [*_facts(run), *_warnings(run)]


def change(run: Run, key: str) -> Change | None:
    """The change of `key` on held-out pairs, else on training pairs; None where there are too few lines."""
    steps, values = _finite(run, f"eval_{key}")
    if len(steps) >= 2:
        start, end = float(values[0]), float(values[-1])
        places = f"at step {steps[0]}", f"at step {steps[-1]}"
        return Change("held-out", start, end, *places, sign=int(np.sign(end - start)))
    steps, values = _finite(run, key)
    if len(steps) < MIN_TRAINING_LINES:
        return None
    fifth = len(values) // 5
    first, last = values[:fifth], values[-fifth:]
    difference = float(last.mean() - first.mean())
    # The standard error of a mean of `fifth` lines, twice, added in squares.
    noise = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / fifth))
    return Change(
        "training",
        float(first.mean()),
        float(last.mean()),
        "over the first fifth",
        "over the last fifth",
        sign=int(np.sign(difference)) if abs(difference) > 2 * noise else 0,
    )


def _finite(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = run.curve(key)
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _facts(run: Run) -> list[Remark]:
    facts = []
    accuracy = change(run, "rewards/accuracies")
    if accuracy is not None:
        facts.append(_change_sentence("accuracy", accuracy, _ceiling_clause(run)))
    margin = change(run, "rewards/margins")
    if margin is not None:
        facts.append(_change_sentence("margin", margin))
    loss = change(run, "loss")
    if loss is not None and not facts:
        facts.append(_change_sentence("loss", loss))
    before, after = run.figure("eval/reward_before"), run.figure("eval/reward_after")
    if before is not None and after is not None:
        verb = "rose" if after > before else "fell" if after < before else "stayed the same,"
        divergence = run.figure("eval/kl")
        cost = "" if divergence is None else f", at a KL of {number(divergence)} nats from the reference"
        facts.append(f"The mean reward of samples {verb} from {number(before)} to {number(after)}{cost}.")
    return [Remark(fact) for fact in facts]


def _change_sentence(what: str, change: Change, clause: str = "") -> str:
    return (
        f"{change.source.capitalize()} {what} {change.verb} from {number(change.start)} "
        f"{change.start_place} to {number(change.end)} {change.end_place}{clause}."
    )


def _ceiling_clause(run: Run) -> str:
    ceiling = run.figure("eval/accuracy_ceiling")
    return "" if ceiling is None else f"; label noise allows {number(ceiling)} at most"


def _warnings(run: Run) -> list[Remark]:
    found = [_broken_loss(run), _both_fall(run), _past_its_best(run)]
    return [Remark(text, warning=True) for text in found if text is not None]


def _broken_loss(run: Run) -> str | None:
    steps, values = run.curve("loss")
    broken = steps[~np.isfinite(values)]
    return f"The loss is not finite at step {broken[0]}." if len(broken) else None


def _both_fall(run: Run) -> str | None:
    chosen, margin = change(run, "logps/chosen"), change(run, "rewards/margins")
    if chosen is None or margin is None or not (chosen.sign < 0 < margin.sign):
        return None
    return (
        f"{chosen.source.capitalize()} chosen log-probs fell ({chosen.span} nats) while the "
        f"{margin.source} margin rose ({margin.span}): the policy "
        "tells the pairs apart by making both replies less likely. Read the samples; if they got worse, "
        "try fewer steps, a lower learning rate, a larger beta, or an SFT term on the chosen replies."
    )


def _past_its_best(run: Run) -> str | None:
    steps, values = _finite(run, "eval_rewards/accuracies")
    if not len(steps) or values.max() - values[-1] <= ACCURACY_SLACK:
        return None
    best = int(values.argmax())
    return (
        f"Held-out accuracy ended at {number(values[-1])}, {number(values[best] - values[-1])} below its "
        f"best of {number(values[best])} at step {steps[best]}: the run went on too long, or the held-out "
        "set is too small to tell. A checkpoint near that step may be the better model."
    )
