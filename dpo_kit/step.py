"""The losses of a step and their gradient, over its micro-batches: what the trainer does with a plan.

Where every example has a loss of its own, a micro-batch is scored, its losses taken and their gradient
computed before the next one. Where a loss couples the examples of a step (`LossSpec.batch`), the whole step
is scored first, without a graph; the objective is differentiated with respect to the log-probs of all of
them, over all ranks; and each micro-batch is scored again, to take that gradient on to the weights
(the gradient cache of Gao et al., arXiv 2101.06983, section 3.2). So the cut into micro-batches and ranks
changes no number here either. It costs one more forward pass of the policy, and none where one micro-batch
holds all of the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dpo_kit.losses import LogProbs, Objective, concatenate
from dpo_kit.packing import MicroBatch
from dpo_kit.reference import AdapterOffReference, Reference
from dpo_kit.scoring import sequence_logprobs, sequence_rewards

# What of a micro-batch's log-probs carries gradients.
_DIFFERENTIABLE = ("policy", "token_logps", "rewards")
# The extra that does, and needs the reference's whole distributions.
_DIVERGENCE = "reference_kl"


@dataclass(frozen=True)
class Scorer:
    """Micro-batch -> log-probs under policy and reference.

    Attributes:
        objective: says what is needed.
        reference: where the reference's log-probs come from.
        autocast: what both are scored in; transformers casts the prepared policy alone.
        metrics: further extras that are wanted of the policy's token distributions.
    """

    objective: Objective
    reference: Reference
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    metrics: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, batch: MicroBatch, *, again: bool = False) -> LogProbs:
        """Log-probs of a micro-batch on the model's device; the policy's with gradients in grad mode.

        Args:
            model: the policy.
            batch: on its device.
            again: what carries gradients alone; the rest is known from the first time.
        """
        common: dict[str, Any] = {
            "example": batch.sequence_example,
            "num_examples": batch.num_pairs,
            "shape": batch.shape,
            "lengths": batch.lengths,
            "scores": batch.scores,
            "margins": batch.margins,
        }
        with self.autocast():
            if self.objective.needs_rewards:
                return LogProbs(policy=None, rewards=sequence_rewards(model, batch), **common)
            # The reference first, while the policy's activations do not take the memory yet.
            distributions = self.objective.needs_distributions
            inputs = self.reference.head_inputs(batch) if distributions else None
            known = None if distributions or again else self.reference.logprobs(batch)
            extras = set() if again else {*self.objective.extras, *self.metrics} - {_DIVERGENCE}
            policy = sequence_logprobs(model, batch, extras=sorted(extras), reference=inputs)
        sequences = policy.reference_sequences if known is None else known.sequences
        tokens = policy.reference_entries if known is None else known.entries
        return LogProbs(
            policy=policy.sequences,
            reference=sequences,
            token_logps=policy.entries,
            token_sequence=batch.entry_sequence,
            reference_token_logps=tokens if self.objective.needs_reference_tokens else None,
            token_extras=policy.extras,
            **common,
        )

    def nothing(self, model: nn.Module, filler: MicroBatch) -> Tensor:
        """[] 0, by the passes through the policy that a micro-batch makes, and with their graph.

        So a rank that has no more micro-batches takes part in what the ranks do together.
        """
        with self.autocast():
            if self.objective.needs_rewards:
                return 0.0 * sequence_rewards(model, filler).sum()
            if self.objective.needs_distributions:
                self.reference.head_inputs(filler)
            elif isinstance(self.reference, AdapterOffReference):
                self.reference.logprobs(filler)
            return 0.0 * sequence_logprobs(model, filler).sequences.sum()

    @torch.no_grad()
    def logratios(
        self, model: nn.Module, batches: Sequence[MicroBatch], device: torch.device
    ) -> Tensor | None:
        """[K] log pi - log pi_ref of all sequences of some micro-batches; None of none."""
        found = []
        for planned in batches:
            batch = planned.to(device)
            with self.autocast():
                known = self.reference.logprobs(batch)
                assert known is not None
                found.append(sequence_logprobs(model, batch).sequences - known.sequences)
        return torch.cat(found) if found else None


@dataclass(frozen=True)
class Totals:
    """What the ranks know of a step that is before them.

    Attributes:
        divisor: [] what this rank's weighted sum of losses is divided by. Gradients are averaged over ranks;
            with it the average is the mean over all ranks' examples.
        micro_batches: of the rank that has most.
        mismatched: likewise, of replies to other prompts.
        sharded: whether every pass through the model is one of all ranks together.
        signal: the largest number that a rank had to tell.
    """

    divisor: Tensor
    micro_batches: int
    mismatched: int
    sharded: bool
    signal: int

    @classmethod
    def of(
        cls, inputs: dict[str, Any], accelerator: Accelerator, ranks: int, *, sharded: bool, signal: int = 0
    ) -> Totals:
        """Of what `dpo_kit.planning.Planner` made of this rank's rows, and the other ranks of theirs."""
        batches, strangers = inputs["micro_batches"], inputs.get("mismatched", [])
        weight = float(weights_of(batches).sum())
        found = torch.tensor([[weight, len(batches), len(strangers), signal]])
        if ranks > 1:
            found = accelerator.gather(found.to(accelerator.device))
        total = (found[:, 0].sum() / ranks).to(accelerator.device)
        most, most_strangers, told = (int(count) for count in found[:, 1:].amax(0).tolist())
        return cls(_divisor(total), most, most_strangers, sharded, told)

    def fillers(self, own: int, most: int) -> int:
        """How many passes without examples a rank makes that has `own` micro-batches."""
        if self.sharded:
            return most - own
        return int(own == 0 and most > 0)


