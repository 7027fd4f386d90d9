"""Log-probs of given tokens from hidden states, without a matrix of all logits.

    token_logprobs(hidden, weight, targets) == log_softmax(hidden @ weight.T, -1)[range(N), targets]

`naive` is that line and the truth; `chunked` is the same function at bounded memory on any device; `fused`
is it on CUDA, with `kernels` written in Triton, and is imported only where it is used. `divergence` is the
same for policy and reference at once, with the KL divergence of their whole distributions. `head` is what
those in plain PyTorch share.
This package knows no loss and no model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpo_kit.logprob.chunked import chunked_token_logprobs
from dpo_kit.logprob.divergence import token_logprobs_and_kl
from dpo_kit.logprob.head import EXTRAS, HeadInputs, check
from dpo_kit.logprob.naive import naive_token_kl, naive_token_logprobs

__all__ = [
    "EXTRAS",
    "HeadInputs",
    "chunked_token_logprobs",
    "naive_token_kl",
    "naive_token_logprobs",
    "token_logprobs",
    "token_logprobs_and_kl",
]

_IMPLEMENTATIONS = ("naive", "chunked", "fused")


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    extras: Sequence[str] = (),
    impl: str = "auto",
) -> Any:
    """Log-probs of `targets` under the softmax of a linear head.

    The logits are `z = scale * (hidden @ weight.T + bias)`, and `softcap * tanh(z / softcap)` where
    a soft cap is given (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        hidden: [N, H] hidden states, floating point; N may be 0.
        weight: [V, H] the head's matrix.
        targets: [N] token ids, integer, 0 <= id < V.
        bias: [V] or None.
        softcap: positive, or None.
        scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        extras: statistics of each distribution to return beside the log-probs, without gradient, in the
            same pass: "entropy" (nats); "squared_probs", the sum of p^2 over the vocabulary; "top1", 1 where
            no token is likelier than the target (a tie counts), else 0. Any of EXTRAS, in any order.
        impl: "naive", "chunked", "fused", or "auto", which picks the fastest for the device: "fused" on
            CUDA where Triton is installed, "chunked" elsewhere.

    Returns:
        [N] log-probs in nats, fp32 (fp64 for fp64 input); with `extras` also a dict of [N] tensors.
        Gradients flow to hidden, weight and bias, and are computed only for those that ask.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary (on an accelerator the device's
            own error, or NaN from "fused"), unknown extras or impl, "fused" without CUDA or Triton.
    """
    check(HeadInputs(hidden, weight, bias, softcap, scale), targets, extras)
    if impl == "auto":
        impl = "fused" if hidden.device.type == "cuda" and _has_triton() else "chunked"
    logps, statistics = _implementation(impl)(
        hidden, weight, targets, bias=bias, softcap=softcap, scale=scale, extras=tuple(extras)
    )
    return (logps, statistics) if extras else logps


def _implementation(name: str) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    if name == "naive":
        return naive_token_logprobs
    if name == "chunked":
        return chunked_token_logprobs
    if name != "fused":
        raise ValueError(f"unknown impl '{name}'; known: auto, {', '.join(_IMPLEMENTATIONS)}")
    if not _has_triton():
        raise ValueError("impl 'fused' needs triton, which is not installed; 'chunked' runs without it")
    from dpo_kit.logprob.fused import fused_token_logprobs

    return fused_token_logprobs


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
