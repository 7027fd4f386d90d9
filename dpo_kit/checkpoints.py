"""Checkpoints that are whole, and going on from them: checkpoints/step-N in a run's folder.

`CheckpointingTrainer` is transformers' Trainer with these checkpoints, and with what a resumed run must know
beside weights and optimiser. How a state lies in files is in `checkpoint_files`, which of a run's checkpoints
is good in `checkpoint_folders`. What is trained is the subclass's business.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from dpo_kit import checkpoint_states, ranks
from dpo_kit.adapters import load_adapters, saved_adapters
from dpo_kit.checkpoint_files import (
    random_states,
    read_json,
    read_tensors,
    set_random_states,
    write_json,
    write_manifest,
    write_tensors,
)
from dpo_kit.checkpoint_folders import (
    WRITING,
    check_whole,
    clear_up,
    name_whole,
    newest_checkpoint,
    put_aside,
    reading,
    remove_old,
    steps_in,
)
from dpo_kit.disk import refusal, room
from dpo_kit.errors import DivergedError, DpoKitWarning, InputError, TrainingError
from dpo_kit.packing import MicroBatch

_COUNTS_FILE = "counts.json"
_RANDOM = "random-{}.safetensors"


@dataclass
class Counts:
    """What a run has done so far; a resumed run counts on.

    Attributes:
        tokens: computed, without padding.
        separate_tokens: of the same sequences kept apart.
        pairs: examples trained on, of this rank.
        seconds: in `train`.
        running: of the objective's running means; see `dpo_kit.losses.Objective.averaged`.
        reference_tokens: that filling a cached reference took.
        loss: sum of the mean losses of all steps.
        left_out: steps that were not finite, in a row until now.
        unlogged: of the training metrics since the last logged line; see `WeightedMeans.state`.
    """

    tokens: int = 0
    separate_tokens: int = 0
    pairs: int = 0
    seconds: float = 0.0
    running: list[float | None] = field(default_factory=list)
    reference_tokens: int = 0
    loss: float = 0.0
    left_out: int = 0
    unlogged: list[Any] = field(default_factory=list)

    def add(self, batch: MicroBatch) -> None:
        """Count a micro-batch that was trained on."""
        self.tokens += batch.num_tokens
        self.separate_tokens += batch.num_separate_tokens
        self.pairs += batch.num_pairs

    @property
    def saved_share(self) -> float:
        """Share of the tokens of separate sequences that the tree did not have to compute."""
        return 1 - self.tokens / self.separate_tokens if self.separate_tokens else 0.0

    def over_ranks(self) -> Counts:
        """Of all ranks together, on all ranks."""
        counted = ranks.gather([getattr(self, name) for name in _SUMMED])
        summed: dict[str, Any] = dict(zip(_SUMMED, map(sum, zip(*counted, strict=True)), strict=True))
        return replace(self, **summed)

    def share(self) -> Counts:
        """This rank's part of what all ranks counted; the parts sum to it on any number of ranks."""
        rank, number = ranks.rank(), ranks.ranks()
        parts = {name: (total := getattr(self, name)) // number + (rank < total % number) for name in _SUMMED}
        return replace(self, **parts)


_SUMMED = ("tokens", "separate_tokens", "pairs", "reference_tokens")


class CheckpointingTrainer(Trainer):
    """A transformers.Trainer whose checkpoints are written whole, and who counts across resumes."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._counts = Counts()
        self._began = 0.0
        super().__init__(*args, **keywords)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **keywords: Any
    ) -> Any:
        """As transformers has it; `resume_from_checkpoint=True` is the newest good one of checkpoints/step-N.

        Checkpoints of an earlier run in the same folder are put aside under another name.

        Raises:
            InputError: there is none, or the one that is named is damaged.
            TrainingError: a checkpoint could not be written.
        """
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(Path(str(self.args.output_dir)))
            if newest is None:
                raise InputError("there is no checkpoint to resume from", file=self.checkpoint_folder)
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            check_whole(Path(resume_from_checkpoint))
            with reading(Path(resume_from_checkpoint)):
                self._load_more(Path(resume_from_checkpoint))
        self._began = time.perf_counter()
        if self.args.should_save:
            clear_up(self.checkpoint_folder)
        if resume_from_checkpoint and (done := self._finished(Path(resume_from_checkpoint))):
            return done
        if not resume_from_checkpoint and self.args.should_save and steps_in(self.checkpoint_folder):
            put_aside(self.checkpoint_folder)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **keywords)
        # transformers has the mean over the steps of this call.
        loss = (self._counts.loss + self._total_loss_scalar) / max(result.global_step, 1)
        return TrainOutput(result.global_step, loss, result.metrics | {"train_loss": loss})

    def _finished(self, checkpoint: Path) -> TrainOutput | None:
        """Load a checkpoint that has all its steps: transformers would train one more in mid-epoch."""
        with reading(checkpoint):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if not 0 < self.args.max_steps <= state.global_step:
                return None
        self._find_best(state)
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        if self.args.should_save:
            remove_old(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
        loss = self._counts.loss / state.global_step
        return TrainOutput(state.global_step, loss, {"train_loss": loss})

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
        return str(self.checkpoint_folder / WRITING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that a folder step-N is always whole."""
        assert self.model is not None
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad):
            raise DivergedError(
                f"the weights are not finite at step {self.state.global_step}, and are not saved. The newest "
                "checkpoint is kept. A smaller learning rate or more warm-up may mend it."
            )
        step = self.state.global_step
        beside = Path(self._get_output_dir(trial))
        written, final = beside / f"checkpoint-{step}", self.checkpoint_folder / f"step-{step}"
        with self._together():
            if self.args.should_save:
                # Of a run that died while it wrote one.
                shutil.rmtree(beside, ignore_errors=True)
                written.mkdir(parents=True)
        with self._together():
            super()._save_checkpoint(model, trial)
        if self.state.best_model_checkpoint == str(written):
            # Its name from now on, on every rank.
            self.state.best_model_checkpoint = str(final)
        counts = self._counts_now()
        with self._together():
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
                write_json(written / _COUNTS_FILE, asdict(counts))
                self._save_more(written)
                write_manifest(written)
                name_whole(written, final)
        if self.args.should_save:
            remove_old(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around what writes a part of a checkpoint: where the disk refuses one rank, all stop.

        Raises:
            TrainingError: on all ranks; what was written is removed, so that its room is free again.
        """
        error, problem = None, None
        try:
            yield
        except Exception as raised:
            if (reason := refusal(raised)) is None:
                raise
            error, problem = raised, f"{reason} ({room(self.checkpoint_folder)})"
        if not (problems := [said for said in ranks.gather(problem) if said]):
            return
        folder = self.checkpoint_folder
        if self.args.should_save:
            shutil.rmtree(self._get_output_dir(None), ignore_errors=True)
        steps = steps_in(folder)
        kept = f"step-{max(steps)}, the newest one, is kept" if steps else "there is none before it"
        raise TrainingError(
            f"{folder}: the checkpoint of step {self.state.global_step} could not be written: {problems[0]}; "
            f"{kept}. Mend that, and go on with --resume."
        ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as save_pretrained does, whole; a checkpoint of a sharded one is sharded too."""
        if not _internal_call:
            checkpoint_states.save_whole(self, output_dir or str(self.args.output_dir))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        with self._together():
            checkpoint_states.save_model(self, Path(str(output_dir)))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers has it, without training_args.bin, which is a pickle."""
        if not self.args.should_save and not self.is_distributed_loading_by_transformers:
            return
        folder = str(self.args.output_dir) if output_dir is None else output_dir
        model: Any = self.model
        if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
            model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if hasattr(model, "save_pretrained"):
            adapters = {"selected_adapters": saved_adapters(model)} if hasattr(model, "peft_config") else {}
            first = self.args.should_save
            model.save_pretrained(folder, state_dict=state_dict, is_main_process=first, **adapters)
        elif self.args.should_save:
            save_model(model, str(Path(folder) / "model.safetensors"))
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._together():
            checkpoint_states.save_optimizer(self, Path(output_dir))

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: it is written with the optimiser."""

    def _save_rng_state(self, output_dir: str) -> None:
        states = ranks.gather(random_states())
        with self._together():
            if self.args.should_save:
                for rank, state in enumerate(states):
                    write_tensors(Path(output_dir) / _RANDOM.format(rank), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_whole(folder)
        own: Any = self.model if model is None else model
        if checkpoint_states.load_sharded_model(own, folder):
            return
        if hasattr(own, "peft_config"):
            # transformers would switch all adapters but one off.
            load_adapters(own, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._find_best(self.state)

    def _find_best(self, state: TrainerState) -> None:
        """Have a state that was read name the best checkpoint where it lies now: runs may be moved."""
        best = self.checkpoint_folder / f"step-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint)):
                checkpoint_states.load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it is read with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, rank = Path(checkpoint), ranks.rank()
        if (own := folder / _RANDOM.format(rank)).is_file():
            set_random_states(read_tensors(own))
        else:
            # A rank that was not there: other states than those of the others, the same at every resume.
            set_seed((self.args.seed + 1_000_003 * rank + self.state.global_step) % 2**32)
        known = len(list(folder.glob(_RANDOM.format("*"))))
        if 0 < known < ranks.ranks() and ranks.is_first():
            warnings.warn(
                f"{checkpoint} was written by {known} ranks, and {ranks.ranks()} go on: the random states "
                "of the others are drawn anew. Weights, optimiser, schedule and counts are taken over",
                DpoKitWarning,
                stacklevel=2,
            )

    def _counts_now(self) -> Counts:
        """Of all ranks together, for a checkpoint. All ranks call it."""
        loss = self._total_loss_scalar + float(self._tr_loss)
        mean = sum(ranks.gather(loss)) / ranks.ranks()
        now = replace(self._counts, seconds=self.train_seconds, loss=self._counts.loss + mean)
        return now.over_ranks()

    def _save_more(self, folder: Path) -> None:
        """Write what transformers' checkpoint does not hold into its folder; for subclasses."""

    def _load_more(self, folder: Path) -> None:
        """Read back what a checkpoint holds beside transformers' state."""
        if (counts := folder / _COUNTS_FILE).exists():
            self._counts = Counts(**read_json(counts)).share()