def _divisor(weight: Tensor) -> Tensor:
    """What a weighted mean divides by; 1 where every weight is 0, and so is the loss."""
    return torch.where(weight > 0, weight, torch.ones_like(weight))


class CoupledStep:
    """The losses of a step whose examples are coupled.

    Args:
        objective: what is trained.
        parts: log-probs of this rank's micro-batches; with their graph, or as leaves. None where it has none.
        weights: [P] of this rank's examples.
        mismatched: [K] this rank's log-ratios of replies to other prompts, where the objective asks for them.
        running: of the objective's means, before this step.
        ranks: processes whose examples are coupled.
        nothing: [] 0 with the graph of a pass without examples, on a rank that has none.

    Attributes:
        logps: of this rank's examples, in the order of its micro-batches; None where it has none.
        losses: [P] of them.
        weights: [P] of them.
        running: of the objective's means, this step taken in.
    """

    def __init__(
        self,
        objective: Objective,
        parts: Sequence[LogProbs],
        weights: Tensor,
        mismatched: Tensor | None = None,
        running: Sequence[float | None] = (),
        ranks: int = 1,
        nothing: Tensor | None = None,
    ) -> None:
        self._parts, self.weights, self.nothing = list(parts), weights, nothing
        self.logps = concatenate(self._parts) if self._parts else None
        own = None if self.logps is None else _Shared(self.logps, weights, mismatched)
        everyone, rank = [own], 0
        if ranks > 1:
            rank = torch.distributed.get_rank()
            everyone = gather_object([None if own is None else own.to("cpu")])
            everyone = [None if one is None else one.to(weights.device) for one in everyone]
            # What was sent has no graph.
            everyone[rank] = own
        shared = [one for one in everyone if one is not None]
        whole = concatenate([one.logps for one in shared])
        if strangers := [one.mismatched for one in shared if one.mismatched is not None]:
            whole = replace(whole, mismatched=torch.cat(strangers))
        self.running = objective.averaged(whole, running)
        losses = objective(whole, self.running)
        first = sum(len(one.weights) for one in everyone[:rank] if one is not None)
        self.losses = losses[first : first + len(weights)]
        self._total = (losses * torch.cat([one.weights for one in shared])).sum()

    @property
    def is_cut(self) -> bool:
        """Whether its log-probs are leaves, so that their gradients must be carried on."""
        return all(value.is_leaf for part in self._parts for _, value in _fields(part))

    def loss(self, divisor: Tensor) -> Tensor:
        """[] all ranks' weighted sum of losses over a divisor; its graph holds this rank's log-probs."""
        return self._total / divisor

    def gradients(self, divisor: Tensor) -> list[dict[str, Tensor]]:
        """Of `loss` with respect to the differentiable fields of each of this rank's parts."""
        fields = [(i, name, value) for i, part in enumerate(self._parts) for name, value in _fields(part)]
        if not fields:
            return []
        values = torch.autograd.grad(self.loss(divisor), [leaf for _, _, leaf in fields], allow_unused=True)
        found: list[dict[str, Tensor]] = [{} for _ in self._parts]
        for (i, name, _), value in zip(fields, values, strict=True):
            if value is not None:
                found[i][name] = value
        return found


