"""Can the labels be won without reading? Length bias, and a small logistic model on surface features.

What a model reaches that sees only the replies' surface (`surface.FEATURES`), a policy may learn in the
place of what people meant. Reads no meaning, and says nothing of the order in which replies were shown.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_kit.audit.faults import PREFERRED, clipped, reply_sides
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.audit.surface import FEATURES, Floats, surface

Integers = npt.NDArray[np.int64]

# People agree with one another on 60% to 75% of such labels, and reward models that read reach 63% to 72% on
# HH: a surface that reaches 70% is as good as reading. Beyond 85% there is nothing left to read for.
THRESHOLDS: tuple[tuple[float, Severity], ...] = ((0.85, "error"), (0.70, "warning"), (0.60, "note"))
# How far below a threshold the interval may begin: so that chance accuses no small set.
_UNSURE = 0.1
# Prompts that are few enough for a finding to be of them alone, and pairs that nothing can be said of.
_LEAST = 20
# Features in which so few pairs differ are left out of the model.
_LEAST_DIFFERS = 0.02
# Single features that give the label away where they differ at all: in so many pairs, and so surely.
_GIVEAWAY_PAIRS, _GIVEAWAY_ACCURACY = 30, 0.9
_FOLDS = 5
_BINS = 10
_L2 = 1.0
_Z = 1.959964  # of a 95% interval


class ShallowChecks:
    """Length bias and the surface model, of pairs, desirable against undesirable replies, or lists.

    A list gives a pair of its best reply with each reply of a lower score. An undesirable reply is put beside
    a desirable one of the same fold in their order, to whatever prompt: so in unpaired data "accuracy" is
    the share of such pairs told apart, and 0.5 means nothing is known, however many are desirable.

    The model is logistic without intercept on differences of features (preferred minus other, in units of
    their root mean square), with a normal prior of variance 1 on each coefficient; a feature in which fewer
    than 2% of the pairs differ has no part in it. It is fitted five times without one fold, and judged on
    that fold; all pairs of a prompt are in one fold. Of fewer than 20 prompts there is no model, only single
    features, and nothing is found of fewer than 20 pairs.

    Held-out rows of the audit are passed over. At most `sample` pairs are kept, drawn evenly (Algorithm R,
    Vitter 1985); the length rule counts all.

    Figures: `{"pairs": N, "prompts": different ones, "length_rule": {"longer_chosen": share of pairs of
    unequal length (None: no such), "interval": [low, high], "accuracy": of the better of longer and shorter,
    equal ones as half, "by_difference": [{"from", "to" (characters, tenths of the differences), "share"
    (longer one chosen), "count"}]}, "model": {"accuracy", "interval", "pairs"} or None, "features": [{"name",
    "coefficient" (of the model, None without; of features that go together they say little one by one),
    "accuracy" (of "more of it wins", equal ones as half), "differs" (share of pairs)}], what tells most by
    itself first, "not_tested": why there is no model, or None}`. Intervals are Wilson's, of 95%, of as many
    independent pairs as these are worth: see `independent`.

    Findings: `length_bias` (by the rule's accuracy on all pairs) and `shallow_labels`, as grave as
    `THRESHOLDS` say; `surface_giveaway` for single features; `shallow_not_tested`, a note.
    """

    name = "shallow"

    def __init__(self, sample: int = 20_000, seed: int = 0) -> None:
        self._sample, self._random = sample, random.Random(seed)
        self._differences = array("q")  # of length, preferred minus other, in characters
        self._prompts = array("Q")  # digests, of each pair
        self._features: list[Floats] = []
        self._drawn: list[int] = []  # of each pair of the sample its number
        self._shown: list[dict[str, str]] = []
        # Labelled replies that wait for one with the other label, by fold and label.
        self._waiting: dict[tuple[int, bool], deque[tuple[Example, str]]] = defaultdict(
            lambda: deque(maxlen=max(sample // _FOLDS, 1))
        )

    def add(self, example: Example) -> None:
        if example.held_out:
            return
        prompt = int.from_bytes(
            blake2b(example.prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        )
        for (first, good), (second, bad) in self._pairs(example, prompt % _FOLDS):
            self._differences.append(len(good) - len(bad))
            self._prompts.append(prompt)
            place = self._draw()
            if place is None:
                continue
            features = surface(first.prompt, good) - surface(second.prompt, bad)
            shown = {"place": first.place, "chosen": clipped(good), "rejected": clipped(bad)}
            number = len(self._differences) - 1
            if place == len(self._features):
                self._features.append(features)
                self._drawn.append(number)
                self._shown.append(shown)
            else:
                self._features[place], self._drawn[place], self._shown[place] = features, number, shown

    def result(self) -> Result:
        if not self._differences:
            return Result((), {"pairs": 0, "prompts": 0, "length_rule": None, "model": None, "features": []})
        prompts = np.array(self._prompts)
        count = len(np.unique(prompts))
        # The few prompts that there are, are what the pairs are judged for: pairs are then what chance draws.
        units = prompts if count >= _LEAST else np.arange(len(prompts))
        rule, found = _length_rule(np.array(self._differences), units)
        features_NF, drawn = np.array(self._features), np.array(self._drawn)
        usual = np.flatnonzero((features_NF != 0).mean(0) >= _LEAST_DIFFERS)
        model: dict[str, Any] | None = None
        weights, why = None, _not_tested(len(prompts), count)
        if why is None and len(usual):
            scores = cross_validated_scores(features_NF[:, usual], (prompts[drawn] % _FOLDS).astype(np.int64))
            weights = fit_logistic(features_NF[:, usual] / _scale(features_NF[:, usual]))
            accuracy, interval = _accuracy(scores, units[drawn])
            model = {"accuracy": accuracy, "interval": interval, "pairs": len(scores)}
        features = _features(features_NF, usual, weights)
        if model is not None and (severity := _severity(model["accuracy"], model["interval"])):
            surest = [self._shown[i] for i in np.argsort(-scores, kind="stable")[:5]]
            found.append(_won_without_reading(severity, model, features, surest))
        if len(prompts) >= _LEAST:
            found += _giveaways(features, len(features_NF))
        if why:
            found.append(_untested(why, len(prompts)))
        figures = {
            "pairs": len(prompts),
            "prompts": count,
            "length_rule": rule,
            "model": model,
            "features": features,
            "not_tested": why,
        }
        return Result(tuple(found), figures)

    def _pairs(self, example: Example, fold: int) -> Iterator[tuple[tuple[Example, str], ...]]:
        """(preferred, other) replies with what they stand in."""
        good = [side == PREFERRED for side in reply_sides(example)]
        if len(good) > 1:
            best = example.replies[good.index(True)]
            yield from (
                ((example, best), (example, reply))
                for reply, is_good in zip(example.replies, good, strict=True)
                if not is_good
            )
            return
        own, others = (example, example.replies[0]), self._waiting[fold, not good[0]]
        if not others:
            self._waiting[fold, good[0]].append(own)
        else:
            other = others.popleft()
            yield (own, other) if good[0] else (other, own)

    def _draw(self) -> int | None:
        """The place of the newest pair in the sample; None where it is not drawn."""
        seen = len(self._differences)
        if seen <= self._sample:
            return seen - 1
        place = self._random.randrange(seen)
        return place if place < self._sample else None


def _not_tested(pairs: int, prompts: int) -> str | None:
    """Why there is no model; None: there is one."""
    if pairs < _LEAST:
        return f"there are fewer than {_LEAST} pairs ({pairs})"
    if prompts < _LEAST:
        return f"there are fewer than {_LEAST} different prompts ({prompts}), of which some must be set aside"
    return None


def _untested(why: str, pairs: int) -> Finding:
    looked = "; length and single features were looked at." if pairs >= _LEAST else "."
    return Finding(
        "shallow_not_tested",
        "note",
        pairs,
        pairs,
        f"Whether the labels can be won without reading was not tested, because {why}{looked}",
        "With more data it is.",
    )


def _features(features_NF: Floats, usual: Integers, weights: Floats | None) -> list[dict[str, Any]]:
    """Of the usual features what each tells by itself, the most telling first."""
    features = [
        {
            "name": FEATURES[i],
            "coefficient": None if weights is None else float(weights[place]),
            "accuracy": _wins(features_NF[:, i]) / len(features_NF),
            "differs": float((features_NF[:, i] != 0).mean()),
        }
        for place, i in enumerate(usual)
    ]
    return sorted(features, key=lambda each: -abs(float(each["accuracy"] or 0) - 0.5))


def fit_logistic(x_NF: Floats, l2: float = _L2) -> Floats:
    """[F] w that minimises sum(log(1 + exp(-x @ w))) + l2 / 2 * |w|^2: all rows belong to the one label that
    their differences are taken for. Newton's method, steps halved until they help."""
    w, value = np.zeros(x_NF.shape[1]), len(x_NF) * math.log(2)
    for _ in range(50):
        chance = 0.5 * (1 + np.tanh(-0.5 * (x_NF @ w)))  # of the other label
        gradient = l2 * w - x_NF.T @ chance
        hessian = (x_NF * (chance * (1 - chance))[:, None]).T @ x_NF + l2 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        # Half of what the quadratic model promises; nothing to gain any more where it promises nothing.
        if gradient @ step < 1e-12 * max(value, 1):
            break
        size = 1.0
        while size > 1e-6 and (new := _objective(x_NF, w - size * step, l2)) > value:
            size /= 2
        w, value = w - size * step, new
    return w


def _objective(x_NF: Floats, w: Floats, l2: float) -> float:
    return float(np.logaddexp(0, -(x_NF @ w)).sum() + l2 / 2 * w @ w)


def cross_validated_scores(features_NF: Floats, folds: Integers) -> Floats:
    """[N] log-odds that each pair's preferred reply is that, from a model that has not seen its fold."""
    scores = np.zeros(len(folds))
    for fold in np.unique(folds):
        out = folds == fold
        scale = _scale(features_NF[~out])
        scores[out] = (features_NF[out] / scale) @ fit_logistic(features_NF[~out] / scale)
    return scores


def _scale(features_NF: Floats) -> Floats:
    """[F] root mean square of the differences, whose mean says something and is not taken off."""
    scale = np.sqrt(np.square(features_NF).mean(0))
    return np.where(scale > 0, scale, 1.0)


def _wins(scores: npt.NDArray[Any]) -> float:
    """Scores on the right side; those on no side count half."""
    return float((scores > 0).sum() + 0.5 * (scores == 0).sum())


def wilson(right: float, count: float) -> list[float]:
    """[low, high] of 95% for a share of `count` (Wilson 1927)."""
    share, spread = right / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def independent(right_N: Floats, groups_N: npt.NDArray[Any]) -> float:
    """As many independent pairs as these are worth: N over the design effect, at most N (Kish 1965).

    The effect is the variance of the share right where groups (prompts) are drawn, over that where pairs
    are; where all are right or all wrong, a group is worth one pair.
    """
    count = len(right_N)
    _, numbers = np.unique(groups_N, return_inverse=True)
    groups = int(numbers.max()) + 1
    if groups in (1, count):
        return count
    share = right_N.mean()
    variance = np.square(right_N - share).mean() / count
    if variance == 0:
        return groups
    sums = np.bincount(numbers, right_N - share)
    of_groups = np.square(sums).sum() / count**2 * groups / (groups - 1)
    return float(count / max(of_groups / variance, 1.0))


def _accuracy(scores: npt.NDArray[Any], units: npt.NDArray[Any]) -> tuple[float, list[float]]:
    """Share of scores above zero, those of zero as half, and its interval."""
    right = (scores > 0) + 0.5 * (scores == 0)
    share, worth = float(right.mean()), independent(right, units)
    return share, wilson(share * worth, worth)


def _severity(share: float, interval: list[float]) -> Severity | None:
    reached = (each for limit, each in THRESHOLDS if share >= limit and interval[0] >= limit - _UNSURE)
    return next(reached, None)


def _length_rule(differences: Integers, units: npt.NDArray[Any]) -> tuple[dict[str, Any], list[Finding]]:
    unequal = differences[differences != 0]
    count = len(unequal)
    if not count:
        return {"longer_chosen": None, "interval": None, "accuracy": 0.5, "by_difference": []}, []
    share, interval = _accuracy(unequal, units[differences != 0])
    longer_wins = _wins(differences) >= len(differences) / 2
    right, right_interval = _accuracy(differences if longer_wins else -differences, units)
    figures = {
        "longer_chosen": share,
        "interval": interval,
        "accuracy": right,
        "by_difference": _by_difference(unequal),
    }
    severity = _severity(right, right_interval)
    if severity is None or len(differences) < _LEAST:
        return figures, []
    which, often = ("longer", share) if longer_wins else ("shorter", 1 - share)
    low, high = interval if longer_wins else (1 - interval[1], 1 - interval[0])
    sentence = (
        f"The {which} reply is the preferred one in {often:.1%} of {count:,} pairs of unequal length "
        f"(95%: {low:.1%} to {high:.1%}), where chance is 50%."
    )
    advice = (
        f"A policy learns to write {which} replies from it: take a loss that is normalised or regularised by "
        "length (simpo, dpo_norm, r_dpo), or balance the lengths."
    )
    return figures, [Finding("length_bias", severity, len(differences), len(differences), sentence, advice)]


def _by_difference(unequal: Integers) -> list[dict[str, Any]]:
    """The length rule in tenths of the size of the differences; equal sizes are not taken apart."""
    size = np.abs(unequal)
    edges = np.unique(np.quantile(size, np.linspace(0, 1, _BINS + 1), method="inverted_cdf"))
    bins = np.minimum(edges[1:].searchsorted(size, side="left"), max(len(edges) - 2, 0))
    parts = []
    for place in np.unique(bins):
        inside = bins == place
        parts.append(
            {
                "from": int(size[inside].min()),
                "to": int(size[inside].max()),
                "share": float((unequal[inside] > 0).mean()),
                "count": int(inside.sum()),
            }
        )
    return parts


def _won_without_reading(
    severity: Severity, model: dict[str, Any], features: list[dict[str, Any]], surest: list[dict[str, str]]
) -> Finding:
    low, high = model["interval"]
    strongest = "; ".join(
        f"{'more' if each['accuracy'] > 0.5 else 'less'} '{each['name']}' "
        f"({max(each['accuracy'], 1 - each['accuracy']):.1%} by itself)"
        for each in features[:3]
    )
    can = "can" if severity != "note" else "can in part"
    return Finding(
        "shallow_labels",
        severity,
        model["pairs"],
        model["pairs"],
        f"The labels {can} be won without reading: a model that sees only the replies' surface guesses "
        f"{model['accuracy']:.1%} of {model['pairs']:,} pairs right (95%: {low:.1%} to {high:.1%}; "
        f"cross-validated by prompt), where chance is 50%; most of all from {strongest}.",
        "Look at what sets the two sides apart (their sources, their format), and make them alike in it; "
        "judge a trained model by something that such features cannot win.",
        examples=tuple(surest),
    )


def _giveaways(features: list[dict[str, Any]], count: int) -> list[Finding]:
    """A note on features that decide the label wherever the two replies differ in them."""
    sure = []
    for each in features:
        pairs = round(each["differs"] * count)
        # The other pairs count half in the accuracy.
        wins = each["accuracy"] * count - (count - pairs) / 2
        often = max(wins, pairs - wins)
        if pairs >= _GIVEAWAY_PAIRS and wilson(often, pairs)[0] >= _GIVEAWAY_ACCURACY:
            sure.append((pairs, often, "more" if wins > pairs / 2 else "less", each["name"]))
    if not sure:
        return []
    pairs, often, which, name = max(sure)
    also = f" (also: {', '.join(other for *_, other in sorted(sure)[:-1])})" if len(sure) > 1 else ""
    return [
        Finding(
            "surface_giveaway",
            "warning",
            pairs,
            count,
            f"Where the replies differ in '{name}', the one with {which} of it is preferred in "
            f"{often / pairs:.1%} of {pairs:,} pairs{also}.",
            "Such a mark is often left by how the data were made; take it out of both sides.",
        )
    ]
