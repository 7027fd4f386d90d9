"""What a set of preference data looks like, without stopping at the rows that cannot be used.

The account of a loading with `statistics`; what needs a tokenizer, and the audit proper, are not here.
"""

from __future__ import annotations

from typing import Any

from dpo_kit.pairs.loading import Sources, stream_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.statistics import Gatherer
from dpo_kit.pairs.tally import PairsReport


def inspect_pairs(sources: Sources, *, format: str = "auto", **options: Any) -> PairsReport:
    """The account of a loading that leaves unusable rows out, with statistics of the rows kept.

    `sources` and `format` as for `load_pairs`; the rows may be of any one kind. They are streamed, not held.
    Raises `InputError` for trouble with structure (broken files, missing fields), never for unusable rows;
    where no row is usable, the report has no statistics.
    """
    report, gatherer = PairsReport(), Gatherer()
    for row in stream_rows(sources, LoadOptions.of(format=format, **options), report):
        assert report.kind is not None
        gatherer.add(row, report.kind)
    report.statistics = gatherer.statistics(report.kind)
    return report
