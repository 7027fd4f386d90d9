"""Cutting a length into parts."""

from __future__ import annotations


def slices(length: int, step: int) -> list[slice]:
    """0 .. length - 1 in parts of `step`, the last one maybe shorter."""
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]
