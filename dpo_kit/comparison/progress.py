"""A line for each run of a comparison that has ended, and how long the others will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dpo_kit.comparison.execute import outcome
from dpo_kit.comparison.results import measurements
from dpo_kit.comparison.runs import Run


class Progress:
    """Counts the runs of a comparison.

    Args:
        runs: all of them.
        wanted: those that are to be run.
        workers: how many at once.
    """

    def __init__(self, runs: Sequence[Run], wanted: Sequence[Run], workers: int) -> None:
        self._total, self._left, self._workers = len(runs), list(wanted), workers
        self._took: list[tuple[Run, float]] = []
        self._began = time.perf_counter()

    def ended(self, run: Run, seconds: float) -> str:
        """The line of a run that has ended after so many seconds."""
        self._left.remove(run)
        self._took.append((run, seconds))
        done = self._total - len(self._left)
        name = " ".join(filter(None, [run.label, run.setting, f"seed={run.seed}" if run.seed else ""]))
        measured = measurements(run.folder)
        worth = ""
        if measured:
            worth = f"reward {measured[-1]['eval_reward']:+.2f} at KL {measured[-1]['eval_kl']:.1f}, "
        how = {"done": "", "diverged": "diverged, "}.get(outcome(run), "failed, ")
        return f"[{done}/{self._total}] {name}: {how}{worth}{seconds:.0f} s{self._rest()}"

    def _rest(self) -> str:
        if not self._left:
            return ""
        # What the running ones have behind them is what the workers did beyond the runs that ended.
        spent = (time.perf_counter() - self._began) * self._workers - sum(took for _, took in self._took)
        left = max(sum(map(self._expected, self._left)) - spent, 0) / self._workers
        return f"; about {left / 60:.0f} min left" if left >= 90 else f"; about {left:.0f} s left"

    def _expected(self, run: Run) -> float:
        """Mean seconds of the ended runs that are most like this one."""
        for alike in ("method", "command", "__class__"):
            took = [seconds for other, seconds in self._took if getattr(other, alike) == getattr(run, alike)]
            if took:
                return sum(took) / len(took)
        return 0.0
