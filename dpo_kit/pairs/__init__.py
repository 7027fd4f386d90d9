"""Preference data: from any known shape on disk to canonical rows, every row accounted for.

`sources` finds the files, `reading` reads their rows, `formats` adapts each on-disk shape, `canonical` and
`schema` check every row of each of the `kinds`, `grouping` and `choosing` make pairs of replies, lists and
votes as the `options` say, `loading` puts them together, `tally` holds the account. A SOURCE
and what comes out are described at `load_pairs`.
"""

from dpo_kit.pairs.formats import register_format
from dpo_kit.pairs.loading import load_pairs, load_with_report, read_pairs
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.tally import PairsReport, Problem

__all__ = [
    "LoadOptions",
    "PairsReport",
    "Problem",
    "load_pairs",
    "load_with_report",
    "read_pairs",
    "register_format",
]
