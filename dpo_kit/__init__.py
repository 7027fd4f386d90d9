"""dpo_kit: offline preference optimisation, DPO first.

The public names are imported when they are first used, so that `import dpo_kit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "PreferenceConfig": "dpo_kit.config",
    "PreferenceTrainer": "dpo_kit.trainer",
    "Recipe": "dpo_kit.recipe",
    "ReferenceCache": "dpo_kit.reference",
    "inspect_pairs": "dpo_kit.audit",
    "load_pairs": "dpo_kit.pairs",
    "losses": "dpo_kit",
    "register_loss": "dpo_kit.losses",
    "sequence_logprobs": "dpo_kit.scoring",
    "token_logprobs": "dpo_kit.logprob",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dpo_kit' has no attribute '{name}'")
    if name == "losses":
        return importlib.import_module("dpo_kit.losses")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
