"""The folders checkpoints/step-N of a run: which is the newest good one, what is damaged, what may go.

Reads and renames; what a checkpoint holds is written by `checkpoints`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from dpo_kit import ranks
from dpo_kit.checkpoint_files import damage, pickles_in
from dpo_kit.disk import sync_folder
from dpo_kit.errors import DpoKitWarning, InputError

# In a folder of checkpoints: what is being written, and what is being removed.
WRITING, REMOVING = ".writing", ".removing"


def steps_in(folder: Path) -> dict[int, Path]:
    """The folders step-N in one of checkpoints, by their steps, good or not."""
    return {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and path.is_dir()
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The good checkpoint of the highest step in a run folder, or None where none was ever written.

    A damaged one is named in a warning, renamed to step-N.damaged, and the one before it is taken. All ranks
    call it: the first looks, and all get what it finds.

    Raises:
        InputError: none is good; or there is one with pickles, which earlier versions wrote.
    """
    return ranks.by_first(lambda: _newest_good(folder / "checkpoints"))


def check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not as it was written. All ranks call it.

    Raises:
        InputError: naming what is wrong.
    """
    ranks.by_first(lambda: _check_whole(checkpoint))


def _check_whole(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise InputError("there is no such checkpoint", file=checkpoint)
    _refuse_pickles(checkpoint)
    if problem := damage(checkpoint):
        mend = "Resume from another: --resume takes the newest good one."
        raise InputError(f"the checkpoint is damaged: {problem}", file=checkpoint, mend=mend)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Around what takes over a part of a checkpoint, which may be whole and yet make no sense.

    Raises:
        InputError: naming the checkpoint, for what reading such content raises.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, FileNotFoundError) as error:
        raise InputError(
            f"the checkpoint cannot be read ({type(error).__name__}: {error})",
            file=checkpoint,
            mend="Move it away: --resume takes the newest of the others.",
        ) from error


def _newest_good(folder: Path) -> Path | None:
    for _, path in sorted(steps_in(folder).items(), reverse=True):
        _refuse_pickles(path)
        if (problem := damage(path)) is None:
            return path
        aside = free_name(path.with_name(f"{path.name}.damaged"))
        path.rename(aside)
        message = f"{path} is damaged: {problem}. It is now {aside.name}, and the one before it is used"
        warnings.warn(message, DpoKitWarning, stacklevel=2)
    if damaged := sorted(folder.glob("step-*.damaged*")):
        found = "; ".join(f"{path.name}: {damage(path) or 'whole, if renamed'}" for path in damaged)
        raise InputError(
            f"no checkpoint is good ({found})",
            file=folder,
            mend="Bring one back from a copy under its name step-N, or start anew without --resume.",
        )
    return None


def _refuse_pickles(checkpoint: Path) -> None:
    if pickles := pickles_in(checkpoint):
        raise InputError(
            f"the checkpoint holds pickles ({', '.join(pickles)}), which can run any code and are never read",
            file=checkpoint,
            mend="Checkpoints of dpo-kit before this format have them: begin the run anew, or finish it with "
            "the version that wrote them.",
        )


def put_aside(folder: Path) -> Path:
    """Rename a folder to the first free name.N; the new name."""
    return folder.rename(free_name(folder))


def free_name(folder: Path) -> Path:
    """The first of name, name.1, name.2, ... that nothing has."""
    numbered = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
    return next(name for name in chain([folder], numbered) if not name.exists())


def name_whole(written: Path, final: Path) -> None:
    """Rename a checkpoint that is written in full to its place, so that a folder there is always whole."""
    if final.exists():
        # A run that was resumed from before it.
        final.rename(written.with_name(f"replaced-{final.name}"))
    written.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove checkpoints, lowest step first, until `limit` are left: the newest, which is good, and others.

    Args:
        newest: the one that was just written; it stays, whatever the limit.
        limit: None or 0: all stay.
        best: one that stays as well.
    """
    if not limit or limit < 0:
        return
    kept = {newest, newest if best is None else Path(best)}
    others = [path for _, path in sorted(steps_in(newest.parent).items()) if path not in kept]
    excess = len(others) + len(kept) - limit
    for path in others[: max(excess, 0)]:
        # What a process leaves that dies on the way is no checkpoint any more.
        removing = newest.with_name(REMOVING)
        removing.mkdir(exist_ok=True)
        path.rename(free_name(removing / path.name))
        shutil.rmtree(removing, ignore_errors=True)


def clear_up(folder: Path) -> None:
    """Remove what a process that died was writing or removing in a folder of checkpoints."""
    for name in (WRITING, REMOVING):
        shutil.rmtree(folder / name, ignore_errors=True)