@dataclass(frozen=True)
class _Shared:
    """What ranks tell each other of their part of a step."""

    logps: LogProbs
    weights: Tensor
    mismatched: Tensor | None

    def to(self, device: torch.device | str) -> _Shared:
        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return _Shared(self.logps.detached(device), self.weights.to(device), moved(self.mismatched))


def weights_of(batches: Sequence[MicroBatch]) -> Tensor:
    """[P] weights of a step's examples, in the order of its micro-batches."""
    return torch.cat([batch.weights for batch in batches]) if batches else torch.zeros(0)


def sources_of(batches: Sequence[MicroBatch]) -> list[str]:
    """P places in the data, likewise."""
    return [source for batch in batches for source in batch.sources]


def couple(
    scorer: Scorer,
    model: nn.Module,
    inputs: dict[str, Any],
    running: Sequence[float | None],
    totals: Totals,
    device: torch.device,
    ranks: int,
    *,
    with_graph: bool = False,
) -> CoupledStep:
    """Score a whole step and take its losses; with a graph where it is one micro-batch, or where asked for.

    Args:
        scorer: of the run.
        model: the policy.
        inputs: what `dpo_kit.planning.Planner` made of the step's rows.
        running: of the objective's means, before this step.
        totals: of the step.
        device: of the model.
        ranks: whose examples are coupled: all of them, or 1 for this one alone.
        with_graph: keep the graphs of all micro-batches.
    """
    batches, strangers = inputs["micro_batches"], inputs.get("mismatched")
    # On all ranks or on none: the wrapper's own collectives must come in one order everywhere.
    with_graph = with_graph or totals.micro_batches == 1
    keep_graph = with_graph and torch.is_grad_enabled()
    mismatched = None
    if strangers is not None:
        with torch.no_grad():
            for _ in range(totals.fillers(len(strangers), totals.mismatched)):
                scorer.nothing(model, inputs["filler"].to(device))
        mismatched = scorer.logratios(model, strangers, device)
    nothing = None
    for _ in range(totals.fillers(len(batches), totals.micro_batches)):
        with torch.set_grad_enabled(keep_graph):
            nothing = scorer.nothing(model, inputs["filler"].to(device))
    parts = []
    for planned in batches:
        with torch.set_grad_enabled(keep_graph):
            logps = scorer(model, planned.to(device))
        parts.append(logps if with_graph else as_leaves(logps))
    weights = weights_of(batches).to(device)
    nothing = nothing if with_graph else None
    return CoupledStep(scorer.objective, parts, weights, mismatched, running, ranks, nothing)


def as_leaves(logps: LogProbs) -> LogProbs:
    """The same values, cut from their graph, to be differentiated by."""
    leaves: dict[str, Any] = {name: leaf.detach().requires_grad_() for name, leaf in _fields(logps)}
    divergence = {_DIVERGENCE: leaves.pop(_DIVERGENCE)} if _DIVERGENCE in leaves else {}
    return replace(logps, **leaves, token_extras={**logps.token_extras, **divergence})


def carried_on(logps: LogProbs, gradients: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient is what `CoupledStep.gradients` found for these log-probs."""
    values = dict(_fields(logps))
    terms = [(values[name] * gradient).sum() for name, gradient in gradients.items()]
    # All of the graph takes part, for the wrappers whose hooks hang on it.
    nothing = torch.stack([0.0 * value.sum() for value in values.values()]).sum()
    return sum(terms, start=nothing)


def _fields(logps: LogProbs) -> list[tuple[str, Tensor]]:
    """What of the log-probs carries gradients, or would."""
    plain = [(name, getattr(logps, name)) for name in _DIFFERENTIABLE]
    divergence = (_DIVERGENCE, logps.token_extras.get(_DIVERGENCE))
    return [(name, value) for name, value in [*plain, divergence] if value is not None]
