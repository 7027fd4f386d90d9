"""What happened in a run, in words derived from its curves and summary, with warnings where due.

Held-out curves are preferred. A training curve is noisy, so its start and end are means over a fifth of
its lines, and a warning needs them to lie two standard errors apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from dpo_kit.report.run_folder import Run
from dpo_kit.report.summary import number, percent
from dpo_kit.report.words import words_of
from dpo_kit.thresholds import DISPLACED_PER_TOKEN, SATURATED

ACCURACY_SLACK = 0.02
# Accuracy of pairs whose chosen reply is longer, and of those where it is shorter.
STRATA_APART = 0.15
MOST = 0.5
MIN_TRAINING_LINES = 10
MIN_PROMPTS = 10
LOSSES = {
    "loss": "loss",
    "loss/policy_avg": "policy loss",
    "loss/value_avg": "value loss",
    "objective/scores": "score of rollouts",
}


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
    """The change of `key` on held-out examples, else in training; None where there are too few lines."""
    steps, values = _finite(run, f"eval_{key}")
    if len(steps) < 2:
        return training_change(run, key)
    start, end = float(values[0]), float(values[-1])
    places = f"at step {steps[0]}", f"at step {steps[-1]}"
    return Change("held-out", start, end, *places, sign=int(np.sign(end - start)))


def training_change(run: Run, key: str) -> Change | None:
    """The change of `key` in training; None where there are too few lines."""
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
    score = training_change(run, "objective/scores")
    if score is not None:
        clause = "" if score.sign else ", which noise could explain"
        facts.append(
            _change_sentence("score of rollouts, by the reward that PPO learns from,", score, clause)
        )
    before, after = run.figure("eval/reward_before"), run.figure("eval/reward_after")
    if before is not None and after is not None:
        verb = "rose" if after > before else "fell" if after < before else "stayed the same,"
        divergence = run.figure("eval/kl")
        cost = "" if divergence is None else f", at a KL of {number(divergence)} nats from the reference"
        facts.append(f"The mean reward of samples {verb} from {number(before)} to {number(after)}{cost}.")
    facts += _highest_on_the_way(run)
    return [Remark(fact) for fact in facts]


def _highest_on_the_way(run: Run) -> list[str]:
    """Where samples were better than at the end; no claim that it was more than chance."""
    steps, rewards = _finite(run, "eval_reward")
    if len(steps) < 3 or int(rewards.argmax()) == len(steps) - 1:
        return []
    best = int(rewards.argmax())
    kls = dict(zip(*(each.tolist() for each in _finite(run, "eval_kl")), strict=True))
    at = f", at a KL of {number(kls[steps[best]])} nats" if steps[best] in kls else ""
    return [
        f"The mean reward of samples was highest on the way, at step {steps[best]}: "
        f"{number(float(rewards[best]))}{at}; at step {steps[-1]}, the last one measured, it was "
        f"{number(float(rewards[-1]))}."
    ]


def _change_sentence(what: str, change: Change, clause: str = "") -> str:
    return (
        f"{change.source.capitalize()} {what} {change.verb} from {number(change.start)} "
        f"{change.start_place} to {number(change.end)} {change.end_place}{clause}."
    )


def _ceiling_clause(run: Run) -> str:
    ceiling = run.figure("eval/accuracy_ceiling")
    return "" if ceiling is None else f"; label noise allows {number(ceiling)} at most"


def _warnings(run: Run) -> list[Remark]:
    found = [
        _broken_loss(run),
        _worse_samples(run),
        _both_fall(run),
        _learned_length(run),
        _saturated(run),
        _past_its_best(run),
    ]
    return [Remark(text, warning=True) for text in found if text is not None]


def _broken_loss(run: Run) -> str | None:
    for key, name in LOSSES.items():
        steps, values = run.curve(key)
        broken = steps[~np.isfinite(values)]
        if len(broken):
            return f"The {name} is not finite at step {broken[0]}."
    return None


def _worse_samples(run: Run) -> str | None:
    """The true reward of the same prompts before and after, where it fell by more than chance explains.

    Replies to one prompt fall together, so it is the mean fall of each prompt that is drawn independently.
    """
    by_prompt: dict[str, list[float]] = {}
    for sample in run.samples:
        before, after = sample.get("reward_before"), sample.get("reward_after")
        if isinstance(before, int | float) and isinstance(after, int | float):
            by_prompt.setdefault(json.dumps(sample.get("prompt")), []).append(after - before)
    rises = np.array([sum(found) / len(found) for found in by_prompt.values()])
    if len(rises) < MIN_PROMPTS or not np.isfinite(rises).all():
        return None
    noise = 2 * float(rises.std(ddof=1)) / len(rises) ** 0.5
    if rises.mean() >= -noise:
        return None
    score = training_change(run, "objective/scores")
    learned = (
        ""
        if score is None or score.sign <= 0
        else (
            f", while the score that PPO learns from rose ({score.span}): the policy found what that score "
            "rewards and the true reward does not"
        )
    )
    return (
        f"The samples got worse: their reward fell by {number(-float(rises.mean()))} ± {number(noise)} "
        f"(two standard errors over {len(rises)} prompts){learned}. Read them; try a stronger pull to the "
        "reference, fewer steps, or a lower learning rate."
    )


def _both_fall(run: Run) -> str | None:
    """Likelihood displacement, by the trainer's limit where the run has what that looks at."""
    margin = change(run, "rewards/margins")
    if margin is None or margin.sign <= 0:
        return None
    chosen = words_of([run]).chosen
    per_token = change(run, "logratios/chosen_per_token")
    if per_token is not None:
        if per_token.end >= min(DISPLACED_PER_TOKEN, per_token.start):
            return None
        fall = (
            f"The log-probs of {chosen} replies lie {number(-per_token.end)} nats a token below the "
            f"reference's ({per_token.source}, {per_token.end_place})"
        )
    else:
        fallen = change(run, "logps/chosen")
        if fallen is None or fallen.sign >= 0:
            return None
        fall = f"{fallen.source.capitalize()} {chosen} log-probs fell ({fallen.span} nats)"
    return (
        f"{fall} while the {margin.source} margin rose ({margin.span}): the policy "
        "tells the replies apart by making both less likely. Read the samples; if they got worse, "
        "try fewer steps, a lower learning rate, a larger beta, or an SFT term on the better replies."
    )


