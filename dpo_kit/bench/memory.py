"""What training holds in memory, and how much larger a micro-batch may be."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kit.capacity import free_bytes
from dpo_kit.examples import Example
from dpo_kit.host_memory import release_freed_memory
from dpo_kit.packing import cut_step
from dpo_kit.run_folder import peak_memory_bytes
from dpo_kit.trainer import PreferenceTrainer

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of the memory that is free, this share is left to others.
_SPARE = 0.1
# Less than this between two micro-batches cannot be told from noise.
_MEASURABLE_BYTES = 4 * 2**20


class MemoryMeter:
    """Memory of a device: allocated on CUDA, else resident in this process.

    Attributes:
        kind: "allocated" or "resident".
        can_reset: whether a peak can be measured from a moment on; if not, it is that of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self.kind = "allocated" if self._cuda else "resident"
        self.can_reset = self.reset_peak()

    def release(self) -> None:
        """Give back what was freed, so that it is not counted as held."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
        else:
            release_freed_memory()

    def now(self) -> int:
        """Bytes held now."""
        if self._cuda:
            return int(torch.cuda.memory_allocated(self._device))
        return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak(self) -> bool:
        """Forget the peak so far; False where the system has no way to."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            # proc(5): 5 resets the peak resident size to the present one.
            _CLEAR.write_text("5")
        except OSError:
            return False
        return _status("VmHWM") is not None

    def peak(self) -> int:
        """Most bytes held since the last reset, or since the process began."""
        return (None if self._cuda else _status("VmHWM")) or peak_memory_bytes(self._device)

    def available(self) -> int | None:
        """Bytes that could still be taken; None where the system does not say."""
        if self._cuda:
            return free_bytes(self._device)
        known = [x for x in (_field(Path("/proc/meminfo"), "MemAvailable"), _group_room()) if x is not None]
        return min(known, default=None)


def _status(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(path: Path, name: str) -> int | None:
    """Bytes of a line `name: N kB`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _group_room() -> int | None:
    """What the control group (a container) leaves; its files in memory can be dropped."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each one once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if (s := t.untyped_storage()).nbytes()}
    return sum(storages.values())


def _tensors(model: torch.nn.Module | None) -> list[Tensor]:
    return [] if model is None else [*model.parameters(), *model.buffers()]


def memory_parts(
    trainer: PreferenceTrainer, peak: int, gradients: int, before: int, kind: str
) -> dict[str, int]:
    """What the peak is made of, in bytes; the parts make up the whole.

    Weights, reference, gradients and optimiser state are counted from their tensors. "libraries" is what
    the process held before the model was loaded (0 on CUDA); memory that was freed and used again since
    then counts for what it is used for. "rest" is what remains: activations, the head's logits, data.

    Args:
        trainer: after its steps.
        peak: most memory held.
        gradients: bytes of the gradients.
        before: memory held before the model was loaded.
        kind: as `MemoryMeter.kind`.
    """
    policy, reference = _tensors(trainer.model), _tensors(trainer.reference.model)
    states: Any = trainer.optimizer.state.values()  # type: ignore[union-attr]
    state = [value for each in states for value in each.values() if isinstance(value, Tensor)]
    weights = bytes_of(policy)
    parts = {
        "weights": weights,
        "reference": bytes_of([*policy, *reference]) - weights,
        "gradients": gradients,
        "optimiser state": bytes_of(state),
    }
    left = peak - sum(parts.values())
    parts["libraries"] = 0 if kind == "allocated" else max(0, min(before, left))
    return parts | {"rest": left - parts["libraries"]}


def what_fits(
    trainer: PreferenceTrainer, memory: MemoryMeter, steps: Sequence[Sequence[Example]]
) -> dict[str, Any]:
    """How many tokens one micro-batch may have: estimated from what two of different size take.

    Forward and backward of a micro-batch of the run and of a smaller one are measured, gradients of
    earlier ones being held, and the difference is continued in a straight line to what is free.

    Args:
        trainer: after its steps; its gradients are discarded.
        memory: of the trainer's device.
        steps: pairs of some of its steps.

    Returns:
        in_use (the budget of the run), largest_step_tokens, available_bytes, bytes_per_token and
        largest_tokens_per_micro_batch (None where unknown), and `how`, which says how it was found.
    """
    budget = trainer.args.token_budget
    cuts = [[pairs[i] for i in cut] for pairs in steps for cut in cut_step(pairs, budget, trainer.layout)]
    large = max(cuts, key=lambda pairs: _area(trainer, pairs))
    every = [pair for pairs in steps for pair in pairs]
    small = large[: len(large) // 2] or [min(every, key=lambda pair: _area(trainer, [pair]))]
    sizes = [_area(trainer, pairs) for pairs in (small, large)]
    found: dict[str, Any] = {
        "in_use": budget,
        "largest_step_tokens": max(_area(trainer, pairs) for pairs in steps),
        "available_bytes": None,
        "bytes_per_token": None,
        "largest_tokens_per_micro_batch": None,
    }
    if not memory.can_reset:
        return found | {"how": "unknown: this system does not say what a single step takes"}
    # The first run leaves the gradients that the others find.
    _, low, high = (_rise(trainer, memory, pairs) for pairs in (large, small, large))
    available = found["available_bytes"] = memory.available()
    policy: Any = trainer.model
    policy.zero_grad()
    if available is None or sizes[0] == sizes[1] or high - low < _MEASURABLE_BYTES:
        return found | {
            "how": f"unknown: {high / 2**20:.0f} MiB for {sizes[1]} tokens and {low / 2**20:.0f} MiB for "
            f"{sizes[0]} are too little to go on from"
        }
    slope = (high - low) / (sizes[1] - sizes[0])
    room = available * (1 - _SPARE) - high
    return found | {
        "bytes_per_token": slope,
        "largest_tokens_per_micro_batch": max(0, int(sizes[1] + room / slope)),
        "how": f"estimated from micro-batches of {sizes[0]} and {sizes[1]} tokens; {_SPARE:.0%} left free",
    }


def _area(trainer: PreferenceTrainer, pairs: Sequence[Example]) -> int:
    """Tokens of pairs in one micro-batch, padding included."""
    return trainer.planner.whole(pairs).input_ids.numel()


def _rise(trainer: PreferenceTrainer, memory: MemoryMeter, pairs: Sequence[Example]) -> int:
    """Bytes that forward and backward of one micro-batch take beyond what is held before."""
    planned = {"micro_batches": [trainer.planner.whole(pairs)]}
    memory.release()
    memory.reset_peak()
    before = memory.now()
    type(trainer).training_step(trainer, trainer.model_wrapped, planned)
    return memory.peak() - before
