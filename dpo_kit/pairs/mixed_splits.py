"""Files of a folder or glob whose names tell that some are to train on and others are held out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_TRAIN = frozenset(("train", "training"))
_HELD_OUT = frozenset(("test", "eval", "evaluation", "val", "valid", "validation", "dev", "heldout"))


def mixed_splits(given: str, files: Sequence[str]) -> str | None:
    """What is to be said where the names of a folder's or glob's files tell of train and of held-out data."""
    base = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    parts = {file: _parts(os.path.relpath(file, base or ".")) for file in files}
    train = [file for file, words in parts.items() if words & _TRAIN and not words & _HELD_OUT]
    held_out = [file for file, words in parts.items() if words & _HELD_OUT and not words & _TRAIN]
    if not train or not held_out:
        return None
    return (
        f"{given}: {os.path.basename(train[0])} and {os.path.basename(held_out[0])} are all read as one set, "
        "though their names tell of training and of held-out data: name the files that you mean"
    )


def _parts(path: str) -> set[str]:
    return set(re.findall(r"[a-z]+", path.lower()))
