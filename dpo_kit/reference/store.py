"""The reference cache on disk: a folder for each model, with shards that are only ever added.

    <cache>/reference/<model key>/model.json        what the model was called, for people
                                 /*.safetensors     see `shards`
    <cache>/reference/files/<files key>.json        the model key of a model that lies in files

No lock is needed: processes that fill the same folder add shards of their own. The first value of a sequence
that was written stays its value: what is known is not written again, and where two processes wrote it at once
the older shard counts for all who read both. Says nothing of how values come about (`cached`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_kit.cache_folder import cache_folder
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.fingerprint import read_fields
from dpo_kit.reference.lookup import Lookup
from dpo_kit.reference.shards import (
    DAMAGED,
    SHARD,
    WRITING,
    DamagedShardError,
    Kind,
    Shard,
    read_shard,
    write_file,
    write_shard,
)

_KEY = re.compile(r"[0-9a-f]{32}")
_ABOUT = "model.json"
_DAY = 86400.0

# A file that has been in writing for so long was left by a process that died.
_LEFT_BEHIND_S = 3600.0


@dataclass(frozen=True)
class ModelSummary:
    """What is kept of one model.

    Attributes:
        key: see `dpo_kit.fingerprint.model_key`.
        name: where it was loaded from, or its class.
        dtype: of its weights.
        autocast: what it was scored under, or None.
        sequences: how many sequences have a sum.
        with_tokens: how many have the log-prob of each token as well.
        damaged: shards that were set aside.
        bytes: of all files.
        used: when it was last read or added to, ISO 8601, UTC.
    """

    key: str
    name: str
    dtype: str | None
    autocast: str | None
    sequences: int
    with_tokens: int
    damaged: int
    bytes: int
    used: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ModelStore:
    """The shards of one model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[Kind, set[str]] = {"sequences": set(), "tokens": set()}
        self._held: dict[Kind, Shard] = {}
        self._lookups: dict[Kind, Lookup] = {}

    def shards(self, kind: Kind | None = None) -> list[Path]:
        """Paths of the shards of a kind, or of both; the oldest first."""
        found = [path for path in _files(self.folder) if SHARD.fullmatch(path.name)]
        chosen = [path for path in found if kind is None or path.name.startswith(kind)]
        return sorted(chosen, key=lambda path: (_written_ns(path), path.name))

    def known(self, kind: Kind) -> Lookup:
        """All of a kind that was written so far; what was known before keeps its value.

        Raises:
            InputError: a shard may not be read.
        """
        new = self.read_new(kind, self._seen[kind])
        if new or kind not in self._lookups:
            self._held[kind] = Shard.joined([*filter(None, [self._held.get(kind)]), *new])
            self._lookups[kind] = Lookup(self._held[kind])
        return self._lookups[kind]

    def read_new(self, kind: Kind, seen: set[str]) -> list[Shard]:
        """What shards hold whose names are not in `seen`, the oldest first; the names are put there.

        A damaged shard is set aside, with a warning, and what it held is missing. Computed again, it may well
        come back under the same name.

        Raises:
            InputError: a shard may not be read.
        """
        found = []
        for path in self.shards(kind):
            if path.name in seen:
                continue
            try:
                found.append(read_shard(path))
            except FileNotFoundError:
                # Pruned by another process since it was listed.
                continue
            except DamagedShardError as damage:
                self._set_aside(path, damage)
            except OSError as error:
                raise InputError(
                    f"it cannot be read: {error.strerror}",
                    file=path,
                    field="reference.cache_dir",
                    mend="Give the user of this process the right to read it, or name another folder.",
                ) from error
            else:
                seen.add(path.name)
        with contextlib.suppress(OSError):
            os.utime(self.folder / _ABOUT)
        return found

    def _set_aside(self, path: Path, damage: DamagedShardError) -> None:
        # A folder that may not be written is read all the same; the file is passed over then.
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + DAMAGED))
        message = f"{path}: damaged ({damage}); it is set aside, and what it held is computed again"
        warnings.warn(message, DpoKitWarning, stacklevel=4)

    def add(self, shard: Shard, kind: Kind) -> None:
        """Write what is not known of a shard; one with tokens for those who want sums alone too.

        Raises:
            InputError: the folder cannot be written, or the disk is full.
        """
        kinds: tuple[Kind, ...] = ("sequences",) if kind == "sequences" else ("sequences", "tokens")
        firsts = np.unique(Lookup(shard).find(shard.keys))
        for each in kinds:
            # Looked up right now: another process may have written it since it was found to be missing.
            new = firsts[self.known(each).find(shard.keys[firsts]) < 0]
            if len(new):
                write_shard(self.folder, shard.of_kind(each).at(new))

    def describe(self, **about: Any) -> None:
        """Say what the model is, where that was not said yet; see `ModelSummary`."""
        if not (self.folder / _ABOUT).exists():
            about |= {"created": _iso(time.time())}
            write_file(self.folder / _ABOUT, json.dumps(about, indent=2).encode())

    def summary(self) -> ModelSummary:
        """What is kept, by the shards' keys alone."""
        about, files = read_fields(self.folder / _ABOUT), _files(self.folder)
        return ModelSummary(
            key=self.folder.name,
            name=str(about.get("name") or about.get("class") or "unknown"),
            dtype=about.get("dtype"),
            autocast=about.get("autocast"),
            sequences=self._count("sequences"),
            with_tokens=self._count("tokens"),
            damaged=sum(path.name.endswith(DAMAGED) for path in files),
            bytes=sum(map(_size, files)),
            used=_iso(self.last_used()),
        )

    def _count(self, kind: Kind) -> int:
        """Distinct sequences in the shards of a kind; those that cannot be read are passed over."""
        parts = []
        for path in self.shards(kind):
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
                keys = file.get_tensor("keys")
                if keys.dtype == np.uint8 and keys.shape == (len(keys), 16):
                    parts.append(Shard(keys, np.empty(len(keys))))
        return len(Lookup(Shard.joined(parts)))

    def last_used(self) -> float:
        """When a file was last written, or the shards last read."""
        return max((_changed(path) for path in _files(self.folder)), default=0.0)


