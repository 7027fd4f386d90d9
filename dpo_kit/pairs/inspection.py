"""What a set of pairs looks like, without stopping at the pairs that cannot be used.

Counts and lengths in characters; what needs a tokenizer, and the audit proper, are not here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from dpo_kit.pairs.loading import Sources, stream_pairs
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.tally import PairsReport, PairStatistics, Spread


def inspect_pairs(sources: Sources, *, format: str = "auto") -> PairsReport:
    """The account of a loading that leaves unusable pairs out, with statistics of the pairs kept.

    `sources` and `format` as for `load_pairs`. The pairs are streamed, not held. Raises `InputError` for
    trouble with structure (broken files, missing fields), never for unusable pairs; where no pair is
    usable, the report has no statistics.
    """
    report = PairsReport()
    lengths: list[tuple[int, int, int]] = []
    prompts: set[bytes] = set()
    seen: set[bytes] = set()
    for pair in stream_pairs(sources, format, report):
        prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
        lengths.append((len(plain_text(prompt)), len(plain_text(chosen)), len(plain_text(rejected))))
        prompts.add(_digest(prompt))
        seen.add(_digest([prompt, chosen, rejected]))
    if lengths:
        report.statistics = _statistics(np.array(lengths), len(prompts), len(seen))
    return report


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def _statistics(lengths_P3: np.ndarray, prompts: int, distinct: int) -> PairStatistics:
    """`lengths_P3`: characters of prompt, chosen and rejected of each of P pairs."""
    prompt, chosen, rejected = (_spread(column) for column in lengths_P3.T)
    gap = lengths_P3[:, 1] - lengths_P3[:, 2]
    unequal = gap[gap != 0]
    return PairStatistics(
        prompt_characters=prompt,
        chosen_characters=chosen,
        rejected_characters=rejected,
        distinct_prompts=prompts,
        duplicated_pairs=len(lengths_P3) - distinct,
        longer_chosen_share=float((unequal > 0).mean()) if len(unequal) else None,
    )


def _spread(lengths: np.ndarray) -> Spread:
    p95 = np.percentile(lengths, 95, method="inverted_cdf")
    return Spread(median=float(np.median(lengths)), p95=int(p95), max=int(lengths.max()))
