"""Files of reference log-probs: written whole or not at all, and read only where every bit is as written.

A shard is a safetensors file, named by its kind and by the digest of its content. So a file can be told to be
whole without any other file, and processes that write the same thing write the same file. Which sequences
are wanted, and which model they are of, is the store's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from dpo_kit.disk import sync_folder
from dpo_kit.errors import InputError
from dpo_kit.fingerprint import FORMAT_VERSION

# Sums alone, or the log-prob of each token as well: a run that needs sums reads none of the many tokens.
Kind = Literal["sequences", "tokens"]

SHARD = re.compile(r"(sequences|tokens)-([0-9a-f]{32})\.safetensors")
DAMAGED = ".damaged"
# The name of a file while it is written; never read.
WRITING = ".writing"


class DamagedShardError(Exception):
    """A file is not what was written under its name."""


@dataclass(frozen=True)
class Shard:
    """Log-probs of some sequences under one model.

    Attributes:
        keys: [S, 16] uint8; see `dpo_kit.examples.sequence_keys`.
        sums: [S] fp64 log-prob of each completion, nats.
        lengths: [S] int64 tokens of each completion; None where only sums are kept.
        logprobs: [sum of lengths] fp32 log-prob of each token of each completion, likewise.
    """

    keys: npt.NDArray[np.uint8]
    sums: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64] | None = None
    logprobs: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, shards: Sequence[Shard]) -> Shard:
        """One of several, all with tokens or all without; of none, one without tokens."""

        def together(name: str) -> Any:
            parts = [getattr(shard, name) for shard in shards]
            return None if parts[0] is None else np.concatenate(parts)

        if not shards:
            return cls(np.empty((0, 16), np.uint8), np.empty(0))
        return cls(together("keys"), together("sums"), together("lengths"), together("logprobs"))

    def at(self, places: npt.NDArray[np.int64]) -> Shard:
        """Of the sequences at these places alone."""
        if self.lengths is None or self.logprobs is None:
            return Shard(self.keys[places], self.sums[places])
        parts = np.split(self.logprobs, self.lengths.cumsum()[:-1])
        logprobs = np.concatenate([self.logprobs[:0], *(parts[i] for i in places)])
        return Shard(self.keys[places], self.sums[places], self.lengths[places], logprobs)

    def of_kind(self, kind: Kind) -> Shard:
        """As it is kept in shards of that kind."""
        return self if kind == "tokens" else Shard(self.keys, self.sums)


def write_shard(folder: Path, shard: Shard) -> Path:
    """Write a shard; there is all of it under its name, or nothing.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    arrays: dict[str, Any] = {"keys": shard.keys, "sums": shard.sums}
    if shard.lengths is not None and shard.logprobs is not None:
        arrays |= {"lengths": shard.lengths, "logprobs": shard.logprobs}
    kind = "tokens" if "lengths" in arrays else "sequences"
    # Of one entry: safetensors writes several in any order.
    content = safetensors.numpy.save(arrays, {"format": f"dpo_kit reference {kind} {FORMAT_VERSION}"})
    path = folder / f"{kind}-{_digest(content)}.safetensors"
    write_file(path, content)
    return path


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the cache beside its place and rename it; on the disk when this returns.

    Raises:
        InputError: the folder cannot be written, or the disk is full. Nothing is left there then.
    """
    written = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{WRITING}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are for one user alone, whatever the umask says.
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(written, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            written.unlink()
        raise InputError(
            f"the reference's log-probs cannot be kept in {path.parent}: {error.strerror or error}",
            field="reference.cache_dir",
            mend="Name a folder that can be written and has room, or set reference.mode to live; "
            "`dpo-kit cache prune` makes room.",
        ) from error
    sync_folder(path.parent)


def read_shard(path: Path) -> Shard:
    """Read a shard.

    Raises:
        DamagedShardError: its content is not what its name says.
        OSError: the file cannot be opened, or is gone.
    """
    content = path.read_bytes()
    match = SHARD.fullmatch(path.name)
    if match is None or _digest(content) != match[2]:
        raise DamagedShardError("its content does not have the digest that its name gives")
    try:
        arrays = safetensors.numpy.load(content)
        shard = Shard(
            _array(arrays, "keys", np.uint8, dimensions=2),
            _array(arrays, "sums", np.float64),
            _array(arrays, "lengths", np.int64) if match[1] == "tokens" else None,
            _array(arrays, "logprobs", np.float32) if match[1] == "tokens" else None,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedShardError(str(error)) from error
    if shard.keys.shape != (len(shard.sums), 16) or not _tokens_fit(shard):
        raise DamagedShardError("its parts do not fit together")
    return shard


def _array(arrays: dict[str, Any], name: str, dtype: Any, dimensions: int = 1) -> Any:
    found = arrays[name]
    if found.dtype != dtype or found.ndim != dimensions:
        raise TypeError(f"{name} is of {found.dtype} and shape {found.shape}")
    return found


def _tokens_fit(shard: Shard) -> bool:
    if shard.lengths is None or shard.logprobs is None:
        return True
    fits = shard.lengths.shape == shard.sums.shape and bool((shard.lengths > 0).all())
    return fits and shard.logprobs.shape == (shard.lengths.sum(),)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
