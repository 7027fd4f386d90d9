"""Ending a run that somebody asked to end: after the step, with a checkpoint, on all ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_kit.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Has a trainer save a checkpoint and stop after SIGINT or SIGTERM; a second one ends it at once.

    Attributes:
        told: number of the signal that came to this process; 0: none.
        agreed: of the one that the ranks have told each other of; see `dpo_kit.step.Totals`.
    """

    def __init__(self) -> None:
        self.told = self.agreed = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within: a signal waits for the end of the step; after: handlers are as before."""
        if threading.current_thread() is not threading.main_thread():
            # Python lets no other thread set handlers.
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def note(number: int, frame: Any) -> None:
            # A launcher passes on what the terminal has sent to its children too.
            if self.told and "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)
            self.told = number

        self.told = self.agreed = 0
        for number in _SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.told:
            # Too late for this loop; what comes next is ended by it.
            signal.raise_signal(self.told)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint, and for nothing else that takes time: a resume makes up for an evaluation.

        Not where the best checkpoint is to be known by it.
        """
        if args.world_size == 1:
            # Ranks tell each other in the next step.
            self.agreed = self.told
        if self.agreed:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and args.load_best_model_at_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the training loop.

        Raises:
            StoppedError: with the step.
        """
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise StoppedError(
                f"stopped by {name} after step {state.global_step}; its checkpoint is saved, and --resume "
                "goes on from it",
                self.agreed,
            )
