"""What listens to a training run: the file of metrics."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Write every logged line to OUTPUT_DIR/metrics.jsonl, one JSON object a line.

    A resumed run goes on in the same file: what was logged after the checkpoint it resumes from, and
    a line that was cut when the run died, are taken out first.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the file anew, or cut it back to the step that the run resumes from."""
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / METRICS_FILE
        kept = _lines_until(path, state.global_step) if state.global_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".writing")
        written.write_text("".join(kept), encoding="utf-8")
        os.replace(written, path)

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
        with open(Path(str(args.output_dir)) / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            logged = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and logged.get("step", 0) <= step:
            kept.append(line)
    return kept
