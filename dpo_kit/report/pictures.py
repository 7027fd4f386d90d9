"""Which pictures there are: their panels, and the metrics in each. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo_kit.report.words import Words

# Okabe and Ito's, safe for colour-blind readers.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class Series:
    """One metric in a panel. `dash` tells series of one run apart where colour tells runs apart.

    `exact` is for what has no noise: it is drawn as logged, not as a running mean.
    """

    key: str
    label: str
    colour: str = BLUE
    dash: Literal["-", "--", ":"] = "-"
    exact: bool = False

    @property
    def held_out(self) -> bool:
        return self.key.startswith("eval_")

    @property
    def smooth(self) -> bool:
        return not (self.held_out or self.exact)


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the label of the y axis with its unit, and the series.

    Attributes:
        ceiling: show the accuracy that label noise allows.
        zero: show the line at 0.
        share: values are in [0, 1], so the axis shows nothing beyond.
        height: in comparison with the picture's other panels.
    """

    ylabel: str
    series: tuple[Series, ...]
    ceiling: bool = False
    zero: bool = False
    share: bool = False
    height: float = 1.0


@dataclass(frozen=True)
class Picture:
    """One PNG file; its panels stand one above the other and share the x axis.

    `x` is the metric on the x axis, or "step"; a picture against a metric has the lines that logged both.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    x: str = "step"
    xlabel: str = "optimiser step"

    @property
    def held_out(self) -> bool:
        """Whether nothing of training is in it."""
        return all(series.held_out for panel in self.panels for series in panel.series)


def pictures(words: Words) -> tuple[Picture, ...]:
    """All that can be drawn of a run; what it did not log is left out in drawing."""
    sides = words.chosen, words.rejected
    return (
        _samples("samples", "Reward and KL of samples while training"),
        _path(),
        Picture("loss", "Loss", (_train_and_eval("loss", "loss"),)),
        Picture(
            "accuracy",
            "Accuracy",
            (
                _train_and_eval("rewards/accuracies", words.accuracy, ceiling=True),
                _train_and_eval("rewards/top1", "share, best on top"),
            ),
        ),
        Picture(
            "margins", "Margin", (_train_and_eval("rewards/margins", f"reward, {sides[0]} − {sides[1]}"),)
        ),
        Picture("lengths", "By length of the chosen reply", _by_length()),
        Picture("rewards", words.rewards.capitalize(), (_two_sides("rewards", "reward", sides),)),
        Picture("logps", "Log-probs", (_two_sides("logps", "log-prob of a reply (nats)", sides),)),
        Picture(
            "logratios",
            "Log-probs against the reference",
            (
                replace(_two_sides("logratios", "log-ratio (nats)", sides), zero=True, height=2.2),
                replace(_train_and_eval("displaced", "share displaced"), share=True),
            ),
        ),
        Picture("teaching", "How much still teaches", (_teaching(),)),
        *_rollouts(),
        Picture("tokens", "Distribution of the next token", _token_metrics()),
        Picture(
            "optimiser",
            "Learning rate and gradient norm",
            (
                Panel("learning rate", (Series("learning_rate", "learning rate", BLUE, exact=True),)),
                Panel("gradient norm", (Series("grad_norm", "gradient norm", VERMILION),)),
            ),
        ),
        Picture(
            "speed",
            "Speed",
            (Panel(f"{words.examples} per second", (Series("pairs_per_second", "speed", GREEN),)),),
        ),
    )


def comparison_pictures(words: Words) -> list[Picture]:
    """`pictures` with training and held-out series in pictures of their own, lest the overlay be a tangle."""
    found = [
        _samples(
            "samples_seconds", "Reward and KL of samples against time", "seconds", "seconds of training"
        ),
        _samples("samples_tokens", "Reward and KL of samples against work", "tokens", "tokens computed"),
    ]
    for picture in pictures(words):
        if picture.held_out:
            found.append(picture)
            continue
        for held_out, suffix, title in ((False, "", "training"), (True, "_eval", "held-out")):
            panels = tuple(
                replace(
                    panel,
                    series=tuple(s for s in panel.series if s.held_out == held_out),
                    ceiling=panel.ceiling and held_out,
                )
                for panel in picture.panels
            )
            both = any(series.held_out for panel in picture.panels for series in panel.series)
            if any(panel.series for panel in panels):
                heading = f"{picture.title} ({title} {words.examples})" if both else picture.title
                found.append(Picture(picture.name + suffix, heading, panels))
    return found


def _samples(name: str, title: str, x: str = "step", xlabel: str = "optimiser step") -> Picture:
    """The true reward of the policy's samples on held-out prompts, and their KL to the reference."""
    panels = (
        Panel("mean reward", (Series("eval_reward", "reward", VERMILION),)),
        Panel("KL (nats)", (Series("eval_kl", "KL", VERMILION),), zero=True),
    )
    return Picture(name, title, panels, x, xlabel)


