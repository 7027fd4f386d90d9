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
# Single features that give the label away where they differ at all: in so many pairs, and so surely.
_GIVEAWAY_PAIRS, _GIVEAWAY_SHARE, _GIVEAWAY_ACCURACY = 30, 0.02, 0.9
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
    their root mean square), with a normal prior of variance 1 on each coefficient. It is fitted five times
    without one fold, and judged on that fold; all pairs of a prompt are in one fold.

    Held-out rows of the audit are passed over. At most `sample` pairs are kept, drawn evenly (Algorithm R,
    Vitter 1985); the length rule counts all.

    Figures: `{"pairs": N, "length_rule": {"longer_chosen": share of pairs of unequal length (None: no such),
    "interval": [low, high], "accuracy": of the better of longer and shorter, equal ones as half,
    "by_difference": [{"from", "to" (characters, tenths of the differences), "share" (longer one chosen),
    "count"}]}, "model": {"accuracy", "interval", "pairs", "features": [{"name", "coefficient" (positive: more
    of it wins), "accuracy" (of "more of it wins", equal ones as half), "differs" (share of pairs)}]} or None
    where there are too few pairs}`; intervals are Wilson's, of 95%; features go by their coefficient's size.

    Findings: `length_bias` (by the rule's accuracy on all pairs) and `shallow_labels`, as grave as
    `THRESHOLDS` say; `surface_giveaway` for single features.
    """

    name = "shallow"

    def __init__(self, sample: int = 20_000, seed: int = 0) -> None:
        self._sample, self._random = sample, random.Random(seed)
        self._differences = array("q")  # of length, preferred minus other, in characters
        self._features: list[Floats] = []
        self._folds: list[int] = []
        self._shown: list[dict[str, str]] = []
        # Labelled replies that wait for one with the other label, by fold and label.
        self._waiting: dict[tuple[int, bool], deque[tuple[Example, str]]] = defaultdict(
            lambda: deque(maxlen=max(sample // _FOLDS, 1))
        )

    def add(self, example: Example) -> None:
        if example.held_out:
            return
        fold = blake2b(example.prompt.encode(), digest_size=4).digest()[0] % _FOLDS
        for (first, good), (second, bad) in self._pairs(example, fold):
            self._differences.append(len(good) - len(bad))
            place = self._draw()
            if place is None:
                continue
            features = surface(first.prompt, good) - surface(second.prompt, bad)
            shown = {"place": first.place, "chosen": clipped(good), "rejected": clipped(bad)}
            if place == len(self._features):
                self._features.append(features)
                self._folds.append(fold)
                self._shown.append(shown)
            else:
                self._features[place], self._folds[place], self._shown[place] = features, fold, shown

    def result(self) -> Result:
        if not self._differences:
            return Result((), {"pairs": 0, "length_rule": None, "model": None})
        rule, findings = _length_rule(np.array(self._differences))
        figures: dict[str, Any] = {"pairs": len(self._differences), "length_rule": rule, "model": None}
        if len(self._features) >= 2 * _FOLDS and len(set(self._folds)) > 1:
            model, found = self._model(np.array(self._features), np.array(self._folds))
            figures["model"] = model
            findings += found
        return Result(tuple(findings), figures)

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

    def _model(self, features_NF: Floats, folds: Integers) -> tuple[dict[str, Any], list[Finding]]:
        scores = held_out_scores(features_NF, folds)
        right, count = _wins(scores), len(scores)
        singles = [_wins(column) / count for column in features_NF.T]
        differs = (features_NF != 0).mean(0)
        weights = fit_logistic(features_NF / _scale(features_NF))
        order = np.argsort(-np.abs(weights), kind="stable")
        features = [
            {
                "name": FEATURES[i],
                "coefficient": float(weights[i]),
                "accuracy": singles[i],
                "differs": float(differs[i]),
            }
            for i in order
            if differs[i] > 0
        ]
        interval = wilson(right, count)
        figures = {"accuracy": right / count, "interval": interval, "pairs": count, "features": features}
        findings = _giveaways(features, count)
        if severity := _severity(right, count):
            surest = [self._shown[i] for i in np.argsort(-scores, kind="stable")[:5]]
            findings.append(_won_without_reading(severity, figures, round(right), surest))
        return figures, findings


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


def held_out_scores(features_NF: Floats, folds: Integers) -> Floats:
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


def wilson(right: float, count: int) -> list[float]:
    """[low, high] of 95% for a share of `count` (Wilson 1927)."""
    share, spread = right / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def _severity(right: float, count: int) -> Severity | None:
    share, low = right / count, wilson(right, count)[0]
    reached = (each for limit, each in THRESHOLDS if share >= limit and low >= limit - _UNSURE)
    return next(reached, None)


def _length_rule(differences: Integers) -> tuple[dict[str, Any], list[Finding]]:
    unequal = differences[differences != 0]
    longer, count = int((unequal > 0).sum()), len(unequal)
    if not count:
        return {"longer_chosen": None, "interval": None, "accuracy": 0.5, "by_difference": []}, []
    share, interval = longer / count, wilson(longer, count)
    wins = _wins(differences)
    right = max(wins, len(differences) - wins)
    figures = {
        "longer_chosen": share,
        "interval": interval,
        "accuracy": right / len(differences),
        "by_difference": _by_difference(unequal),
    }
    severity = _severity(right, len(differences))
    if severity is None:
        return figures, []
    which, often = ("longer", longer) if share > 0.5 else ("shorter", count - longer)
    low, high = interval if share > 0.5 else (1 - interval[1], 1 - interval[0])
    sentence = (
        f"the {which} reply is the preferred one in {often / count:.1%} of {count:,} pairs of unequal length "
        f"(95%: {low:.1%} to {high:.1%})."
    )
    advice = (
        f"A policy learns to write {which} replies from it: take a loss that is normalised or regularised by "
        "length (simpo, dpo_norm, r_dpo), or balance the lengths."
    )
    return figures, [Finding("length_bias", severity, often, len(differences), sentence, advice)]


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
    severity: Severity, model: dict[str, Any], right: int, surest: list[dict[str, str]]
) -> Finding:
    low, high = model["interval"]
    # Coefficients of features that go together (characters and words) are hard to read one by one.
    telling = sorted(model["features"], key=lambda each: -abs(each["accuracy"] - 0.5))[:3]
    strongest = "; ".join(
        f"{'more' if each['accuracy'] > 0.5 else 'less'} '{each['name']}' "
        f"({max(each['accuracy'], 1 - each['accuracy']):.1%} by itself)"
        for each in telling
    )
    can = "can" if severity != "note" else "can in part"
    return Finding(
        "shallow_labels",
        severity,
        right,
        model["pairs"],
        f"the data {can} be won without reading: {model['accuracy']:.1%} (95%: {low:.1%} to {high:.1%}) of "
        f"{model['pairs']:,} held-out labels follow from the replies' surface, most of all from {strongest}.",
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
        enough = pairs >= max(_GIVEAWAY_PAIRS, _GIVEAWAY_SHARE * count)
        if enough and wilson(often, pairs)[0] >= _GIVEAWAY_ACCURACY:
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
            f"where the replies differ in '{name}', the one with {which} of it is preferred in "
            f"{often / pairs:.1%} of {pairs:,} pairs{also}.",
            "Such a mark is often left by how the data were made; take it out of both sides.",
        )
    ]
