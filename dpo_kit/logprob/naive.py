"""The definitions, in plain PyTorch; what every other implementation is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.logprob.head import HeadInputs


def naive_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    extras: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `dpo_kit.logprob.token_logprobs`; holds all N x V logits."""
    logits = _logits(HeadInputs(hidden, weight, bias, softcap, scale))
    logps = logits.log_softmax(-1)
    return logps.gather(1, targets[:, None]).squeeze(1), {
        name: _extra(name, logits.detach(), logps.detach(), targets) for name in extras
    }


def naive_token_kl(policy: HeadInputs, reference: HeadInputs) -> Tensor:
    """[N] KL(reference || policy) in nats, gradient to the policy's tensors alone; logits must be finite.

    See `dpo_kit.logprob.token_logprobs_and_kl`; holds all N x V logits of both.
    """
    logps = _logits(policy).log_softmax(-1)
    reference_logps = _logits(reference).log_softmax(-1).detach()
    return (reference_logps.exp() * (reference_logps - logps)).sum(-1)


def _logits(head: HeadInputs) -> Tensor:
    """[N, V] in fp32, or fp64."""
    logits = F.linear(head.hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _extra(name: str, logits: Tensor, logps: Tensor, targets: Tensor) -> Tensor:
    if name == "entropy":
        return -(logps.exp() * logps).sum(-1)
    if name == "squared_probs":
        return (2 * logps).exp().sum(-1)
    if name == "top1":
        return (logits.gather(1, targets[:, None]).squeeze(1) == logits.amax(-1)).to(logps.dtype)
    raise ValueError(f"no definition of '{name}'")
