"""What a training run of several models costs: seconds, positions computed, tokens sampled."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import nn


class CostMeter:
    """A clock and a counter that stand still while something is measured.

    Attributes:
        tokens: positions put through the bodies that are watched, padding among them; a position counts once
            for each forward pass, whether or not a backward pass follows.
        tokens_sampled: tokens of sampled replies, their end among them; who samples adds them.
    """

    def __init__(self) -> None:
        self.tokens = self.tokens_sampled = 0
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Time that the clock has run."""
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """Let the clock and the counter run."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Let them stand."""
        self._before, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it they stand; after it they are as before."""
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def watch(self, model: nn.Module) -> None:
        """Count the forward passes of a model's body, which is what lies under its head."""
        found: Any = model
        whole = found.get_base_model() if hasattr(found, "get_base_model") else found
        getattr(whole, whole.base_model_prefix).register_forward_pre_hook(self._count, with_kwargs=True)

    def figures(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of the work so far."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._since is None:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        shape = given.shape if given is not None else kwargs["inputs_embeds"].shape
        self.tokens += int(shape[0] * shape[1])