class ReferenceCache:
    """Log-probs of reference models, kept on disk.

    Args:
        cache_dir: default: $DPO_KIT_CACHE, or ~/.cache/dpo_kit.
    """

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.folder = cache_folder(cache_dir, "reference")

    def check(self) -> None:
        """Find out early whether anything can be kept here; what may only be read still serves.

        Raises:
            InputError: the folder is not there and cannot be made, or is no folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            if not os.path.isdir(self.folder):
                raise InputError(
                    f"the reference's log-probs cannot be kept in {self.folder}: {error.strerror or error}",
                    field="reference.cache_dir",
                    mend="Name a folder that can be written, or set reference.mode to live.",
                ) from error

    def of_model(self, key: str) -> ModelStore:
        """What is kept of a model; see `dpo_kit.fingerprint.model_key`."""
        return ModelStore(self.folder / key)

    def known_key(self, files_key: str) -> str | None:
        """The model key of a model in files, where it was loaded before."""
        key = str(read_fields(self._place(files_key)).get("model"))
        return key if _KEY.fullmatch(key) else None

    def remember(self, files_key: str, key: str) -> None:
        """Keep the model key of a model in files, so that it need not be loaded the next time."""
        write_file(self._place(files_key), json.dumps({"model": key}).encode())

    def _place(self, files_key: str) -> Path:
        return self.folder / "files" / f"{files_key}.json"

    def stores(self) -> list[ModelStore]:
        """All models of which something is kept, the one that was used last first."""
        found = [ModelStore(path) for path in _entries(self.folder) if _KEY.fullmatch(path.name)]
        return sorted(found, key=ModelStore.last_used, reverse=True)

    def models(self) -> list[ModelSummary]:
        """What is kept, by model."""
        return [store.summary() for store in self.stores()]

    def verify(self) -> Iterator[tuple[Path, str]]:
        """Read every shard; gives each with what is wrong with it, "" where nothing is. Changes nothing."""
        for path in (path for store in self.stores() for path in store.shards()):
            try:
                read_shard(path)
            except FileNotFoundError:
                continue
            except (DamagedShardError, OSError) as damage:
                yield path, str(damage)
            else:
                yield path, ""

    def prune(
        self,
        *,
        older_than: float | None = None,
        model: str | None = None,
        damaged: bool = False,
        everything: bool = False,
        dry_run: bool = False,
    ) -> list[tuple[Path, int]]:
        """Remove what is not wanted any more.

        Args:
            older_than: models that were not used for so many days.
            model: one model, by its key or how that begins; with `older_than` where both hold.
            damaged: shards that were set aside, of any model.
            everything: all of it.
            dry_run: remove nothing.

        Returns:
            The files that were removed, or would be, and their bytes; those that died in writing are among
            them. Other files in the folders stay.

        Raises:
            InputError: nothing says what to remove, or two things do that contradict each other; no such
                model; or a file cannot be removed.
        """
        filtered = older_than is not None or model is not None
        if filtered == everything and not damaged:
            raise InputError(
                "it goes with no other choice" if everything else "nothing says what to remove",
                field="--all" if everything else "cache prune",
                mend="Give --older-than DAYS, --model KEY, --damaged or --all.",
            )
        if older_than is not None and not older_than >= 0:
            raise InputError(f"expected 0 or more, got {older_than}", field="--older-than")
        stores = self.stores()
        chosen = set(_chosen(stores, older_than, model) if filtered else stores if everything else [])
        removed = []
        for store in stores:
            for path in _files(store.folder):
                if _is_ours(path) and (
                    store in chosen or _left_behind(path) or (damaged and path.name.endswith(DAMAGED))
                ):
                    removed.append(path)
        if everything:
            removed += _files(self.folder / "files")
        sizes = [(path, _size(path)) for path in removed]
        if not dry_run:
            _remove(removed)
        return sizes


def _chosen(stores: Sequence[ModelStore], older_than: float | None, model: str | None) -> list[ModelStore]:
    named = [store for store in stores if store.folder.name.startswith(model or "")]
    if model is not None and (len(named) != 1 or not model):
        problem = f"no model has a key that begins with '{model}'"
        if named:
            problem = f"{len(named)} models have a key that begins with '{model}'"
        raise InputError(problem, field="--model", mend="`dpo-kit cache ls` shows the keys.")
    before = time.time() - (older_than or 0.0) * _DAY
    return [store for store in named if older_than is None or store.last_used() < before]


def _is_ours(path: Path) -> bool:
    name = path.name.removesuffix(DAMAGED)
    return name == _ABOUT or name.endswith(WRITING) or SHARD.fullmatch(name) is not None


def _left_behind(path: Path) -> bool:
    return path.name.endswith(WRITING) and _changed(path) < time.time() - _LEFT_BEHIND_S


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            problem = f"it cannot be removed: {error.strerror}"
            raise InputError(problem, file=path, field="--cache-dir") from error
    for folder in {path.parent for path in paths}:
        # It stays where it holds anything else.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _entries(folder: Path) -> list[Path]:
    """Sorted; none where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(
            f"the reference cache cannot be read: {error.strerror}", file=folder, field="reference.cache_dir"
        ) from error


def _files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_file()]


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _written_ns(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
