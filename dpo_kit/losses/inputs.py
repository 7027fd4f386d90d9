"""What a loss may look at: the log-probs of some examples' replies under policy and reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpo_kit.shapes import Shape


@dataclass(frozen=True)
class LogProbs:
    """Log-probs (nats) of S replies to P prompts; those of the policy carry gradients.

    An example is a prompt with one reply (unpaired data), two (a pair: chosen and rejected) or several (a
    ranked list). The replies are ordered by their place in the example, and then by example: all first
    replies, all second ones, ... So of pairs the first P are the chosen ones and the last P the rejected
    ones, and a loss on pairs reads `chosen`, `rejected`, `chosen_logratios` and `rejected_logratios`.

    Attributes:
        policy: [S] summed log-prob of each reply under the policy; None for a reward model.
        example: [S] the example, 0 to P - 1, that each reply belongs to, int64.
        num_examples: P.
        shape: "pairs", "unpaired" (one reply each, be it that a loss looks at no rejected one) or "lists".
        reference: [S] under the reference; None without a reference.
        lengths: [S] tokens of each reply, int64.
        scores: [S] how good the data says a reply is, against the others of its example; of a pair 1 and
            0, of unpaired data 1 (desirable) or 0.
        margins: [P] score difference of the data (chosen minus rejected), 0 where it has none.
        token_logps: [M] log-prob of every reply's tokens under the policy.
        token_sequence: [M] the reply that each token belongs to, ascending.
        reference_token_logps: [M] under the reference, for losses registered with `reference_tokens`.
        token_extras: [M] by name, what the loss is registered with as `extras`; see
            `dpo_kit.logprob.token_logprobs`. "reference_kl", KL(reference || policy) of a token's
            distribution in nats, carries gradients; the others don't.
        rewards: [S] what a reward model's value head says of each reply.
        mismatched: [K] log-ratios of replies to other prompts, for losses registered with `mismatched`; no
            gradient.
        running: [] the running mean that the loss registered, this batch included; no gradient.
    """

    policy: Tensor | None
    example: Tensor
    num_examples: int
    shape: Shape
    reference: Tensor | None = None
    lengths: Tensor | None = None
    scores: Tensor | None = None
    margins: Tensor | None = None
    token_logps: Tensor | None = None
    token_sequence: Tensor | None = None
    reference_token_logps: Tensor | None = None
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
    mismatched: Tensor | None = None
    running: Tensor | None = None

    def detached(self, device: torch.device | str | None = None) -> LogProbs:
        """The same values without their graph, where a device is named there."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: moved(inner) for name, inner in value.items()}
            if not isinstance(value, Tensor):
                return value
            return value.detach() if device is None else value.detach().to(device)

        return LogProbs(**{name: moved(value) for name, value in vars(self).items()})

    @classmethod
    def of_pairs(
        cls,
        chosen: Tensor,
        rejected: Tensor | None = None,
        reference_chosen: Tensor | None = None,
        reference_rejected: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        **others: Any,
    ) -> LogProbs:
        """Of P pairs, from their [P] halves; without rejected replies where there are none."""
        pairs, sides = len(chosen), 1 if rejected is None else 2
        return cls(
            policy=_joined(chosen, rejected),
            example=torch.arange(pairs, device=chosen.device).repeat(sides),
            num_examples=pairs,
            shape="unpaired" if rejected is None else "pairs",
            reference=_joined(reference_chosen, reference_rejected),
            lengths=_joined(chosen_lengths, rejected_lengths),
            scores=torch.tensor([1.0, 0.0][:sides], device=chosen.device).repeat_interleave(pairs),
            **others,
        )

    def need(self, name: str) -> Tensor:
        """A field that the loss cannot do without.

        Raises:
            ValueError: it is None; the message names it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs `{name}`, which is None")
        return value

    def extra(self, name: str) -> Tensor:
        """[M] of `token_extras`; raises ValueError where the loss is not registered with it."""
        if name not in self.token_extras:
            raise ValueError(f"this loss needs the extra '{name}': register it with extras=('{name}',)")
        return self.token_extras[name]

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[S] of pairs -> [P] of the chosen and [P] of the rejected replies.

        Raises:
            ValueError: these are not pairs.
        """
        if self.shape != "pairs":
            raise ValueError(f"this loss needs pairs, and its data are {self.shape}")
        return values[: self.num_examples], values[self.num_examples :]

    @property
    def chosen(self) -> Tensor:
        """[P] of the chosen (first) replies under the policy."""
        return self.need("policy")[: self.num_examples]

    @property
    def rejected(self) -> Tensor:
        """[P] likewise, rejected."""
        return self.halves(self.need("policy"))[1]

    @property
    def reference_chosen(self) -> Tensor:
        """[P] of the chosen (first) replies under the reference."""
        return self.need("reference")[: self.num_examples]

    @property
    def reference_rejected(self) -> Tensor:
        """[P] likewise, rejected."""
        return self.halves(self.need("reference"))[1]

    @property
    def chosen_lengths(self) -> Tensor:
        """[P] tokens of the chosen (first) replies."""
        return self.need("lengths")[: self.num_examples]

    @property
    def rejected_lengths(self) -> Tensor:
        """[P] likewise, rejected."""
        return self.halves(self.need("lengths"))[1]

    @property
    def logratios(self) -> Tensor:
        """[S] log pi(reply) - log pi_ref(reply)."""
        return self.need("policy") - self.need("reference")

    @property
    def chosen_logratios(self) -> Tensor:
        """[P] log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """[P] log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected - self.reference_rejected

    @property
    def labels(self) -> Tensor:
        """[S] whether a reply is desirable; of pairs the chosen ones are."""
        return self.need("scores") > 0

    @property
    def token_places(self) -> Tensor:
        """[M] place of each token in its reply, from 0."""
        lengths = self.need("lengths")
        first = lengths.cumsum(0) - lengths
        sequence = self.need("token_sequence")
        return torch.arange(len(sequence), device=sequence.device) - first[sequence]

    def sum_per_reply(self, values: Tensor) -> Tensor:
        """[M] values per token -> their [S] sums over each reply."""
        return values.new_zeros(len(self.example)).index_add(0, self.need("token_sequence"), values)

    def sum_per_sequence(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[M] values per token of pairs -> their [P] sums over each chosen and each rejected reply."""
        return self.halves(self.sum_per_reply(values))

    def mean_per_example(self, values: Tensor) -> Tensor:
        """[S] values per reply -> their [P] means over each example's replies."""
        sums = values.new_zeros(self.num_examples).index_add(0, self.example, values)
        return sums / self.example.bincount(minlength=self.num_examples)


def _joined(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    parts = [part for part in (chosen, rejected) if part is not None]
    return torch.cat(parts) if parts else None


# Fields with one value per reply and per token; `margins` and `mismatched` are simply joined.
_PER_REPLY = ("policy", "reference", "lengths", "scores", "rewards")
_PER_TOKEN = ("token_logps", "reference_token_logps")


def concatenate(parts: Sequence[LogProbs]) -> LogProbs:
    """Several micro-batches' log-probs as those of one: examples one after the other, replies reordered.

    Whatever gradients the parts carry are kept.
    """
    if len(parts) == 1:
        return parts[0]
    slots, examples, sequences = [], [], []
    examples_before = replies_before = 0
    for part in parts:
        new_slot = part.example.diff(prepend=part.example[:1] - 1) <= 0
        slots.append(new_slot.cumsum(0))
        examples.append(part.example + examples_before)
        if part.token_sequence is not None:
            sequences.append(part.token_sequence + replies_before)
        examples_before += part.num_examples
        replies_before += len(part.example)
    order = torch.cat(slots).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    found: dict[str, object] = {"example": torch.cat(examples)[order], "num_examples": examples_before}
    found |= {name: joined[order] for name in _PER_REPLY if (joined := _cat(parts, name)) is not None}
    if sequences:
        sequence = place[torch.cat(sequences)]
        token_order = sequence.argsort(stable=True)
        found["token_sequence"] = sequence[token_order]
        found |= {n: joined[token_order] for n in _PER_TOKEN if (joined := _cat(parts, n)) is not None}
        found["token_extras"] = {
            name: torch.cat([part.token_extras[name] for part in parts])[token_order]
            for name in parts[0].token_extras
        }
    for name in ("margins", "mismatched"):
        found[name] = _cat(parts, name)
    return replace(parts[0], **found)  # type: ignore[arg-type]


def _cat(parts: Sequence[LogProbs], name: str) -> Tensor | None:
    values = [getattr(part, name) for part in parts]
    return None if values[0] is None else torch.cat(values)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012, equation 7); -inf at 0."""
    near_zero = x > -0.6931471805599453
    # Each branch gets a harmless argument where the other is taken, or its gradient would be NaN.
    small = torch.where(near_zero, x, -1.0)
    large = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
