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
from dpo_kit.reference import Reference
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

    @torch.no_grad()
    def logratios(self, model: nn.Module, batches: Sequence[MicroBatch], device: torch.device) -> Tensor:
        """[K] log pi - log pi_ref of all sequences of some micro-batches."""
        found = []
        for planned in batches:
            batch = planned.to(device)
            with self.autocast():
                known = self.reference.logprobs(batch)
                assert known is not None
                found.append(sequence_logprobs(model, batch).sequences - known.sequences)
        return torch.cat(found)


class CoupledStep:
    """The losses of a step whose examples are coupled.

    Args:
        objective: what is trained.
        parts: log-probs of this rank's micro-batches; with their graph, or as leaves.
        weights: [P] of this rank's examples.
        mismatched: [K] this rank's log-ratios of replies to other prompts, where the objective asks for them.
        running: of the objective's means, before this step.
        ranks: processes whose examples are coupled.

    Attributes:
        logps: of this rank's examples, in the order of its micro-batches.
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
    ) -> None:
        self._parts, self.weights = list(parts), weights
        self.logps = concatenate(self._parts)
        shared = [_Shared(self.logps, weights, mismatched)]
        rank = 0
        if ranks > 1:
            rank = torch.distributed.get_rank()
            shared = [one.to(weights.device) for one in gather_object([shared[0].to("cpu")])]
            # What was sent has no graph.
            shared[rank] = _Shared(self.logps, weights, mismatched)
        whole = concatenate([one.logps for one in shared])
        if mismatched is not None:
            strangers = [one.mismatched for one in shared if one.mismatched is not None]
            whole = replace(whole, mismatched=torch.cat(strangers))
        self.running = objective.averaged(whole, running)
        losses = objective(whole, self.running)
        first = sum(len(one.weights) for one in shared[:rank])
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
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(inner) for name, inner in value.items()}
            return value.detach().to(device) if isinstance(value, Tensor) else value

        logps = LogProbs(**{name: moved(value) for name, value in vars(self.logps).items()})
        return _Shared(logps, moved(self.weights), moved(self.mismatched))


def weights_of(batches: Sequence[MicroBatch]) -> Tensor:
    """[P] weights of a step's examples, in the order of its micro-batches."""
    return torch.cat([batch.weights for batch in batches])


def sources_of(batches: Sequence[MicroBatch]) -> list[str]:
    """P places in the data, likewise."""
    return [source for batch in batches for source in batch.sources]


def couple(
    scorer: Scorer,
    model: nn.Module,
    inputs: dict[str, Any],
    running: Sequence[float | None],
    accelerator: Accelerator,
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
        accelerator: of the trainer.
        ranks: whose examples are coupled: all of them, or 1 for this one alone.
        with_graph: keep the graphs of all micro-batches.
    """
    device, batches = accelerator.device, inputs["micro_batches"]
    if not with_graph:
        most = len(batches)
        if ranks > 1:
            # On all ranks or on none: the wrapper's own collectives must come in one order everywhere.
            most = int(accelerator.gather(torch.tensor([most], device=device)).max())
        with_graph = most == 1
    strangers = inputs.get("mismatched")
    mismatched = None if strangers is None else scorer.logratios(model, strangers, device)
    parts = []
    for planned in batches:
        with torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
            logps = scorer(model, planned.to(device))
        parts.append(logps if with_graph else as_leaves(logps))
    weights = weights_of(batches).to(device)
    return CoupledStep(scorer.objective, parts, weights, mismatched, running, ranks)


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
