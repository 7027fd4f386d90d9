"""What an epoch of training on the data would compute: distinct tokens, and what the token tree saves.

Counts tokens; what they cost in time and memory is for `estimate`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from dpo_kit.audit.encoded import Encoded
from dpo_kit.audit.estimate import Device, ModelSource, estimate, model_fields
from dpo_kit.audit.findings import Example, Finding, Result
from dpo_kit.dealing import deal
from dpo_kit.examples import Example as Tokens
from dpo_kit.examples import PairTokens, ScoredReplies, TokenIds, sequences_of
from dpo_kit.pairs.kinds import PAIRS
from dpo_kit.tree import sort_sequences

# Steps whose arithmetic is counted for a model; the others are taken to be like them.
_SAMPLED_STEPS = 8
# Token ids that are held at most, to see what other orders would save.
_HELD_TOKENS = 4_000_000


class CostChecks:
    """Tokens of one epoch in steps of `batch_size` rows; rows come by `take`, from an `Encoder`.

    Only rows that the length policy keeps are counted, as it keeps them.

    Figures: `{"batch_size", "rows", "steps", "distinct": tokens of the steps' trees, "separate": of the same
    sequences kept apart, unpadded, "padded": of one rectangle per step, "saved_share": 1 - distinct /
    separate, "completions": tokens of the replies, "largest_step": distinct tokens, "orders":
    {"file" | "shuffled" | "by_prompt": saved share}}`: rows are dealt to steps in the order of the data;
    `orders` says what a random order saves (what a run does) and one that keeps prompts together
    (`group_by_prompt`), where the data have 4 million tokens at most, else only the order of the data.
    With a model, `"model"` is what `estimate` gives.

    Findings: `cost`, a note; and `model_too_large`.
    """

    name = "cost"

    def __init__(
        self, batch_size: int = 64, model: ModelSource | None = None, device: Device | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._batch_size, self._device = batch_size, device
        # Read at once: what is wrong with it is said before the rows are read, not after.
        self._model = None if model is None else model_fields(model)
        self._random = random.Random(0)
        self._step: list[Tokens] = []
        self._sampled: list[list[Tokens]] = []
        self._held: list[Tokens] | None = []
        self._rows = self._steps = self._distinct = self._separate = self._padded = 0
        self._completions = self._largest = 0

    def add(self, example: Example) -> None:
        """Nothing: rows come by `take`."""

    def take(self, row: Encoded) -> None:
        """Count one encoded row, if it would be trained on."""
        if row.kept is None:
            return
        self._step.append(_tokens(row))
        if len(self._step) == self._batch_size:
            self._count()

    def result(self) -> Result:
        if self._step:
            self._count()
        if not self._rows:
            return Result()
        figures: dict[str, Any] = {
            "batch_size": self._batch_size,
            "rows": self._rows,
            "steps": self._steps,
            "distinct": self._distinct,
            "separate": self._separate,
            "padded": self._padded,
            "saved_share": 1 - self._distinct / self._separate,
            "completions": self._completions,
            "largest_step": self._largest,
            "orders": self._orders(),
        }
        if self._model is not None:
            figures["model"] = estimate(
                self._model,
                self._sampled,
                distinct=self._distinct,
                largest_step=self._largest,
                device=self._device,
            )
        return Result(tuple(_findings(figures)), figures)

    def _count(self) -> None:
        step, self._step = self._step, []
        sequences, _ = sequences_of(step)
        distinct = sort_sequences(sequences).num_prefixes
        self._rows += len(step)
        self._steps += 1
        self._distinct += distinct
        self._separate += sum(map(len, sequences))
        self._padded += len(sequences) * max(map(len, sequences))
        self._completions += sum(len(reply) for each in step for reply in each.replies)
        self._largest = max(self._largest, distinct)
        # Algorithm R (Vitter 1985): every step is as likely to be one of those looked at.
        if len(self._sampled) < _SAMPLED_STEPS:
            self._sampled.append(step)
        elif (place := self._random.randrange(self._steps)) < _SAMPLED_STEPS:
            self._sampled[place] = step
        if self._held is not None:
            self._held += step
            if self._separate > _HELD_TOKENS:
                self._held = None

    def _orders(self) -> dict[str, float]:
        """By the order in which rows are dealt to steps, the share of tokens that the trees save."""
        saved = {"file": 1 - self._distinct / self._separate}
        if self._held is None:
            return saved
        numbers: dict[bytes, int] = {}
        groups = np.array([numbers.setdefault(row.prompt.tobytes(), len(numbers)) for row in self._held])
        orders = {
            "shuffled": np.random.default_rng(0).permutation(len(groups)),
            "by_prompt": deal(groups, self._batch_size, seed=0, epoch=0),
        }
        for name, order in orders.items():
            rows = [self._held[i] for i in order]
            steps = (rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size))
            distinct = sum(sort_sequences(sequences_of(step)[0]).num_prefixes for step in steps)
            saved[name] = 1 - distinct / self._separate
        return saved


def _tokens(row: Encoded) -> Tokens:
    """The row as training takes it; the scores do not matter here."""
    assert row.kept is not None
    prompt = np.array(row.kept[0], np.int32)
    replies: list[TokenIds] = [np.array(ids, np.int32) for ids in row.kept[1]]
    if row.example.kind == PAIRS:
        return PairTokens(prompt, replies[0], replies[1])
    return ScoredReplies(prompt, replies, [0.0] * len(replies))


def _findings(figures: dict[str, Any]) -> list[Finding]:
    rows, model = figures["rows"], figures.get("model")
    sentence = (
        f"an epoch in steps of {figures['batch_size']} computes {figures['distinct']:,} tokens, "
        f"{figures['saved_share']:.0%} fewer than the {figures['separate']:,} of separate sequences; padded "
        f"they would be {figures['padded']:,}."
    )
    advice = "Larger steps share more."
    orders = figures["orders"]
    if orders.get("by_prompt", 0) > orders.get("shuffled", 0) + 0.05:
        advice = (
            f"group_by_prompt deals the rows of a prompt to one step and saves {orders['by_prompt']:.0%}, "
            f"where a random order saves {orders['shuffled']:.0%}."
        )
    if model is None:
        return [Finding("cost", "note", rows, rows, sentence, advice)]
    low, high = model["seconds"]
    least, whole = model["memory"]["least"], model["memory"]["whole_step"]
    sentence += (
        f" A model of {_parameters(model['parameters'])} takes {_duration(low)} to "
        f"{_duration(high)} and {least / 1e9:.3g} to {whole / 1e9:.3g} GB on this machine "
        f"({model['device']}, {model['dtype']}; estimated)."
    )
    found = [Finding("cost", "note", rows, rows, sentence, advice)]
    room = model["memory"]["machine"]
    if room is not None and least > room:
        found.append(
            Finding(
                "model_too_large",
                "warning",
                rows,
                rows,
                f"training all of the model's parameters takes at least {least / 1e9:.3g} GB, and this "
                f"machine ({model['device']}) has {room / 1e9:.3g} GB.",
                "Train an adapter (model.lora), quantise the model, or take a larger machine.",
            )
        )
    return found


def _parameters(count: int) -> str:
    size, unit = (1e9, "billion") if count >= 1e9 else (1e6, "million")
    return f"{count / size:.3g} {unit} parameters"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
