"""Folders of checkpoints: the newest one, and room for new ones."""

from __future__ import annotations

import re
from pathlib import Path


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
