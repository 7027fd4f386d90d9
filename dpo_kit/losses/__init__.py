"""Objectives on preference data: pure functions on log-probs, in families, found by name.

A loss takes `LogProbs` and keyword hyper-parameters and gives one value per example (per reply, where it
learns from labelled replies). Adding one is a function with `@register_loss`; trainer, command line and
recipes know no loss by name.
"""

from dpo_kit.losses import (  # noqa: F401
    anchored,
    batchwise,
    divergences,
    offsets,
    ranked,
    reference_free,
    regression,
    reward,
    surrogates,
    tokens,
    unpaired,
)
from dpo_kit.losses.inputs import LogProbs, concatenate
from dpo_kit.losses.likelihood import log_ratio, sft, unlikelihood
from dpo_kit.losses.logistic import dpo
from dpo_kit.losses.objective import Objective, make_objective
from dpo_kit.losses.registry import LossSpec, get_loss, loss_names, register_loss

__all__ = [
    "LogProbs",
    "LossSpec",
    "Objective",
    "concatenate",
    "dpo",
    "get_loss",
    "log_ratio",
    "loss_names",
    "make_objective",
    "register_loss",
    "sft",
    "unlikelihood",
]
