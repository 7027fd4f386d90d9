"""The frozen reference: log-probs of a micro-batch's sequences under a model that is not trained.

`make_reference` picks one: a second model, the policy without its adapter or with another, a copy that
follows the policy, or values that were computed once and are read from disk.
"""

from dpo_kit.reference.cached import CachedReference
from dpo_kit.reference.choice import ReferenceMode, make_reference
from dpo_kit.reference.in_memory import (
    AdapterOffReference,
    AdapterReference,
    LiveReference,
    MovingReference,
    StartReference,
)
from dpo_kit.reference.interface import NoReference, Reference
from dpo_kit.reference.store import ModelStore, ModelSummary, ReferenceCache

__all__ = [
    "AdapterOffReference",
    "AdapterReference",
    "CachedReference",
    "LiveReference",
    "ModelStore",
    "ModelSummary",
    "MovingReference",
    "NoReference",
    "Reference",
    "ReferenceCache",
    "ReferenceMode",
    "StartReference",
    "make_reference",
]
