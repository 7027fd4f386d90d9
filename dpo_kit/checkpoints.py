"""Folders of checkpoints: the newest one, room for new ones, and giving a written one its name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers import TrainerState


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
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def name_whole(written: Path, final: Path, state: TrainerState) -> None:
    """Rename a checkpoint that is written in full to its place, so that a folder there is always whole."""
    if state.best_model_checkpoint == str(written):
        state.best_model_checkpoint = str(final)
        state.save_to_json(str(written / "trainer_state.json"))
    if final.exists():
        # A run that was resumed from before it.
        shutil.rmtree(final)
    written.rename(final)
