"""The processor's memory allocator, told not to hand back what the next step needs again."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# From glibc's malloc.h: parameters of mallopt and their defaults.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 2**10, _TOP_PAD: 128 * 2**10, _MMAP_MAX: 65536}


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within: memory that tensors free stays with the process; after: it goes back to the system.

    glibc gives every large block back when it is freed, and the system fills it with zeros before it
    gives it out again: at a step's size that is 10% to 15% of the time on a CPU. Does nothing with other
    C libraries. It holds for the whole process; after it glibc's own settings hold, but for its threshold of
    large blocks, which no longer moves, and what the environment had set.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for parameter, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
