"""Preference pairs of random tokens whose lengths follow published data sets; the source of each figure.

Only the lengths of a data set matter to speed; what is random here is which token stands where. Real
HH pairs are read in workload.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dpo_kit.errors import InputError

# Token ids below this are left to special tokens.
_FIRST_TOKEN = 2

_TABLE = (
    "median length and median prompt over reply from arXiv 2410.20305, table 1 (read in a transcription: "
    "github.com/deep-diver/ai-paper-reviewer); 'length' is taken to be prompt plus one reply, and the spread "
    "(log-normal) is assumed"
)


class Distribution(Protocol):
    """Where the lengths of a data set come from."""

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """[count] lengths in tokens, at least 1."""


@dataclass(frozen=True)
class Percentiles:
    """Measured percentiles; linear in between."""

    at: tuple[float, ...]
    tokens: tuple[int, ...]

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        return np.interp(random.uniform(self.at[0], self.at[-1], count), self.at, self.tokens).astype(int)


@dataclass(frozen=True)
class LogNormal:
    """A median, a spread (standard deviation of the logarithm), and a longest length."""

    median: float
    spread: float
    longest: int

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        drawn = self.median * np.exp(self.spread * random.standard_normal(count))
        return np.clip(np.rint(drawn), 1, self.longest).astype(int)


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompt, chosen and rejected replies, and where the figures are from."""

    prompt: Distribution
    chosen: Distribution
    rejected: Distribution
    source: str


def _published(median: int, prompt_over_reply: float, spreads: tuple[float, float], longest: int) -> Lengths:
    reply = median / (1 + prompt_over_reply)
    replies = LogNormal(reply, spreads[1], longest)
    return Lengths(LogNormal(median - reply, spreads[0], longest), replies, replies, _TABLE)


# The longest one in a hundred is left out.
_AT = (0, 5, 25, 50, 75, 95, 99)
LENGTHS: Mapping[str, Lengths] = {
    "hh-like": Lengths(
        Percentiles(_AT, (8, 16, 33, 97, 171, 354, 542)),
        Percentiles(_AT, (2, 7, 16, 29, 55, 123, 204)),
        Percentiles(_AT, (2, 7, 19, 38, 68, 150, 259)),
        "percentiles measured on HH harmless-base (test split, 2303 usable pairs, byte-level BPE of 8192 "
        "tokens learned on it)",
    ),
    "ultrafeedback": _published(409, 0.42, (0.9, 0.6), 2048),
    "tldr": _published(416, 11.14, (0.35, 0.3), 1024),
    "capybara": _published(1160, 1.59, (0.6, 0.5), 2842),
}


def lengths_of(work: str) -> Lengths | None:
    """The lengths that a work's name stands for; "fixed-P-R" is a prompt of P and replies of R tokens."""
    if found := re.fullmatch(r"fixed-(\d+)-(\d+)", work):
        prompt, reply = (Percentiles((0, 1), (int(n), int(n))) for n in found.groups())
        return Lengths(prompt, reply, reply, "fixed")
    return LENGTHS.get(work)


def pairs_per_prompt(replies: int) -> int:
    """All pairs of so many ranked replies."""
    return replies * (replies - 1) // 2


def generated_pairs(
    lengths: Lengths, count: int, vocabulary: int, replies: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Pairs of random tokens, the pairs of one prompt side by side.

    Args:
        lengths: where lengths are drawn from.
        count: of pairs.
        vocabulary: tokens are drawn from 2 to vocabulary - 1.
        replies: ranked replies of each prompt; all their pairs are made. With more than two, half of the
            replies have the lengths of chosen ones.
        seed: of lengths and tokens.

    Raises:
        InputError: the count is no multiple of the pairs of one prompt.
    """
    each = pairs_per_prompt(replies)
    if count % each:
        raise InputError(
            f"{count} pairs are no multiple of the {each} that {replies} replies make", field="--pairs"
        )
    random = np.random.default_rng(seed)
    prompts = count // each
    lengths_of_replies = [
        (lengths.chosen if place % 2 == 0 else lengths.rejected).draw(random, prompts)
        for place in range(replies)
    ]
    prompt_lengths = lengths.prompt.draw(random, prompts)
    rows: list[dict[str, Any]] = []
    for i in range(prompts):
        prompt, *ranked = (
            random.integers(_FIRST_TOKEN, vocabulary, length).tolist()
            for length in (prompt_lengths[i], *(drawn[i] for drawn in lengths_of_replies))
        )
        rows += [
            {"prompt_ids": prompt, "chosen_ids": ranked[better], "rejected_ids": ranked[worse]}
            for better in range(replies)
            for worse in range(better + 1, replies)
        ]
    return rows
