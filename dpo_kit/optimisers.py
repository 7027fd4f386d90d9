"""Optimisers by name (`train.optim`): whether the one that is asked for runs here is found before training.

transformers knows the names and makes the optimiser. Those with states of 8 bits, and the paged ones, are
bitsandbytes'; what they need, and where they run, changes from release to release: so one is tried.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from dpo_kit.errors import InputError

_NEED_LIBRARIES = ("8bit", "4bit", "paged", "bnb")
# bitsandbytes keeps fewer numbers than this in 32 bits.
_NUMBERS = 8192


def check_optimiser(args: TrainingArguments) -> None:
    """Refuse an optimiser that is not installed, or that fails on the run's device; one small step tells.

    An optimiser of torch's own is taken as it is.

    Raises:
        InputError: with what it said.
    """
    name = str(OptimizerNames(args.optim).value)
    if not any(part in name for part in _NEED_LIBRARIES):
        return
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        _try(kind, settings, args.device)
    # Whatever it is: a run that fails at its first step fails later and says less.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"'{name}' does not run here on {args.device.type}: {reason}",
            field="train.optim",
            mend="Take adamw_torch, or install what it needs; 8-bit and paged ones are in bitsandbytes "
            "(pip install dpo-kit[quantisation]).",
        ) from error


def _try(kind: Any, settings: dict[str, Any], device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.ones(_NUMBERS, device=device))
    parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        # On a processor paged ones are not paged; the run itself says so.
        warnings.simplefilter("ignore")
        kind([parameter], **settings).step()
    if not bool(torch.isfinite(parameter).all()):
        raise ValueError("a step on ones gave numbers that are not finite")
