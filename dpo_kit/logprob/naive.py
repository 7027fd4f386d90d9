"""The definition, in one line of plain PyTorch; what every other implementation is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXTRAS = ("entropy",)


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
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.log_softmax(-1)
    statistics = {}
    if "entropy" in extras:
        statistics["entropy"] = -(logps.exp() * logps).sum(-1).detach()
    return logps.gather(1, targets[:, None]).squeeze(1), statistics