def _path() -> Picture:
    """What a run pays for its reward: each evaluation is a point."""
    panel = Panel("mean reward", (Series("eval_reward", "reward", VERMILION),))
    title = "Reward of samples against KL, on the way"
    return Picture("reward_kl", title, (panel,), "eval_kl", "KL to the reference (nats)")


def _rollouts() -> tuple[Picture, ...]:
    """What PPO logs, by TRL's names: of the replies that it samples to learn from, and of its updates."""
    penalised = Series("objective/rlhf_reward", "score less KL penalty", VERMILION)
    return (
        Picture(
            "rollouts",
            "Score of rollouts, and less the KL penalty",
            (
                Panel("score", (Series("objective/scores", "score"),)),
                Panel("less KL penalty", (penalised,)),
            ),
        ),
        Picture(
            "rollouts_kl",
            "KL of rollouts",
            (
                Panel("KL estimate (nats)", (Series("objective/kl", "KL"),), zero=True, height=1.6),
                Panel("weight of KL", (Series("kl_coef", "weight of KL", GREEN, exact=True),)),
            ),
        ),
        Picture(
            "ppo_losses",
            "PPO's losses",
            (
                Panel("policy loss", (Series("loss/policy_avg", "policy loss"),)),
                Panel("value loss", (Series("loss/value_avg", "value loss", VERMILION),)),
            ),
        ),
        Picture(
            "ppo_updates",
            "How far an update goes",
            (
                Panel("KL (nats)", (Series("policy/approxkl_avg", "KL"),)),
                Panel("clipped", (Series("policy/clipfrac_avg", "clipped", VERMILION),), share=True),
                Panel("ratio", (Series("val/ratio", "ratio", GREEN),)),
            ),
        ),
    )


def _train_and_eval(key: str, ylabel: str, ceiling: bool = False) -> Panel:
    held_out = Series(f"eval_{key}", "held-out", VERMILION)
    return Panel(ylabel, (Series(key, "training", BLUE), held_out), ceiling)


def _two_metrics(
    ylabel: str, keys: Sequence[str], labels: Sequence[str], *more: Series, share: bool = False
) -> Panel:
    """Two metrics, each on training and on held-out examples."""
    looks = ((BLUE, "-"), (VERMILION, "--"))
    series = [
        Series(f"{prefix}{key}", f"{label}{suffix}", colour, dash)  # type: ignore[arg-type]
        for prefix, suffix in (("", ""), ("eval_", ", held-out"))
        for key, label, (colour, dash) in zip(keys, labels, looks, strict=True)
    ]
    return Panel(ylabel, (*series, *more), share=share)


def _two_sides(kind: str, ylabel: str, sides: Sequence[str]) -> Panel:
    more = (Series("rewards/mean", "mean of all", GREEN, ":"),) if kind == "rewards" else ()
    return _two_metrics(ylabel, (f"{kind}/chosen", f"{kind}/rejected"), sides, *more)


def _by_length() -> tuple[Panel, ...]:
    """A rule that learned length alone is right in one stratum and wrong in the other."""
    strata, labels = ("chosen_longer", "chosen_shorter"), ("chosen is longer", "chosen is shorter")
    accuracy = [f"rewards/accuracies_{stratum}" for stratum in strata]
    margins = [f"rewards/margins_{stratum}" for stratum in strata]
    return _two_metrics("accuracy", accuracy, labels), _two_metrics("margin", margins, labels)


def _teaching() -> Panel:
    keys, labels = ("gradient_weight", "saturated"), ("gradient weight", "saturated share")
    return _two_metrics("mean over the batch", keys, labels, share=True)


def _token_metrics() -> tuple[Panel, ...]:
    return (
        _train_and_eval("entropy", "entropy (nats)"),
        _train_and_eval("top1", "share likeliest"),
        _train_and_eval("kl/reference", "KL to reference"),
    )
