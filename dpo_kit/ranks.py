"""The processes of a run: which one this is, waiting for the others, and telling them something.

One process alone is rank 0 of 1, and everything here does nothing then. What the ranks compute together is
not said here (accelerate, and the loop).
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch.distributed as dist

from dpo_kit.errors import DpoKitError

T = TypeVar("T")

# Others wait while one tokenises ten million pairs; a rank that died ends the launch, and so the waiting.
_PATIENCE = timedelta(days=7)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number: in the process group, else as its launcher says."""
    return dist.get_rank() if _in_group() else int(os.environ.get("RANK", 0))


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _in_group() else int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def first_only(say: Callable[[str], None]) -> Callable[[str], None]:
    """What says lines on the first rank, and nothing on the others."""
    return say if is_first() else lambda line: None


@lru_cache(maxsize=1)
def _patient_group(default: object) -> object:
    """A group for waiting: with NCCL's clock, an hour of work on one rank would end the others."""
    # A thread of gloo that is still there when Python ends has the process aborted.
    atexit.register(_leave)
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _leave() -> None:
    _patient_group.cache_clear()
    if _in_group():
        dist.destroy_process_group()


def _group() -> dist.ProcessGroup:
    if not _in_group():
        from accelerate import PartialState

        # Ranks that were launched and have no group yet: as the trainer would begin.
        PartialState()
    return _patient_group(dist.group.WORLD)  # type: ignore[return-value]


def wait() -> None:
    """Until all ranks have come here, however long that takes."""
    if ranks() > 1:
        dist.barrier(group=_group())


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """The body on rank 0, then on the first rank of each other node, then on all others.

    What one has left on a disk that it shares with the next is found there.
    """
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0
    turn = 0 if is_first() else 1 if first_of_node else 2
    for _ in range(turn):
        wait()
    try:
        yield
    finally:
        # A rank whose turn failed lets the others go on, to fail likewise or to be ended by the launcher.
        for _ in range(2 - turn):
            wait()


def broadcast(value: T) -> T:
    """Rank 0's object, on all ranks."""
    if ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, group=_group())
    return held[0]


def gather(value: T) -> list[T]:
    """Each rank's object, in the order of ranks, on all ranks."""
    if ranks() == 1:
        return [value]
    said: list[T | None] = [None] * ranks()
    dist.all_gather_object(said, value, group=_group())
    return said  # type: ignore[return-value]


def agree(flag: bool) -> bool:
    """Whether any rank says so."""
    return any(gather(flag))


def each(work: Callable[[], T]) -> T:
    """What some work comes to on this rank, once all have done theirs; or the error of ours of the first that
    failed, on all: those that did not fail would wait for it."""
    result, failure = None, None
    try:
        result = work()
    except DpoKitError as error:
        failure = error
    for raised in gather(failure):
        if raised is not None:
            raise raised
    return result  # type: ignore[return-value]


def by_first(work: Callable[[], T]) -> T:
    """What rank 0 makes of some work, on all ranks; or the error of ours that it raises."""
    done: tuple[T | None, DpoKitError | None] = (None, None)
    if is_first():
        try:
            done = work(), None
        except DpoKitError as error:
            done = None, error
    result, failure = broadcast(done)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
