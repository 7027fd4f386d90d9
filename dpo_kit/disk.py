"""A disk that may be full, closed to us or damaged: what its errors say, files that are on it for certain,
their digests.

What is written, and what is kept when that fails, is said by whoever writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError, TrainingError

# hashlib lets other threads run while it hashes a block; 4 MiB take it some milliseconds.
BLOCK_BYTES = 1 << 22
THREADS = min(8, os.cpu_count() or 1)

# Of the place that is written to; any other error is the program's.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def refusal(error: BaseException) -> str | None:
    """Why a disk refused to be written, in the system's words; None for an error of something else.

    safetensors, pyarrow and torch.distributed raise errors of their own, whose text has the system's number.
    """
    number = _number(error)
    return os.strerror(number) if number in _FULL | _CLOSED else None


def _number(error: BaseException) -> int:
    if (number := getattr(error, "errno", None)) is not None:
        return int(number)
    named = re.search(r"(?:os error|[Ee]rrno) (\d+)", str(error))
    return int(named[1]) if named else 0


def room(place: Path) -> str:
    """How much of the disk of a file or folder is free, for people."""
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free there"


@contextlib.contextmanager
def writing(
    what: str,
    place: Path,
    *,
    partial: Path | None = None,
    strays: str | None = None,
    mend: str = "Make room, and go on with --resume.",
) -> Iterator[None]:
    """Around what writes: a disk's refusal becomes an error that names the place.

    Args:
        what: is written, for people.
        place: file or folder.
        partial: a file or folder that is removed then, so that its room is free again.
        strays: likewise what came into the folder `place` under names of this pattern, which whoever writes
            chooses.
        mend: what the user can do.

    Raises:
        TrainingError: the disk is full.
        InputError: the place must not be written.
    """
    before = set(place.glob(strays)) if strays else set()
    try:
        yield
    except Exception as error:
        if (problem := refusal(error)) is None:
            raise
        for part in {partial or place, *(place.glob(strays) if strays else ())} - before - {place}:
            remove(part)
        problem = f"{what} cannot be written: {problem}"
        if _number(error) in _CLOSED:
            raise InputError(problem, file=place, mend="Name another folder.") from error
        raise TrainingError(f"{place}: {problem} ({room(place)}). {mend}") from error


def remove(place: Path) -> None:
    """Remove a file or folder, as far as that can be done."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            place.unlink()


def sync_file(path: Path) -> None:
    """Wait until a file that was written is on the disk.

    Raises:
        OSError: it cannot be; some file systems notice only now that they are full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        sync_file(path)


def digest_file(path: Path) -> str:
    """SHA-256 of the SHA-256 digests of a file's blocks of 4 MiB, in hexadecimal: all cores hash at once."""
    with open(path, "rb") as file, ThreadPoolExecutor(THREADS) as pool:
        digest = hashlib.sha256()
        while chunks := [c for c in (file.read(BLOCK_BYTES) for _ in range(2 * THREADS)) if c]:
            for part in pool.map(digest_block, chunks):
                digest.update(part)
    return digest.hexdigest()


def digest_block(block: Any) -> bytes:
    """SHA-256 of bytes, or of what lies in a buffer."""
    return hashlib.sha256(block).digest()
