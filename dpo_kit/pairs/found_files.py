"""A folder or a glob -> the files in it, and in nothing but it.

What the user writes may name any place. What is found there may not: a link that leads out of the folder is
refused, and so is what is no regular file (reading a pipe would wait for ever).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from dpo_kit.errors import InputError


def walked(folder: str) -> Iterator[str]:
    """All files in the folder and the folders in it, sorted; hidden ones and links to folders left out.

    Raises:
        InputError: a folder cannot be read.
    """
    for place, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(place, name)


def _cannot_list(error: OSError) -> None:
    raise InputError(f"the folder cannot be read: {error.strerror}", file=error.filename) from None


def matched(pattern: str) -> tuple[str, list[str]]:
    """The folder before a glob's first sign, and what matches the glob and is no folder, sorted."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    found = sorted(name for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name))
    return folder or ".", found


def require_inside(folder: str, path: str) -> str:
    """The real path of a file that was found in a folder.

    Raises:
        InputError: it lies elsewhere, or as `require_regular`.
    """
    require_regular(path)
    root, real = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([root, real]) != root and not _is_hub_blob(root, real):
        raise InputError(
            f"this is a link out of {folder}, to {real}", file=path, mend="Name what it leads to by itself"
        )
    return real


def require_regular(path: str) -> None:
    """Raises `InputError` for a pipe, a device or a socket, and for a link that leads nowhere."""
    if not os.path.isfile(path):
        is_there = os.path.exists(path)
        problem = "this is no regular file" if is_there else "this is a link to something that is not there"
        raise InputError(problem, file=path, mend="Save the rows in a file" if is_there else None)


def _is_hub_blob(root: str, real: str) -> bool:
    """Whether a link of the hub's cache leads where they do: from snapshots/REVISION to blobs beside it."""
    repository, between, _ = f"{root}{os.sep}".partition(f"{os.sep}snapshots{os.sep}")
    return bool(between) and os.path.dirname(real) == os.path.join(repository, "blobs")
