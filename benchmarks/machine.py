"""The machine that a benchmark runs on, and how much of it other processes took meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

# More than this of a core, on average, and a time is not worth reporting without a word.
DISTURBED = 0.1


class OthersClock:
    """Measures how much other processes ran while ours did; Linux only."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores that others kept busy since the start, on average; None where it cannot be known.

        Children of ours count as ours once they have been waited for.
        """
        wall, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        return max(0.0, now - busy - (_own_seconds() - own)) / (time.perf_counter() - wall)


def _busy_seconds() -> float | None:
    """Time that all cores together were not idle since the machine started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, usable cores, memory, system, and the GPU where that is what is measured."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def machine_in_words(found: dict[str, Any]) -> str:
    """One line."""
    gpu = f"{found['gpu']}, " if "gpu" in found else ""
    return f"{gpu}{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / 1e9:.0f} GB"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
