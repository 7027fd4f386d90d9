"""The tested matrix: what is trained, with which reference, in which layout, on which device.

A combination that is not in it is refused before training, with the reason. `tests/test_matrix.py` runs each
one that is; docs/matrix.md is written from here (`make docs`). How many processes there are is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dpo_kit.errors import InputError
from dpo_kit.fingerprint import active_adapters
from dpo_kit.models import unwrap
from dpo_kit.quantised import quantised_bits
from dpo_kit.reference import (
    AdapterOffReference,
    AdapterReference,
    CachedReference,
    MovingReference,
    NoReference,
    Reference,
    StartReference,
)

TRAININGS = {
    "full": "all weights, or those that are not frozen",
    "lora": "LoRA on a base of full precision",
    "adapter": "another adapter of peft on such a base",
    "lora_4bit": "LoRA on a 4-bit base (QLoRA)",
    "lora_8bit": "LoRA on an 8-bit base",
}
REFERENCES = {
    "none": "the loss looks at no reference",
    "cached": "computed once, kept on disk",
    "live": "a second model in memory",
    "adapter_off": "the policy without its adapter",
    "adapter": "the policy with another adapter, or with the trained one as it was at first",
    "moving": "a copy that follows the policy",
}
LAYOUTS = {"tree": "shared prefixes once", "padded": "sequences apart"}
DEVICES = {"cpu": "a processor", "cuda": "an NVIDIA GPU"}

_NO_ADAPTER = "the policy has no adapter that could be switched"
# (training, reference) -> why it is not supported; on every device and in every layout.
_UNSUPPORTED = {
    ("full", "adapter_off"): _NO_ADAPTER,
    ("full", "adapter"): _NO_ADAPTER,
}


# Subclasses before what they are made from.
_KINDS: list[tuple[type, str]] = [
    (NoReference, "none"),
    (CachedReference, "cached"),
    (MovingReference, "moving"),
    (AdapterReference, "adapter"),
    (StartReference, "adapter"),
    (AdapterOffReference, "adapter_off"),
]


@dataclass(frozen=True)
class Combination:
    """A way to train, by the keys of the tables above."""

    training: str
    reference: str
    layout: str
    device: str

    def problem(self) -> str:
        """Why it is not supported; empty where it is."""
        for name, known in _AXES.items():
            if (value := getattr(self, name)) not in known:
                return f"{name} '{value}' was not tested (known: {', '.join(known)})"
        return _UNSUPPORTED.get((self.training, self.reference), "")

    def __str__(self) -> str:
        return f"{self.training}, reference {self.reference}, {self.layout}, {self.device}"


_AXES = {"training": TRAININGS, "reference": REFERENCES, "layout": LAYOUTS, "device": DEVICES}


def combinations() -> list[Combination]:
    """All that are supported."""
    every = (
        Combination(training, reference, layout, device)
        for training in TRAININGS
        for reference in REFERENCES
        for layout in LAYOUTS
        for device in DEVICES
    )
    return [each for each in every if not each.problem()]


def training_of(policy: nn.Module) -> str:
    """How a policy is trained, as in `TRAININGS`; a base and adapter that are not there name themselves."""
    inner: Any = unwrap(policy)
    bits = quantised_bits(inner)
    kinds = {str(inner.peft_config[name].peft_type.value) for name in active_adapters(inner)}
    kind = ("lora" if kinds == {"LORA"} else "adapter") if kinds else "full"
    return kind if bits is None else f"{kind}_{bits}bit"


def reference_of(reference: Reference) -> str:
    """What a reference is, as in `REFERENCES`; one of the user's own counts as a second model."""
    return next((name for kind, name in _KINDS if isinstance(reference, kind)), "live")


def check_combination(
    policy: nn.Module, reference: Reference, layout: str, device: str, *, sharded: bool = False
) -> None:
    """Refuse what is not in the matrix.

    Args:
        policy: with its adapter.
        reference: what it is compared with.
        layout: "tree" or "padded".
        device: its type.
        sharded: whether the policy is cut into shards over the processes.

    Raises:
        InputError: with the combination and the reason.
    """
    asked = Combination(training_of(policy), reference_of(reference), layout, device)
    problem = asked.problem()
    if not problem and sharded and quantised_bits(policy):
        problem = "quantised weights are not cut into shards"
    if problem:
        raise InputError(
            f"{problem}; asked for: {asked}",
            field="model",
            mend="docs/matrix.md has the combinations that were tested.",
        )


def markdown() -> str:
    """The matrix as a table: a row is what is trained, a column the reference."""
    names = list(REFERENCES)
    lines = [f"| trained | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for training, about in TRAININGS.items():
        cells = ["no" if (training, reference) in _UNSUPPORTED else "yes" for reference in names]
        lines.append(f"| `{training}`: {about} | {' | '.join(cells)} |")
    return "\n".join(lines)
