"""What the kept rows of a set look like: counts, and lengths in characters (of messages, the content alone).

One record for each kind of rows. What needs a tokenizer is not here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_kit.pairs.kinds import CONTEXT, LISTS, PAIRS, Kind
from dpo_kit.pairs.schema import plain_text

_BINS = 32


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 95th percentile (nearest rank) and greatest of some lengths."""

    median: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> Spread:
        p95 = np.percentile(lengths, 95, method="inverted_cdf")
        return cls(median=float(np.median(lengths)), p95=int(p95), max=int(np.max(lengths)))


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many of some lengths lie from each edge up to the next; the edges grow by a factor."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class PairStatistics:
    prompt_characters: Spread
    chosen_characters: Spread
    rejected_characters: Spread
    distinct_prompts: int
    duplicated_pairs: int  # pairs equal to an earlier one
    longer_chosen_share: float | None  # of the pairs of unequal length; None where there is none
    histograms: dict[str, Histogram] = field(default_factory=dict)  # of characters, by part

    def in_words(self) -> list[str]:
        lines = _characters_in_words(
            prompt=self.prompt_characters, chosen=self.chosen_characters, rejected=self.rejected_characters
        )
        lines.append(f"distinct prompts: {self.distinct_prompts}")
        lines.append(f"duplicated pairs: {self.duplicated_pairs}")
        if self.longer_chosen_share is not None:
            lines.append(f"the longer reply is chosen in {self.longer_chosen_share:.1%} of pairs")
        return lines


@dataclass(frozen=True, slots=True)
class UnpairedStatistics:
    prompt_characters: Spread
    desirable_characters: Spread | None  # of the completions with label true; None where there is none
    undesirable_characters: Spread | None
    distinct_prompts: int
    duplicated_rows: int  # rows equal to an earlier one, label and all
    desirable: int
    undesirable: int
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def in_words(self) -> list[str]:
        return [
            *_characters_in_words(
                prompt=self.prompt_characters,
                desirable=self.desirable_characters,
                undesirable=self.undesirable_characters,
            ),
            f"distinct prompts: {self.distinct_prompts}",
            f"duplicated rows: {self.duplicated_rows}",
            f"labels: {self.desirable} desirable, {self.undesirable} undesirable",
        ]


@dataclass(frozen=True, slots=True)
class ListStatistics:
    prompt_characters: Spread
    best_characters: Spread  # of the completion with the highest score, the first of equal ones
    other_characters: Spread
    completions: Spread  # how many a list has
    distinct_prompts: int
    duplicated_lists: int  # lists equal to an earlier one, order and scores and all
    lists_with_ties: int  # among the scores of a list
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def in_words(self) -> list[str]:
        return [
            *_characters_in_words(
                prompt=self.prompt_characters, best=self.best_characters, others=self.other_characters
            ),
            "completions of a list (median, 95th percentile, max):",
            _spread_in_words("", self.completions),
            f"distinct prompts: {self.distinct_prompts}",
            f"duplicated lists: {self.duplicated_lists}",
            f"lists with ties: {self.lists_with_ties}",
        ]


Statistics = PairStatistics | UnpairedStatistics | ListStatistics


