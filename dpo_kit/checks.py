"""What a training run stops at: losses that are not finite, a reference that is not the policy at step 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kit.errors import DivergedError, TrainingError
from dpo_kit.losses import LogProbs

STOPPED = (
    "The weights are those of the step before and the newest checkpoint is kept. "
    "A smaller learning rate, more warm-up or fp32 may mend it."
)


def check_finite(sources: Sequence[str], losses: Tensor, when: str) -> None:
    """Stop on losses that are not finite; waits for the device once.

    Args:
        sources: where each pair comes from, for the message.
        losses: [P] of the pairs.
        when: stands in the message.

    Raises:
        DivergedError: naming up to five of the pairs.
    """
    finite = torch.isfinite(losses)
    if bool(finite.all()):
        return
    bad = [sources[i] or f"pair {i}" for i in (~finite).nonzero().flatten().tolist()]
    named = ", ".join(bad[:5])
    raise DivergedError(
        f"the loss is not finite {when}, on {len(bad)} of {len(losses)} pairs: {named}. {STOPPED}"
    )


def check_step_zero(
    logps: LogProbs, sources: Sequence[str], allowed: float, *, independent: bool = False
) -> None:
    """Stop where a reference that has the policy's weights does not give the policy's log-probs.

    Args:
        logps: of a micro-batch before the first step.
        sources: where each pair comes from, for the message.
        allowed: relative difference of a sequence's log-prob.
        independent: whether each token was rounded by itself; then that is for one token, and falls with the
            root of their number.

    Raises:
        TrainingError: with both numbers.
    """
    policy, reference = logps.need("policy"), logps.need("reference")
    difference = (policy - reference).abs() / reference.abs().clamp(min=1)
    if independent:
        difference = difference * logps.need("lengths").sqrt()
    worst = int(difference.argmax())
    if difference[worst] > allowed:
        place = sources[int(logps.example[worst])] or "a pair"
        raise TrainingError(
            f"at step 0 the policy must be the reference, but on {place} its log-prob is "
            f"{policy[worst].item():.6g} and "
            f"the reference's {reference[worst].item():.6g}"
        )
