"""What the reading has to tell: columns that were lost, remarks of the loading, margins that contradict.

Looks at the account of a loading and at a row's own scores; texts are for the other checks.
"""

from __future__ import annotations

from collections.abc import Iterator

from dpo_kit.audit.faults import Fault, share_in_words
from dpo_kit.audit.findings import Account, Example, Finding, Result
from dpo_kit.pairs.kinds import PAIRS


class Margins:
    """Pairs whose given scores do not say what the pair says: chosen is scored no higher than rejected.

    Figures: `{"given": pairs with a margin, "not_positive": of them}`. Finding: `margin_not_positive`.
    """

    name = "margins"

    def __init__(self) -> None:
        self._given = 0
        self._fault = Fault()

    def add(self, example: Example) -> None:
        margin = example.row.get("margin")
        if example.held_out or example.kind != PAIRS or margin is None:
            return
        self._given += 1
        if margin <= 0:
            self._fault.add(example, 0, {"margin": f"{margin:g}"})

    def result(self) -> Result:
        count = len(self._fault.places)
        figures = {"given": self._given, "not_positive": count}
        if not count:
            return Result((), figures)
        finding = self._fault.finding(
            "margin_not_positive",
            "warning",
            self._given,
            f"{count:,} of {self._given:,} pairs with scores ({share_in_words(count, self._given)}) score "
            "the chosen reply no higher than the rejected one.",
            "Scores and preference contradict each other: find out which of them is right, or leave the "
            "pairs out with `--min-margin`.",
        )
        return Result((finding,), figures)


def findings_of_reading(account: Account, *, held_out: bool) -> Iterator[Finding]:
    """`lost_columns` for each source that has such, `loading_remark` for each remark."""
    which = "held-out " if held_out else ""
    for source in account.sources:
        lost = source.lost_columns
        if not lost:
            continue
        columns = ", ".join(f"'{name}' ({rows:,} rows)" for name, rows in lost.items())
        yield Finding(
            "lost_columns",
            "warning",
            max(lost.values()),
            source.read,
            f"{which}{source.file}: columns that look like a part of the prompt are not used: {columns}.",
            "The replies answer what the model would not see: load them with another `--format` or with "
            "`--map`, or take the columns out.",
        )
    for remark in account.remarks:
        yield Finding(
            "loading_remark",
            "warning",
            account.read,
            account.read,
            f"{which}{remark}",
            "See whether this is what you meant.",
        )
