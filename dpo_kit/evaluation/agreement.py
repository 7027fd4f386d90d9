"""How far two judges, or a judge and people, agree beyond chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Cohen's kappa: (p_o - p_e) / (1 - p_e).

    p_o is the share of items that both put into the same category, p_e the share that they would by chance,
    each with the frequencies of its own. 1 is full agreement, 0 that of chance.

    Args:
        a: category of each item by one judge.
        b: by the other.

    Returns:
        None where there is no item, or where both have put all into the same one category: then chance
        alone agrees always, and there is nothing beyond it to measure.

    Source: J. Cohen, A coefficient of agreement for nominal scales, Educational and Psychological
    Measurement 20 (1960), equation 1, doi 10.1177/001316446002000104.
    """
    pairs = list(zip(a, b, strict=True))
    if not pairs:
        return None
    of_a, of_b = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    # In counts, so that full agreement by chance is found exactly.
    by_chance, most = sum(of_a[x] * of_b[x] for x in of_a), len(pairs) ** 2
    if by_chance == most:
        return None
    agreed = sum(x == y for x, y in pairs) * len(pairs)
    return (agreed - by_chance) / (most - by_chance)


@dataclass(frozen=True)
class Agreement:
    """Of two judges on the same comparisons.

    Attributes:
        n: comparisons that both came to a verdict on.
        agreement: share of them with the same verdict, a tie being a verdict of its own; None without any.
        kappa: Cohen's, of the same three verdicts.
        n_decided: those of them that neither calls a tie.
        agreement_decided: share of these with the same verdict.
    """

    n: int
    agreement: float | None
    kappa: float | None
    n_decided: int
    agreement_decided: float | None


def agreement(a: Sequence[float | None], b: Sequence[float | None]) -> Agreement:
    """Compare two judges' preferences (`Verdict.preference`) on the same comparisons.

    Which reply of a comparison is called the first says nothing, and in preference data it is always the
    one that people chose; kappa would then be 0 whatever the judges say. So for kappa every comparison is
    counted both ways round, which leaves the share of agreement as it is.
    """
    both = [(_verdict(x), _verdict(y)) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    decided = [pair for pair in both if 0 not in pair]
    turned = both + [(-x, -y) for x, y in both]
    kappa = cohens_kappa([x for x, _ in turned], [y for _, y in turned])
    return Agreement(len(both), _share(both), kappa, len(decided), _share(decided))


def _verdict(preference: float) -> int:
    """1 the first is better, -1 the second, 0 neither."""
    return (preference > 0.5) - (preference < 0.5)


def _share(pairs: Sequence[tuple[int, int]]) -> float | None:
    return sum(x == y for x, y in pairs) / len(pairs) if pairs else None
