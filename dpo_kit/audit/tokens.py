"""What a tokenizer makes of the data: lengths, what the length policy leaves out, tokens that mean something
else than they say. Encodes nothing itself (`encoded`).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo_kit.audit.encoded import Encoded
from dpo_kit.audit.faults import (
    OTHER,
    PREFERRED,
    PROMPT,
    Fault,
    reply_sides,
    share_in_words,
)
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.length_policy import LengthPolicy

PARTS = ("prompt", "chosen", "rejected", "whole")
PERCENTILES = (5, 25, 50, 75, 95, 99)
_BINS = 30
# Prose takes 3 to 5 bytes a token in a vocabulary that knows its language, code 2.5 to 4; Chinese in GPT-2's
# takes 1.5, nearly a token for every byte.
_LEAST_BYTES = 2.0
# Of all rows left out or cut by the length policy, from which on a person should look.
_MANY_OVERLONG = 0.05

# For each fault: what is said of its rows, and the advice.
_WORDS = {
    "control_tokens_in_text": (
        "hold text that the tokenizer reads as special tokens",
        "The model would take data for control: take the text out, or write it so that it is no token.",
    ),
    "added_tokens_in_text": (
        "hold text that is an added token of the tokenizer",
        "Right where it is meant so (<think>); else the model never sees the characters.",
    ),
    "brings_eos": (
        "have a reply that ends with the text of the EOS token",
        "Each reply is closed by one end token whatever its text ends with; other trainers may write two.",
    ),
    "empty_to_the_model": (
        "have a reply that is nothing but white space or the end token",
        "The model learns to say nothing, or not to: take the rows out.",
    ),
    "identical_after_tokenisation": (
        "have replies that are the same once they are tokens",
        "They prefer nothing and are left out of training; a length policy that cuts replies makes more.",
    ),
    "overlong": (
        "are longer than {max_length} tokens and are left out of training",
        "Raise `max_length`, or cut with `overlong: cut_prompt_left`.",
    ),
    "overlong_although_cut": (
        "are longer than {max_length} tokens, leave no room for a prompt and are left out of training",
        "Their replies alone are too long: raise `max_length`.",
    ),
    "prompt_too_long": (
        "have a prompt of {max_length} tokens or more and are left out of training",
        "Raise `max_length`.",
    ),
    "cut_prompt": (
        "are longer than {max_length} tokens and lose the beginning of their prompt",
        "Raise `max_length`, or leave them out with `overlong: drop`.",
    ),
    "cut_completion": (
        "are longer than {max_length} tokens and lose the end of a reply",
        "A policy learns to be cut off: raise `max_length`, or leave them out with `overlong: drop`.",
    ),
    "empty_prompt": (
        "have a prompt without a single token and are left out of training",
        "Write the prompt, or take a tokenizer that has a BOS token.",
    ),
    "unknown_tokens": (
        "hold characters that the tokenizer does not know",
        "What is unknown is lost: use a tokenizer that falls back to bytes.",
    ),
    "inexact_border": (
        "have a reply whose first token cannot be told from its prompt's last",
        "Begin replies with a space or a new line, or end prompts with one.",
    ),
}


class TokenChecks:
    """Lengths in tokens and texts that are not what they seem; rows come by `take`, from an `Encoder`.

    `chosen` stands for all preferred replies (desirable ones, the best of a list), `rejected` for the others;
    `whole` is a row's longest sequence, prompt and reply, end token included.

    Figures: `{"rows": N, "lengths": {"prompt" | "chosen" | "rejected" | "whole": {"percentiles": {"5", "25",
    "50", "75", "95", "99", "max"} (nearest rank), "histogram": {"edges" (30 bins or fewer, in geometric
    progression: for a logarithmic axis), "counts"}}} (parts without a reply are left out), "by_source":
    {source: {part: percentiles}}, "stay": {"512": rows of at most so
    many tokens, ...} (of `limits_around`), "policy":
    {"max_length", "overlong", "outcomes": {outcome: rows}}, "replies": {"chosen_mean", "rejected_mean"},
    "bytes_per_token" (of replies, their end tokens apart), "bytes_by_source", "unknown_share" (of tokens),
    "special_tokens": [{"token", "special", "prompt", "chosen", "rejected" (texts that hold it)}]}`.

    Findings are named by what `_WORDS` tells of; and `unfitting_tokenizer`.
    """

    name = "tokens"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: LengthPolicy) -> None:
        self._tokenizer, self._policy = tokenizer, policy
        self._scan = _TextScan(tokenizer)
        unknown, ends = tokenizer.unk_token_id, {tokenizer.eos_token_id, tokenizer.bos_token_id}
        # GPT-2 calls its EOS the unknown token too, and knows every byte.
        self._unknown = None if unknown in ends else unknown
        self._lengths: dict[str, dict[str, array[int]]] = {}
        self._bytes: Counter[str] = Counter()
        self._reply_tokens: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._tokens = self._unknown_tokens = self._rows = 0
        self._faults = {name: Fault() for name in _WORDS}

    def add(self, example: Example) -> None:
        """Nothing: rows come by `take`."""

    def take(self, row: Encoded) -> None:
        """Look at one encoded row."""
        example, (prompt, replies) = row.example, row.ids
        sides = reply_sides(example)
        self._rows += 1
        self._outcomes[row.outcome] += 1
        lengths = self._lengths.setdefault(example.source, {part: array("q") for part in PARTS})
        lengths["prompt"].append(len(prompt))
        lengths["whole"].append(len(prompt) + max(map(len, replies)))
        for side, text, ids in zip(sides, example.replies, replies, strict=True):
            lengths["chosen" if side == PREFERRED else "rejected"].append(len(ids))
            self._bytes[example.source] += len(text.encode())
            self._reply_tokens[example.source] += len(ids) - 1
        self._look_at_texts(example, sides)
        self._look_at_ids(row, sides)

    def _look_at_texts(self, example: Example, sides: tuple[int, ...]) -> None:
        eos = str(self._tokenizer.eos_token)
        texts = [(PROMPT, example.prompt), *zip(sides, example.replies, strict=True)]
        where: dict[str, int] = Counter()
        tokens: dict[str, list[str]] = {}
        for side, text in texts:
            for token, special in self._scan.found(text, side):
                name = "control_tokens_in_text" if special else "added_tokens_in_text"
                where[name] |= side
                tokens.setdefault(name, []).append(token)
            if side != PROMPT and text.rstrip().endswith(eos):
                where["brings_eos"] |= side
            if side != PROMPT and not text.replace(eos, "").strip():
                where["empty_to_the_model"] |= side
        for name, mask in where.items():
            what = {"tokens": " ".join(dict.fromkeys(tokens[name]))} if name in tokens else None
            self._faults[name].add(example, mask, what)

    def _look_at_ids(self, row: Encoded, sides: tuple[int, ...]) -> None:
        prompt, replies = row.ids
        if row.outcome != "kept":
            length = f"{len(prompt)} tokens of prompt, {max(map(len, replies))} of the longest reply"
            self._faults[row.outcome].add(row.example, 0, {"length": length})
        if row.inexact:
            self._faults["inexact_border"].add(row.example, 0)
        if row.kept is not None and len(replies) > 1 and all(ids == row.kept[1][0] for ids in row.kept[1]):
            self._faults["identical_after_tokenisation"].add(row.example, 0)
        self._tokens += len(prompt) + sum(map(len, replies))
        if self._unknown is None:
            return
        where = 0
        for side, ids in [(PROMPT, prompt), *zip(sides, replies, strict=True)]:
            if unknown := ids.count(self._unknown):
                self._unknown_tokens += unknown
                where |= side
        if where:
            self._faults["unknown_tokens"].add(row.example, where)

    def result(self) -> Result:
        """Of the rows taken; of none, nothing."""
        if not self._rows:
            return Result()
        together = {part: _together(lengths[part] for lengths in self._lengths.values()) for part in PARTS}
        edges = _edges(int(together["whole"].max()))
        figures = {
            "rows": self._rows,
            "lengths": {
                part: {"percentiles": _percentiles(lengths), "histogram": _histogram(lengths, edges)}
                for part, lengths in together.items()
                if len(lengths)
            },
            "by_source": {
                source: {part: _percentiles(_together([lengths[part]])) for part in PARTS if lengths[part]}
                for source, lengths in self._lengths.items()
            },
            "stay": {
                str(limit): int((together["whole"] <= limit).sum())
                for limit in limits_around(together["whole"], self._policy.max_length)
            },
            "policy": {
                "max_length": self._policy.max_length,
                "overlong": self._policy.overlong,
                "outcomes": dict(self._outcomes),
            },
            "replies": {
                "chosen_mean": _mean(together["chosen"]),
                "rejected_mean": _mean(together["rejected"]),
            },
            "bytes_per_token": self._bytes.total() / max(self._reply_tokens.total(), 1),
            "bytes_by_source": {s: self._bytes[s] / max(self._reply_tokens[s], 1) for s in self._lengths},
            "unknown_share": self._unknown_tokens / self._tokens,
            "special_tokens": self._scan.counts(),
        }
        return Result(tuple(self._findings(figures)), figures)

    def _findings(self, figures: dict[str, Any]) -> Iterable[Finding]:
        for name, fault in self._faults.items():
            count = len(fault.places)
            if not count:
                continue
            cuts = name == "overlong" and self._policy.overlong != "drop"
            said, advice = _WORDS["overlong_although_cut" if cuts else name]
            sentence = (
                f"{count:,} of {self._rows:,} rows ({share_in_words(count, self._rows)}) "
                f"{said.format(max_length=self._policy.max_length)}"
            )
            if name in ("control_tokens_in_text", "added_tokens_in_text"):
                sentence += f": {_tokens_in_words(figures['special_tokens'], name.startswith('control'))}"
            if name == "unknown_tokens":
                sentence += f": {figures['unknown_share']:.2%} of all tokens"
            severity = _severity(name, fault, count / self._rows)
            yield fault.finding(name, severity, self._rows, f"{sentence}.", advice)
        for source, each in figures["bytes_by_source"].items():
            if self._reply_tokens[source] and each < _LEAST_BYTES:
                rows = len(self._lengths[source]["whole"])
                yield Finding(
                    "unfitting_tokenizer",
                    "warning",
                    rows,
                    self._rows,
                    f"{source}: a token stands for {each:.2f} bytes of its replies; prose in a language that "
                    "the vocabulary knows takes 3 to 5.",
                    "Sequences are long and the model may hardly know the language: use a model made for it.",
                )


class _TextScan:
    """Finds the tokenizer's added tokens in texts, where it reads them as such, and counts the rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        known = {str(t): bool(t.special) for t in tokenizer.added_tokens_decoder.values()}
        self._special = {**known, **dict.fromkeys(tokenizer.all_special_tokens, True)}
        longest_first = sorted((token for token in self._special if token.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._counts: dict[str, Counter[int]] = {}

    def found(self, text: str, side: int) -> list[tuple[str, bool]]:
        """(token, whether it is a special one) of each in the text, once; but for what opens and closes a
        text, which encoding expects: BOS before a prompt, EOS after a reply."""
        if self._pattern is None or self._pattern.search(text) is None:
            return []
        text = self._bare(text, side)
        ids = set(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        tokens = {match.group() for match in self._pattern.finditer(text)}
        read = [token for token in sorted(tokens) if self._tokenizer.convert_tokens_to_ids(token) in ids]
        for token in read:
            self._counts.setdefault(token, Counter())[side] += 1
        return [(token, self._special[token]) for token in read]

    def _bare(self, text: str, side: int) -> str:
        bos, eos = self._tokenizer.bos_token, str(self._tokenizer.eos_token)
        if side == PROMPT:
            return text.removeprefix(str(bos)) if bos else text
        while (bare := text.rstrip()).endswith(eos):
            text = bare[: -len(eos)]
        return text

    def counts(self) -> list[dict[str, Any]]:
        """By token the texts that it stands in, the most frequent first."""
        return [
            {
                "token": token,
                "special": self._special[token],
                "prompt": sides[PROMPT],
                "chosen": sides[PREFERRED],
                "rejected": sides[OTHER],
            }
            for token, sides in sorted(self._counts.items(), key=lambda item: -item[1].total())
        ]


def limits_around(lengths: npt.NDArray[np.int64], max_length: int | None) -> list[int]:
    """Limits worth a thought: powers of two from the median to what keeps all, and the one that is set."""
    median, longest = int(np.median(lengths)), int(lengths.max())
    powers = range(max(median.bit_length() - 1, 0), (longest - 1).bit_length() + 1)
    limits = {2**power for power in powers}
    if max_length is not None and max_length <= 2 * max(limits):
        limits.add(max_length)
    return sorted(limits)


def _severity(name: str, fault: Fault, share: float) -> Severity:
    learned = bool(fault.prompt or fault.preferred)
    if name in ("control_tokens_in_text", "empty_to_the_model"):
        return "error" if learned else "warning"
    if name in ("overlong", "cut_prompt", "prompt_too_long"):
        return "warning" if share >= _MANY_OVERLONG else "note"
    if name in ("cut_completion", "identical_after_tokenisation", "empty_prompt", "unknown_tokens"):
        return "warning"
    return "note"


def _tokens_in_words(counts: list[dict[str, Any]], special: bool) -> str:
    parts = []
    for each in [each for each in counts if each["special"] == special][:5]:
        sides = ", ".join(f"{side} {each[side]:,}" for side in ("prompt", "chosen", "rejected") if each[side])
        parts.append(f"{each['token']} ({sides})")
    return "; ".join(parts)


def _together(parts: Iterable[array[int]]) -> npt.NDArray[np.int64]:
    return np.concatenate(
        [np.frombuffer(part, np.int64) if part else np.empty(0, np.int64) for part in parts]
    )


def _mean(lengths: npt.NDArray[np.int64]) -> float | None:
    return float(lengths.mean()) if len(lengths) else None


def _percentiles(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    found = {str(p): int(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return {**found, "max": int(lengths.max())}


def _edges(longest: int) -> npt.NDArray[np.int64]:
    """Whole numbers from 0 to one beyond the longest, as nearly in geometric progression as they can be."""
    steps = np.ceil(np.geomspace(1, longest + 1, _BINS)).astype(np.int64)
    return np.unique(np.concatenate([[0], steps]))


def _histogram(lengths: npt.NDArray[np.int64], edges: npt.NDArray[np.int64]) -> dict[str, list[int]]:
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}