class Gatherer:
    """Rows of one kind, seen one by one and not held -> their statistics."""

    def __init__(self) -> None:
        self._prompt_lengths: list[int] = []
        self._reply_lengths: list[list[int]] = []
        self._judgements: list[Any] = []
        self._prompts: set[bytes] = set()
        self._seen: set[bytes] = set()

    def add(self, row: dict[str, Any], kind: Kind) -> None:
        """Take one canonical row in."""
        self._prompt_lengths.append(len(plain_text(row["prompt"])))
        self._reply_lengths.append([len(plain_text(reply)) for reply in kind.parts(row).values()])
        self._judgements.append(row[kind.judgement] if kind.judgement else None)
        self._prompts.add(_digest(_as_bytes(row, ("prompt", *CONTEXT))))
        self._seen.add(_digest(content_of(row, kind)))

    def statistics(self, kind: Kind | None) -> Statistics | None:
        """Of all rows added; None where there is none."""
        if not self._prompt_lengths:
            return None
        prompt = Spread.of(self._prompt_lengths)
        duplicated = len(self._prompt_lengths) - len(self._seen)
        if kind == PAIRS:
            return self._of_pairs(prompt, duplicated)
        return self._of_lists(prompt, duplicated) if kind == LISTS else self._of_unpaired(prompt, duplicated)

    def _of_pairs(self, prompt: Spread, duplicated: int) -> PairStatistics:
        chosen, rejected = np.array(self._reply_lengths).T
        gap = chosen - rejected
        unequal = gap[gap != 0]
        return PairStatistics(
            prompt_characters=prompt,
            chosen_characters=Spread.of(chosen),
            rejected_characters=Spread.of(rejected),
            distinct_prompts=len(self._prompts),
            duplicated_pairs=duplicated,
            longer_chosen_share=float((unequal > 0).mean()) if len(unequal) else None,
            histograms=self._histograms(chosen=chosen, rejected=rejected),
        )

    def _of_unpaired(self, prompt: Spread, duplicated: int) -> UnpairedStatistics:
        labels, lengths = np.array(self._judgements), np.array(self._reply_lengths)[:, 0]
        desirable, undesirable = lengths[labels], lengths[~labels]
        return UnpairedStatistics(
            prompt_characters=prompt,
            desirable_characters=Spread.of(desirable) if len(desirable) else None,
            undesirable_characters=Spread.of(undesirable) if len(undesirable) else None,
            distinct_prompts=len(self._prompts),
            duplicated_rows=duplicated,
            desirable=len(desirable),
            undesirable=len(undesirable),
            histograms=self._histograms(desirable=desirable, undesirable=undesirable),
        )

    def _of_lists(self, prompt: Spread, duplicated: int) -> ListStatistics:
        best, others = [], []
        for lengths, scores in zip(self._reply_lengths, self._judgements, strict=True):
            first = scores.index(max(scores))
            best.append(lengths[first])
            others += lengths[:first] + lengths[first + 1 :]
        return ListStatistics(
            prompt_characters=prompt,
            best_characters=Spread.of(best),
            other_characters=Spread.of(others),
            completions=Spread.of([len(scores) for scores in self._judgements]),
            distinct_prompts=len(self._prompts),
            duplicated_lists=duplicated,
            lists_with_ties=sum(len(set(scores)) < len(scores) for scores in self._judgements),
            histograms=self._histograms(best=best, other=others),
        )

    def _histograms(self, **replies: Sequence[int] | np.ndarray) -> dict[str, Histogram]:
        """Of the prompts' lengths and these, all with the same edges."""
        parts = {"prompt": self._prompt_lengths, **replies}
        longest = max(int(np.max(lengths)) for lengths in parts.values() if len(lengths))
        edges = np.unique(np.geomspace(1, longest + 1, _BINS + 1).round().astype(int))
        return {
            name: Histogram(edges.tolist(), np.histogram(lengths, edges)[0].tolist())
            for name, lengths in parts.items()
            if len(lengths)
        }


def content_of(row: Mapping[str, Any], kind: Kind) -> bytes:
    """What makes a row the same as another of this kind: all that it says but its place, weight, margin."""
    return _as_bytes(row, (*kind.columns, *CONTEXT))


def _as_bytes(row: Mapping[str, Any], names: Sequence[str]) -> bytes:
    return json.dumps([row.get(name) for name in names]).encode()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _characters_in_words(**parts: Spread | None) -> list[str]:
    there = [_spread_in_words(name, spread) for name, spread in parts.items() if spread]
    return ["characters (median, 95th percentile, max):", *there]


def _spread_in_words(name: str, spread: Spread) -> str:
    return f"  {name:<11} {spread.median:>9.1f} {spread.p95:>7} {spread.max:>7}"
