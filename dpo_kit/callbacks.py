"""What listens to a training run: the file of metrics, and the person at the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_kit.disk import writing

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Write every logged line to OUTPUT_DIR/metrics.jsonl, one JSON object a line.

    A resumed run goes on in the same file: what was logged after the checkpoint it resumes from, and
    a line that was cut when the run died, are taken out first. Any other run starts the file anew.
    """

    def __init__(self) -> None:
        self._before_training: list[str] | None = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Cut the file back to the step that the run resumes from, or start it anew."""
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / METRICS_FILE
        kept = _lines_until(path, state) if state.global_step else self._before_training or []
        written = path.with_suffix(".writing")
        with writing("the metrics", path, partial=written):
            path.parent.mkdir(parents=True, exist_ok=True)
            written.write_text("".join(kept), encoding="utf-8")
            os.replace(written, path)
        self._before_training = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append a line."""
        # The last line of a run sums it up; that belongs to summary.json.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = json.dumps({"step": state.global_step, **logs}) + "\n"
        if self._before_training is not None:
            self._before_training.append(line)
        path = Path(str(args.output_dir)) / METRICS_FILE
        with writing("the metrics", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)


class Progress(TrainerCallback):
    """A bar, and a short line for every logged one, both on stderr; no bar where that is no terminal."""

    _SHOWN = (
        ("loss", "loss", "{:.4f}"),
        ("rewards/accuracies", "accuracy", "{:.3f}"),
        ("rewards/margins", "margin", "{:+.3f}"),
        ("logps/chosen", "log p(chosen)", "{:.1f}"),
        ("grad_norm", "gradient", "{:.2f}"),
        ("pairs_per_second", "pairs/s", "{:.1f}"),
    )

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            disable = True if args.disable_tqdm else None
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, disable=disable, dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Say how it goes."""
        if not state.is_world_process_zero or not logs:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        shown = [
            f"{label} {form.format(logs[prefix + key])}"
            for key, label, form in self._SHOWN
            if prefix + key in logs
        ]
        if shown:
            line = f"step {state.global_step}{' held-out' if prefix else ''}: {', '.join(shown)}"
            tqdm.write(line, file=sys.stderr)


class At(TrainerCallback):
    """Calls functions at moments of a training run.

    Args:
        before_first_step: when the model is ready to be trained (placed, wrapped, its checkpointing on) and
            nothing is planned yet.
        after_step: after each optimiser step, with the number of steps done.
    """

    def __init__(self, *, before_first_step: Callable[[], None], after_step: Callable[[int], None]) -> None:
        self._before_first_step, self._after_step = before_first_step, after_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Call the first one."""
        self._before_first_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Call the other one."""
        self._after_step(state.global_step)


def _lines_until(path: Path, state: TrainerState) -> list[str]:
    """What had been logged when a checkpoint was written, by the state that it holds."""
    if not path.exists():
        return []
    step = state.global_step
    # A run that died after its last checkpoint has logged more of that very step.
    of_step = sum(
        logged.get("step") == step and "train_runtime" not in logged for logged in state.log_history
    )
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            at = int(json.loads(line)["step"])
        except (ValueError, TypeError, LookupError):
            continue
        of_step -= at == step
        if line.endswith("\n") and (at < step or (at == step and of_step >= 0)):
            kept.append(line)
    return kept
