"""Rows as the tokenizer makes ids of them: encoded once, in batches, for all checks that need ids.

The encoder is a check itself: it finds the rows that cannot be encoded. What ids say is for `tokens` and
`cost`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dpo_kit.audit.faults import Fault
from dpo_kit.audit.findings import Example, Result
from dpo_kit.chat import dropped_parts
from dpo_kit.encoding import Ids, encode_replies, require_eos
from dpo_kit.errors import InputError
from dpo_kit.length_policy import LengthPolicy

# Fewer than training encodes at once: nothing but this is held.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as ids.

    Attributes:
        example: what it was made of.
        ids: of its prompt and of its replies, at full length.
        inexact: see `TokenizedPairs.counts`.
        kept: its ids under the length policy; None: it is left out.
        outcome: `kept`, or one of `tokenization.CUT` or `DROPPED`.
    """

    example: Example
    ids: Ids
    inexact: bool
    kept: Ids | None
    outcome: str


class Consumer(Protocol):
    """Looks at encoded rows one by one."""

    def take(self, row: Encoded) -> None: ...


class Encoder:
    """Encodes the rows of training data (not the held-out ones) and hands them to its consumers, in order.

    Figures: `{"rows": seen, "refused": rows that could not be encoded}`. Finding: `refused_by_tokenizer`, of
    the refused rows but those of which the template drops a part of a reply: `templates` has those.
    Raises `InputError` for a tokenizer without EOS; for a row never.
    """

    name = "encoding"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        policy: LengthPolicy,
        consumers: Sequence[Consumer],
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        require_eos(tokenizer)
        self._tokenizer, self._policy = tokenizer, policy
        self._consumers, self._template_kwargs = consumers, template_kwargs
        self._waiting: list[Example] = []
        self._rows = self._incomplete = 0
        self._refused, self._reasons = Fault(), Counter[str]()

    def add(self, example: Example) -> None:
        if example.held_out:
            return
        self._rows += 1
        self._waiting.append(example)
        if len(self._waiting) == _ROWS_AT_ONCE:
            self._flush()

    def result(self) -> Result:
        """To be asked for before those of the consumers: it hands them the last rows."""
        self._flush()
        refused = len(self._refused.places)
        figures = {"rows": self._rows, "refused": refused + self._incomplete}
        if not refused:
            return Result((), figures)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(3))
        finding = self._refused.finding(
            "refused_by_tokenizer",
            "error",
            self._rows,
            f"{refused:,} of {self._rows:,} rows cannot be made into token ids: {reasons}.",
            "A run stops at the first of them: change the messages to what the model's chat template "
            "accepts, or use another template.",
        )
        return Result((finding,), figures)

    def _flush(self) -> None:
        examples, self._waiting = self._waiting, []
        if not examples:
            return
        try:
            self._hand_on(examples)
        except InputError:
            for example in examples:
                try:
                    self._hand_on([example])
                except InputError as error:
                    if self._loses_of_a_reply(example):
                        self._incomplete += 1
                        continue
                    reason = _reason(example, error)
                    self._reasons[reason] += 1
                    self._refused.add(example, 0, {"reason": reason})

    def _loses_of_a_reply(self, example: Example) -> bool:
        try:
            dropped = dropped_parts(example.row, self._tokenizer, self._template_kwargs)
        except InputError:
            return False
        return any(re.split(r"[.\[]", part)[0] in example.kind.replies for part in dropped)

    def _hand_on(self, examples: list[Example]) -> None:
        rows = [example.row for example in examples]
        encoded = encode_replies(rows, self._tokenizer, self._template_kwargs)
        for example, (ids, inexact) in zip(examples, encoded, strict=True):
            kept, outcome = self._policy.apply(ids, self._tokenizer.bos_token_id)
            for consumer in self._consumers:
                consumer.take(Encoded(example, ids, inexact, kept, outcome))


def _reason(example: Example, error: InputError) -> str:
    """The error in one line, and what templates most often refuse."""
    problem = re.sub(r"\s+", " ", error.problem)[:200]
    prompt = example.row["prompt"]
    if isinstance(prompt, list):
        roles = [message["role"] for message in prompt]
        if any(role == before for role, before in zip(roles[1:], roles, strict=False)):
            problem += "; two turns of one role follow each other"
    return problem
