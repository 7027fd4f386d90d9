"""How fast this machine multiplies matrices: the limit that the benchmark compares with."""

from __future__ import annotations

import time
from statistics import median

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shapes_in_use(hidden: int, intermediate: int, vocabulary: int) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of a large square product, of the body's large ones and of the head's."""
    return [
        (1536, 1536, 1536),
        (4096, hidden, intermediate),
        (4096, intermediate, hidden),
        (512, hidden, vocabulary),
    ]


def matmul_rates(dtype: str, shapes: list[tuple[int, int, int]], seconds: float = 0.3) -> dict[str, float]:
    """Rate of x @ w.T for each shape: "rows x inner x columns" -> flop/s, the median of several products.

    Args:
        dtype: "fp32" or "bf16".
        shapes: (rows, inner, columns).
        seconds: time spent on each shape; at least five products are timed whatever it says.
    """
    return {" x ".join(map(str, shape)): _rate(DTYPES[dtype], shape, seconds) for shape in shapes}


def _rate(dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    rows, inner, columns = shape
    x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    times: list[float] = []
    with torch.no_grad():
        # The first products choose a kernel and fault in the memory.
        for _ in range(2):
            torch.mm(x, w.T, out=out)
        while len(times) < 5 or sum(times) < seconds:
            start = time.perf_counter()
            torch.mm(x, w.T, out=out)
            times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / median(times)
