"""What can go wrong, in the user's words. The command line turns these into an exit status.

An `InputError` is the user's to mend (exit status 2): it names the place and the mend.
A `TrainingError` is a run that failed (exit status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from dpo_kit.shown_text import without_secrets


class DpoKitWarning(UserWarning):
    """Something is off but the run goes on: a fall-back was taken, a setting has no effect."""


class RankWarning(DpoKitWarning):
    """What concerns one rank alone, and is shown whichever that is."""


class DpoKitError(Exception):
    """Base of the errors that are reported without a traceback."""

    exit_status = 1


class TrainingError(DpoKitError):
    """The run cannot go on: a loss that is not finite, a reference that is not the policy."""


class DivergedError(TrainingError):
    """A loss, gradient or weight is not finite any more: what the settings came to, not a fault of theirs."""


class StoppedError(DpoKitError):
    """Somebody asked the run to end (SIGINT, SIGTERM), and it did; exit status 128 + the signal's number.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_status = 128 + signal


class InputError(DpoKitError):
    """The user's input is wrong.

    Printed as `file:line: field 'name': problem. mend`; each part is left out where it is unknown.
    """

    exit_status = 2

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.line = line
        self.field = field
        self.mend = mend
        super().__init__(str(self))

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}" if place else f"line {self.line}"
        parts = [place] if place else []
        if self.field:
            parts.append(f"field '{self.field}'")
        message = ": ".join([*parts, self.problem])
        return without_secrets(f"{message.rstrip('.')}. {self.mend}" if self.mend else message)


def nearest(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """What to tell who wrote an unknown name: which may be meant, or else `otherwise`, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else otherwise or f"Known: {', '.join(known)}."
