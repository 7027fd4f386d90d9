"""What is trained on, as token ids: a pair, one reply with a label, or a ranked list of replies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_kit.errors import InputError
from dpo_kit.shapes import Shape
from dpo_kit.tree import IntArray

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PairTokens:
    """One preference pair as token ids (any integer dtype); `rejected` is None where no loss needs it."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds | None
    weight: float = 1.0
    margin: float = 0.0
    source: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, with_rejected: bool = True) -> PairTokens:
        """From a row of the tokenised data set: prompt_ids, chosen_ids, rejected_ids, weight, ..."""
        weight, source = _weight_and_source(row)
        return cls(
            prompt=np.asarray(row["prompt_ids"]),
            chosen=np.asarray(row["chosen_ids"]),
            rejected=np.asarray(row["rejected_ids"]) if with_rejected else None,
            weight=weight,
            margin=_number(row.get("margin"), 0.0),
            source=source,
        )

    @property
    def replies(self) -> list[TokenIds]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    @property
    def scores(self) -> list[float]:
        return [1.0, 0.0][: len(self.replies)]

    @property
    def shape(self) -> Shape:
        return "unpaired" if self.rejected is None else "pairs"


@dataclass(frozen=True)
class ScoredReplies:
    """A prompt with one labelled reply (score 1 or 0), or with several that are ranked by their scores."""

    prompt: TokenIds
    replies: list[TokenIds]
    scores: list[float]
    weight: float = 1.0
    source: str = ""
    margin: float = 0.0

    @property
    def shape(self) -> Shape:
        return "unpaired" if len(self.replies) == 1 else "lists"


Example = PairTokens | ScoredReplies


def example_of(row: Mapping[str, Any], *, with_rejected: bool = True) -> Example:
    """From a row of the tokenised data set, whichever of the three kinds it is.

    prompt_ids with chosen_ids and rejected_ids, with completion_ids and label, or with completions_ids
    and scores; and weight, margin, source where there are such columns.
    """
    if "chosen_ids" in row:
        return PairTokens.from_row(row, with_rejected=with_rejected)
    prompt = np.asarray(row["prompt_ids"])
    if "completion_ids" in row:
        replies, scores = [row["completion_ids"]], [row["label"]]
    else:
        replies, scores = row["completions_ids"], row["scores"]
    replies, scores = [np.asarray(ids) for ids in replies], [float(score) for score in scores]
    return ScoredReplies(prompt, replies, scores, *_weight_and_source(row))


def _weight_and_source(row: Mapping[str, Any]) -> tuple[float, str]:
    weight, source = _number(row.get("weight"), 1.0), str(row.get("source") or "")
    if not 0 <= weight < math.inf:
        raise InputError(f"a weight must be 0 or more, got {weight}", file=source or None, field="weight")
    return weight, source


def _number(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def sequences_of(pairs: Sequence[Example]) -> tuple[list[IntArray], list[int]]:
    """All first replies' token sequences, then all second replies', ..., and where each reply begins."""
    if len({pair.shape for pair in pairs}) > 1:
        raise ValueError("the examples of a micro-batch are pairs, unpaired replies or lists, all alike")
    parts = [(pairs[i].prompt, pairs[i].replies[slot]) for slot, i in number_sequences(pairs)]
    for prompt, reply in parts:
        if not len(prompt) or not len(reply):
            raise ValueError("a prompt and a reply need at least one token each")
    return [np.concatenate(part, dtype=np.int64) for part in parts], [len(prompt) for prompt, _ in parts]


def number_sequences(pairs: Sequence[Example]) -> list[tuple[int, int]]:
    """(place in the example, example) of each sequence, in the order of the sequences."""
    most = max(len(pair.replies) for pair in pairs)
    return [(slot, i) for slot in range(most) for i, pair in enumerate(pairs) if slot < len(pair.replies)]


def sequence_keys(sequences: Sequence[IntArray], starts: Sequence[int]) -> npt.NDArray[np.uint8]:
    """[S, 16] digests (128-bit BLAKE2b) of token sequences and of where each one's reply begins."""
    digests = [
        blake2b(np.int64(start).tobytes() + sequence.astype(np.int64).tobytes(), digest_size=16).digest()
        for sequence, start in zip(sequences, starts, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
