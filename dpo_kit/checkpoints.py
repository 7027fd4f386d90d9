"""Checkpoints that are whole, and going on from them: checkpoints/step-N in a run's folder.

`CheckpointingTrainer` is transformers' Trainer with these checkpoints, and with what a resumed run must know
beside weights and optimiser. What is trained is its subclass's business.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from dpo_kit.errors import DivergedError, InputError
from dpo_kit.packing import MicroBatch

_COUNTS_FILE = "counts.json"


@dataclass
class Counts:
    """What a run has done so far; a resumed run counts on.

    Attributes:
        tokens: computed, without padding.
        separate_tokens: of the same sequences kept apart.
        pairs: examples trained on, of this rank.
        seconds: in `train`.
        running: of the objective's running means; see `dpo_kit.losses.Objective.averaged`.
    """

    tokens: int = 0
    separate_tokens: int = 0
    pairs: int = 0
    seconds: float = 0.0
    running: list[float | None] = field(default_factory=list)

    def add(self, batch: MicroBatch) -> None:
        """Count a micro-batch that was trained on."""
        self.tokens += batch.num_tokens
        self.separate_tokens += batch.num_separate_tokens
        self.pairs += batch.num_pairs

    @property
    def saved_share(self) -> float:
        """Share of the tokens of separate sequences that the tree did not have to compute."""
        return 1 - self.tokens / self.separate_tokens if self.separate_tokens else 0.0


class CheckpointingTrainer(Trainer):
    """A transformers.Trainer whose checkpoints are written whole, and who counts across resumes."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._counts = Counts()
        self._began = 0.0
        super().__init__(*args, **keywords)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """As transformers has it; `resume_from_checkpoint=True` is the newest of checkpoints/step-N.

        Checkpoints of an earlier run in the same folder are put aside under another name.

        Raises:
            InputError: there is none.
        """
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(Path(str(self.args.output_dir)))
            if newest is None:
                raise InputError("there is no checkpoint to resume from", file=self.checkpoint_folder)
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            self._load_more(Path(resume_from_checkpoint))
        self._began = time.perf_counter()
        if resume_from_checkpoint and (done := self._finished(Path(resume_from_checkpoint))):
            return done
        if not resume_from_checkpoint and self.args.should_save and self.checkpoint_folder.exists():
            put_aside(self.checkpoint_folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **keywords)

    def _finished(self, checkpoint: Path) -> TrainOutput | None:
        """Load a checkpoint that has all its steps: transformers would train one more in mid-epoch."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return TrainOutput(state.global_step, 0.0, {"train_loss": 0.0})

    @property
    def train_seconds(self) -> float:
        """Time in `train` so far, that of the runs it was resumed from included."""
        return self._counts.seconds + (time.perf_counter() - self._began if self._began else 0.0)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Within it, `train_seconds` stands still."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._began:
                self._began += time.perf_counter() - started

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints/step-N lie."""
        return Path(str(self.args.output_dir)) / "checkpoints"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_folder / ".writing")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that a folder step-N is always whole."""
        assert self.model is not None
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad):
            raise DivergedError(
                f"the weights are not finite at step {self.state.global_step}, and are not saved. The newest "
                "checkpoint is kept. A smaller learning rate or more warm-up may mend it."
            )
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        written = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        final = self.checkpoint_folder / f"step-{step}"
        if self.state.best_model_checkpoint == str(written):
            # Its name from now on, on every rank.
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_more(written)
            name_whole(written, final)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        rotate_checkpoints(
            output_dir=str(self.checkpoint_folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            checkpoint_prefix="step",
        )

    def _save_more(self, folder: Path) -> None:
        """Write what transformers' checkpoint does not hold into its folder."""
        counts = asdict(self._counts) | {"seconds": self.train_seconds}
        (folder / _COUNTS_FILE).write_text(json.dumps(counts))

    def _load_more(self, folder: Path) -> None:
        """Read it back."""
        if (counts := folder / _COUNTS_FILE).exists():
            self._counts = Counts(**json.loads(counts.read_text()))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, or None.

    A folder step-N is whole: it was renamed to that.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoints/step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }
    return found[max(found)] if found else None


def put_aside(folder: Path) -> Path:
    """Rename a folder to the first free name.N; the new name."""
    return folder.rename(free_name(folder))


def free_name(folder: Path) -> Path:
    """The first of name.1, name.2, ... that nothing has."""
    return next(aside for n in count(1) if not (aside := folder.with_name(f"{folder.name}.{n}")).exists())


def name_whole(written: Path, final: Path) -> None:
    """Rename a checkpoint that is written in full to its place, so that a folder there is always whole."""
    if final.exists():
        # A run that was resumed from before it.
        shutil.rmtree(final)
    written.rename(final)