def _learned_length(run: Run) -> str | None:
    longer, shorter = (
        change(run, f"rewards/accuracies_chosen_{stratum}") for stratum in ("longer", "shorter")
    )
    if longer is None or shorter is None or longer.source != shorter.source:
        return None
    if abs(longer.end - shorter.end) <= STRATA_APART:
        return None
    favoured = "long" if longer.end > shorter.end else "short"
    return (
        f"{longer.source.capitalize()} accuracy {longer.end_place} is {number(longer.end)} on pairs whose "
        f"chosen reply is the longer one and {number(shorter.end)} where it is the shorter one: it may be "
        f"that {favoured} replies are favoured for their length. Look at the lengths in the data and in the "
        "samples; r_dpo, dpo_norm and simpo weigh length otherwise. Where few pairs are in one of the two, "
        "chance alone sets them apart."
    )


def _saturated(run: Run) -> str | None:
    """Of the training pairs: what a step has still to learn from."""
    share = training_change(run, "saturated")
    if share is None or share.end <= MOST:
        return None
    return (
        f"{percent(share.end)} of the training pairs are saturated {share.end_place}: the policy "
        f"tells them apart so well that their weight in DPO's gradient, sigmoid(−margin), is below "
        f"{SATURATED:g}, and a step learns from the others alone (a loss of another form may weigh them "
        "otherwise). More steps on the same pairs bring little but drift; try fewer epochs, a lower learning "
        "rate, or pairs that are harder to tell apart."
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
