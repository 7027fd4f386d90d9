"""A data set mapped once and kept: written whole by `datasets`, with digests beside it, verified when read.

What is mapped, and what the file is known by, is the caller's business (`tokenization`).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dpo_kit.cache_folder import ELSEWHERE, sweep
from dpo_kit.disk import digest_file, remove, writing
from dpo_kit.errors import DpoKitWarning, InputError


def map_cached(
    rows: datasets.Dataset, function: Callable[..., Any], file: Path, processes: int, **options: Any
) -> datasets.Dataset:
    """`rows.map(function)`, from the file or to it; several processes write a file each beside its name.

    Args:
        rows: to map, a row to each.
        function: takes Arrow tables.
        file: where it is kept, FILE.digests.json beside it.
        processes: how many map.
        options: of `Dataset.map`.

    Raises:
        InputError: the folder cannot be made or written.
        TrainingError: the disk is full.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The names that datasets writes under.
        sweep(file.parent, "tmp*")
    except OSError as error:
        raise InputError(
            f"cannot make the folder for the token cache: {error.strerror}",
            file=file.parent,
            mend="Set DPO_KIT_CACHE to a folder that can be written",
        ) from error
    options |= {"cache_file_name": str(file), "num_proc": processes if processes > 1 else None}

    def mapped(*, again: bool) -> datasets.Dataset:
        kept = rows.with_format("arrow").map(function, load_from_cache_file=not again, **options)
        return kept.with_format(None)

    with _environment_kept(), writing("the token cache", file.parent, strays="tmp*", mend=ELSEWHERE):
        found = None
        if _is_whole(file):
            with _no_damage():
                found = mapped(again=False)
        if found is not None and len(found) == len(rows):
            return found
        if _parts(file):
            warnings.warn(
                f"{file}: the token cache is damaged, or was not written whole; tokenising again",
                DpoKitWarning,
                stacklevel=4,
            )
        found = mapped(again=True)
        _write_digests(file)
        return found


@contextmanager
def _no_damage() -> Iterator[None]:
    """Within: what cannot be read is taken for damage."""
    try:
        yield
    except (pa.ArrowInvalid, OSError):
        return


def _parts(file: Path) -> list[Path]:
    """The file, or those of several processes, as datasets names them."""
    return sorted(file.parent.glob(f"{file.stem}*{file.suffix}"))


def _digests_of(file: Path) -> Path:
    return file.with_suffix(".digests.json")


def _is_whole(file: Path) -> bool:
    """Whether every file is as it was written."""
    try:
        known = json.loads(_digests_of(file).read_text(encoding="utf-8"))
        return known == {path.name: digest_file(path) for path in _parts(file)}
    except (OSError, ValueError):
        return False


def _write_digests(file: Path) -> None:
    """Written last: without it the others are not whole."""
    place = _digests_of(file)
    written = place.with_name(f"tmp-{os.getpid()}-{place.name}")
    try:
        written.write_text(json.dumps({path.name: digest_file(path) for path in _parts(file)}))
        os.replace(written, place)
    finally:
        remove(written)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """datasets turns off the tokenizer's threads for its forks, and leaves `os.environ` another object."""
    environ, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
