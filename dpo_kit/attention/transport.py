"""How what a dataloader's worker has planned comes to the process that trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class SentAsArrays:
    """An object whose tensors on the CPU are pickled as arrays.

    Torch would put each of them into a shared-memory file of its own; for index tensors of some kilobytes
    that takes longer than making them did.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
