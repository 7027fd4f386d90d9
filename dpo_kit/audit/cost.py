"""What an epoch of training on the data would compute: distinct tokens, and what the token tree saves.

Counts tokens; what they cost in time and memory is for `estimate`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from dpo_kit.audit.encoded import Encoded
from dpo_kit.audit.estimate import Device, ModelSource, estimate, fields_of_sound_model
from dpo_kit.audit.faults import Fault, share_in_words
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.audit.words import memory
from dpo_kit.dealing import deal
from dpo_kit.examples import Example as Tokens
from dpo_kit.examples import PairTokens, ScoredReplies, TokenIds, sequences_of
from dpo_kit.pairs.kinds import PAIRS
from dpo_kit.tree import sort_sequences

# Steps whose arithmetic is counted for a model; the others are taken to be like them.
_SAMPLED_STEPS = 8
# Token ids that are held at most for each of the two samples.
_HELD_TOKENS = 4_000_000
# Rows of a padded micro-batch, as other trainers take them.
_PADDED_ROWS = 8


class CostChecks:
    """Tokens of one epoch in steps of `batch_size` rows; rows come by `take`, from an `Encoder`.

    Only rows that the length policy keeps are counted, as it keeps them. Rows are dealt to steps in a random
    order, as a run does; of more than 4 million tokens a sample is dealt, and the figures are scaled to all.

    Figures: `{"batch_size", "rows", "steps", "distinct": tokens of the steps' trees, "separate": of the same
    sequences kept apart, unpadded, "padded": of micro-batches of 8 rows, each as long as its longest
    sequence, "saved_share": 1 - distinct / separate, "completions": tokens of the replies, "largest_step":
    distinct tokens, "sampled": share of the tokens that was dealt, "orders": {"shuffled" | "by_prompt" |
    "file": saved share}}`: `orders` says what is saved where the rows of a prompt are kept together
    (`group_by_prompt`), and in the order of the data. With a model, `"model"` is what `estimate` gives.

    Findings: `model_too_large`; and of rows that the model cannot take `ids_beyond_vocabulary` and
    `longer_than_model` (a warning where positions are rotary: such a model goes on).
    """

    name = "cost"

    def __init__(
        self, batch_size: int = 64, model: ModelSource | None = None, device: Device | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._batch_size, self._device = batch_size, device
        # Made at once: what is wrong with it is said before the rows are read, not after.
        self._model = None if model is None else fields_of_sound_model(model)
        self._limits = None if self._model is None else limits_of(self._model)
        self._beyond, self._too_long = Fault(), Fault()
        self._step: list[Tokens] = []
        self._rows, self._prompts = RowSample(_HELD_TOKENS), PromptSample(_HELD_TOKENS)
        self._count = self._separate = self._completions = self._distinct_in_file = 0

    def add(self, example: Example) -> None:
        """Nothing: rows come by `take`."""

    def take(self, row: Encoded) -> None:
        """Count one encoded row, if it would be trained on."""
        if row.kept is None:
            return
        tokens = _tokens(row)
        size = separate_tokens([tokens])
        self._count += 1
        self._separate += size
        self._completions += sum(map(len, row.kept[1]))
        self._rows.add(tokens, size)
        self._prompts.add(tokens, size)
        self._step.append(tokens)
        if len(self._step) == self._batch_size:
            self._end_step()
        if self._limits is not None:
            self._see_whether_it_fits(row.example, tokens)

    def _end_step(self) -> None:
        self._distinct_in_file += distinct_tokens(self._step)
        self._step = []

    def _see_whether_it_fits(self, example: Example, tokens: Tokens) -> None:
        vocabulary, positions = self._limits or (None, None)
        largest_id = max(int(ids.max()) for ids in (tokens.prompt, *tokens.replies))
        length = len(tokens.prompt) + max(map(len, tokens.replies))
        if vocabulary is not None and largest_id >= vocabulary:
            self._beyond.add(example, 0, {"largest id": str(largest_id)})
        if positions is not None and length > positions:
            self._too_long.add(example, 0, {"length": f"{length} tokens"})

    def result(self) -> Result:
        if self._step:
            self._end_step()
        if not self._count:
            return Result()
        rows = self._rows.rows
        order = np.random.default_rng(0).permutation(len(rows))
        steps = list(_steps([rows[i] for i in order], self._batch_size))
        by_step = [distinct_tokens(step) for step in steps]
        dealt = separate_tokens(rows)
        scale = self._separate / dealt
        figures: dict[str, Any] = {
            "batch_size": self._batch_size,
            "rows": self._count,
            "steps": -(-self._count // self._batch_size),
            "distinct": round(sum(by_step) * scale),
            "separate": self._separate,
            "padded": round(padded_tokens([row for step in steps for row in step]) * scale),
            "saved_share": 1 - sum(by_step) / dealt,
            "completions": self._completions,
            "largest_step": max(by_step),
            "sampled": dealt / self._separate,
            "orders": {
                "shuffled": 1 - sum(by_step) / dealt,
                "by_prompt": self._saved_by_prompt(),
                "file": 1 - self._distinct_in_file / self._separate,
            },
        }
        if self._model is not None:
            figures["model"] = estimate(
                self._model,
                steps[:_SAMPLED_STEPS],
                distinct=figures["distinct"],
                largest_step=figures["largest_step"],
                device=self._device,
            )
        return Result(tuple(self._findings(figures)), figures)

    def _saved_by_prompt(self) -> float:
        rows = self._prompts.rows
        numbers: dict[bytes, int] = {}
        groups = np.array([numbers.setdefault(row.prompt.tobytes(), len(numbers)) for row in rows])
        dealt = [rows[i] for i in deal(groups, self._batch_size, seed=0, epoch=0)]
        distinct = sum(map(distinct_tokens, _steps(dealt, self._batch_size)))
        return 1 - distinct / separate_tokens(rows)

    def _findings(self, figures: dict[str, Any]) -> Iterator[Finding]:
        if self._model is None:
            return
        vocabulary, positions = self._limits or (None, None)
        yield from _unfit(
            "ids_beyond_vocabulary",
            self._beyond,
            self._count,
            f"hold token ids that the model's vocabulary of {vocabulary:,} has no place for"
            if vocabulary
            else "",
            "Tokenizer and model do not belong together: give the model's own, or make its embedding larger.",
            "error",
        )
        yield from _unfit(
            "longer_than_model",
            self._too_long,
            self._count,
            f"are longer than the {positions:,} positions of the model" if positions else "",
            "A model with learned positions stops at them, one with rotary ones was not trained so far: set "
            "`max_length` to what the model has.",
            "warning" if any(name.startswith(("rope", "rotary")) for name in self._model) else "error",
        )
        least, room = (figures["model"]["memory"][name] for name in ("least", "machine"))
        if room is not None and least > room:
            known = figures["model"]["memory"]["activations_per_token"] is not None
            yield Finding(
                "model_too_large",
                "warning",
                self._count,
                self._count,
                f"training all of the model's parameters takes at least {memory(least)}"
                f"{'' if known else ' without activations'}, and this machine "
                f"({figures['model']['device']}) has {memory(room)}.",
                "Train an adapter (`model.lora`), quantise the model, or take a larger machine.",
            )


class RowSample:
    """Rows of at most so many tokens in all, each as likely to be among them (Algorithm R, Vitter 1985)."""

    def __init__(self, most_tokens: int) -> None:
        self.rows: list[Tokens] = []
        self._most, self._tokens, self._seen, self._full = most_tokens, 0, 0, False
        self._random = random.Random(0)

    def add(self, row: Tokens, size: int) -> None:
        self._seen += 1
        if not self._full:
            self.rows.append(row)
            self._tokens += size
            self._full = self._tokens >= self._most
        elif (place := self._random.randrange(self._seen)) < len(self.rows):
            self.rows[place] = row


class PromptSample:
    """All rows of some prompts, at most so many tokens in all (but one prompt's at least)."""

    def __init__(self, most_tokens: int) -> None:
        self._rows: dict[int, list[tuple[Tokens, int]]] = {}  # by a digest of their prompt
        self._most, self._tokens, self._below = most_tokens, 0, 2**64

    @property
    def rows(self) -> list[Tokens]:
        return [row for rows in self._rows.values() for row, _ in rows]

    def add(self, row: Tokens, size: int) -> None:
        digest = int.from_bytes(blake2b(row.prompt.tobytes(), digest_size=8).digest())
        if digest >= self._below:
            return
        self._rows.setdefault(digest, []).append((row, size))
        self._tokens += size
        while self._tokens > self._most and len(self._rows) > 1:
            self._halve()

    def _halve(self) -> None:
        """Give up the half of the prompts whose digests are the largest."""
        digests = sorted(self._rows)
        self._below = digests[len(digests) // 2]
        for digest in digests[len(digests) // 2 :]:
            self._tokens -= sum(size for _, size in self._rows.pop(digest))


def _steps(rows: Sequence[Tokens], size: int) -> Iterator[Sequence[Tokens]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def distinct_tokens(step: Sequence[Tokens]) -> int:
    """Of the tree of a step."""
    return sort_sequences(sequences_of(step)[0]).num_prefixes


def separate_tokens(rows: Sequence[Tokens]) -> int:
    """Of the rows' sequences kept apart, unpadded."""
    return sum(len(row.prompt) * len(row.replies) + sum(map(len, row.replies)) for row in rows)


def padded_tokens(rows: Sequence[Tokens]) -> int:
    """Of micro-batches of 8 rows in their order, each sequence as long as the longest of its micro-batch."""
    padded = 0
    for part in _steps(rows, _PADDED_ROWS):
        lengths = list(map(len, sequences_of(part)[0]))
        padded += len(lengths) * max(lengths)
    return padded


def limits_of(fields: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens in a model's vocabulary, and its positions; None where its configuration does not say."""
    inner = fields.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    vocabulary, positions = (
        fields.get(name) or inner.get(name) for name in ("vocab_size", "max_position_embeddings")
    )
    return vocabulary, positions or fields.get("n_positions")


def _unfit(name: str, fault: Fault, of: int, said: str, advice: str, severity: Severity) -> Iterator[Finding]:
    count = len(fault.places)
    if count:
        sentence = f"{count:,} of {of:,} rows ({share_in_words(count, of)}) {said}."
        yield fault.finding(name, severity, of, sentence, advice)


def _tokens(row: Encoded) -> Tokens:
    """The row as training takes it; the scores do not matter here."""
    assert row.kept is not None
    prompt = np.array(row.kept[0], np.int32)
    replies: list[TokenIds] = [np.array(ids, np.int32) for ids in row.kept[1]]
    if row.example.kind == PAIRS:
        return PairTokens(prompt, replies[0], replies[1])
    return ScoredReplies(prompt, replies, [0.0] * len(replies))
