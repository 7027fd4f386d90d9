"""A SOURCE as the user writes it -> where its rows come from: files, or one split of a hub data set.

SOURCE is a file, a folder, a glob, a name of the `catalogue` (`name` or `name@split`), or on the hub

- `hf://owner/name[/config]@split`, one split of a data set,
- `hf://owner/name#folder@split`, of one folder in it alone (Anthropic/hh-rlhf#harmless-base@test),
- `hf://owner/name#path/file.jsonl.gz`, one file in it, read as files here are.

After `hf://` a local folder (`./folder`, `/folder`) that is laid out alike works too. How a file becomes
rows is the business of `reading`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs import catalogue
from dpo_kit.pairs.found_files import matched, require_inside, require_regular, walked
from dpo_kit.pairs.mixed_splits import mixed_splits
from dpo_kit.pairs.reading import BATCH_ROWS, RawRow, rows_of_file, supported, supported_names
from dpo_kit.pairs.schema import Place

HUB = "hf://"
# What `Dataset.save_to_disk` lays beside its arrow files.
_NOT_ROWS = frozenset(("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"))
# Never unpacked: what is in them could lie anywhere.
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
# The builders of `datasets` that read rows of text.
_BUILDERS = frozenset(("arrow", "cache", "csv", "json", "parquet", "text"))


@dataclass(frozen=True, slots=True)
class Source:
    """One file or hub split: the name that stands in places and reports, and a fresh pass over its rows."""

    name: str
    rows: Callable[[], Iterator[RawRow]]


def find_sources(sources: str | Path | Sequence[str | Path]) -> tuple[list[Source], list[str], list[str]]:
    """All sources in the given order, those of a folder or glob sorted by path; the files ignored; remarks,
    where a folder or glob has training and held-out data.

    Raises `InputError` for whatever is not there, not supported, or empty of supported files. Rows are not
    looked at; hub data sets are not fetched before their `rows` are asked for.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise InputError(
            "no source of pairs is given", mend="Name a file, a folder, a glob or hf://owner/name@split"
        )
    found: list[Source] = []
    ignored: list[str] = []
    remarks: list[str | None] = []
    for source in given:
        if not isinstance(source, str | Path):
            raise InputError(f"a source must be text or a path, found {type(source).__name__}")
        listed = _listed(source)
        if listed or str(source).startswith(HUB):
            found.append(_hub_source(listed or str(source)))
            continue
        files = _files(str(source), ignored)
        remarks.append(mixed_splits(str(source), files))
        found += [Source(path, lambda path=path: rows_of_file(path)) for path in files]  # type: ignore[misc]
    return found, ignored, [remark for remark in remarks if remark]


def _listed(source: str | Path) -> str | None:
    """The hub source that a name of the catalogue stands for; None where it is a path, or no such name."""
    name, _, split = str(source).partition("@")
    entry = catalogue.named(name)
    if entry is None or isinstance(source, Path) or os.path.exists(source):
        return None
    return entry.at(split) if split else entry.source


def _files(source: str, ignored: list[str]) -> list[str]:
    """The supported files that a path or glob means; what else was met is added to `ignored`."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        if not supported(path):
            raise InputError(
                "the file is of no known kind",
                file=path,
                mend="Unpack the archive first"
                if path.lower().endswith(_ARCHIVES)
                else f"Known endings: {supported_names()}",
            )
        return [path]
    if os.path.isdir(path):
        none = f"the folder holds no file of pairs ({supported_names()})"
        return _picked(path, walked(path), source, ignored, none)
    if os.path.exists(path):
        require_regular(path)
    if glob.has_magic(path):
        none = f"no file of pairs ({supported_names()}) matches"
        return _picked(*matched(path), source, ignored, none)
    if "://" in path:
        raise InputError(
            "a URL is no source", file=source, mend=f"Fetch the file, or write {HUB}owner/name@split"
        )
    near = catalogue.nearest(source.partition("@")[0])
    mend = f"Did you mean '{near}' of the catalogue (data list)?" if near else _nearby(path)
    raise InputError("no such file or folder", file=source, mend=mend)


def _nearby(path: str) -> str:
    """What the nearest folder above a missing path holds, as a hint."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"The folder {folder} is not there either (working folder: {os.getcwd()})"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{folder} holds: {listed}" if names else f"{folder} is empty"


def _picked(
    folder: str, paths: Iterator[str] | list[str], source: str, ignored: list[str], none: str
) -> list[str]:
    """Those of a folder's files that can be read; links that lead to one of them again are ignored too."""
    picked: dict[str, str] = {}
    for path in paths:
        may_be_rows = supported(path) and os.path.basename(path) not in _NOT_ROWS
        real = require_inside(folder, path) if may_be_rows else ""
        if may_be_rows and real not in picked:
            picked[real] = path
        else:
            ignored.append(path)
    if not picked:
        packed = [path for path in ignored if path.lower().endswith(_ARCHIVES)]
        mend = f"{os.path.basename(packed[0])} is an archive: unpack it first" if packed else None
        raise InputError(none, file=source, mend=mend)
    return list(picked.values())


def _hub_source(source: str) -> Source:
    where, at, split = source.removeprefix(HUB).rpartition("@")
    if not at and "#" in split and supported(split):
        return _hub_file(source, split)
    if not at or not where or not split:
        raise InputError("the split is not given", file=source, mend=f"Write {HUB}owner/name[/config]@split")
    where, _, folder = where.partition("#")
    if where.startswith((".", "/", "~")):
        name, config = _local(where, source), None
    else:
        name, config = _owner_and_name(where, source)
    return Source(source, lambda: _hub_rows(source, name, config, folder or None, split))


def _hub_file(source: str, where: str) -> Source:
    """One file of a hub data set, or of a local folder that is laid out like one."""
    where, _, file = where.partition("#")
    if os.path.isabs(file) or ".." in file.split("/"):
        raise InputError("a file of a data set lies in it", file=source, mend="Give the file's path alone")
    if where.startswith((".", "/", "~")):
        path = os.path.join(_local(where, source), file)
        if not os.path.isfile(path):
            raise InputError("no such file", file=source, mend=_nearby(path))
        return Source(source, lambda: rows_of_file(path))
    name, config = _owner_and_name(where, source)
    if config is not None:
        raise InputError("a file is of no config", file=source, mend=f"Write {HUB}{name}#{file}")
    return Source(source, lambda: rows_of_file(_downloaded(source, name, file)))


def _local(where: str, source: str) -> str:
    folder = os.path.expanduser(where)
    if not os.path.isdir(folder):
        raise InputError("no such folder", file=source, mend=_nearby(folder))
    return folder


def _owner_and_name(where: str, source: str) -> tuple[str, str | None]:
    """`owner/name[/config]` -> (`owner/name`, config)."""
    parts = where.split("/")
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise InputError(
            "this is not the name of a hub data set",
            file=source,
            mend=f"Write {HUB}owner/name[/config]@split, or {HUB}./folder@split",
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _hub_rows(source: str, name: str, config: str | None, folder: str | None, split: str) -> Iterator[RawRow]:
    data = _hub_data(source, name, config, folder, split)
    number = 0
    for batch in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield row, Place(source, row=number)


def _hub_data(source: str, name: str, config: str | None, folder: str | None, split: str) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config, data_dir=folder)
        _check_builder(source, name, builder)
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except InputError:
        raise
    except Exception as error:  # of many kinds: hub, http, offline mode, builder, unknown config or split
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        mend = (
            "Check owner, name, config and split, and that the hub can be reached; "
            "without the hub, give the path of the data's files instead"
        )
        if "scripts are no longer supported" in cause:
            mend = "Download the parquet files of its branch refs/convert/parquet, and give their path"
        raise InputError(f"the data set cannot be loaded: {cause}", file=source, mend=mend) from error


def _check_builder(source: str, name: str, builder: Any) -> None:
    """Refuse files that are no rows of text, archives, and files that its README finds elsewhere."""
    kind = type(builder).__module__.removeprefix("datasets.packaged_modules.").partition(".")[0]
    if kind not in _BUILDERS:
        mend = "Give the path of files with rows of text"
        raise InputError(f"the data set is of files that are not read here ({kind})", file=source, mend=mend)
    is_local = name.startswith((".", "/", "~"))
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if file.lower().endswith(_ARCHIVES):
                raise InputError(f"{file} is an archive", file=source, mend="Unpack it first")
            if is_local:
                require_inside(os.path.expanduser(name), file)
            elif not file.startswith("hf://datasets/"):
                raise InputError(f"the data set takes a file from elsewhere: {file}", file=source)


def _downloaded(source: str, name: str, file: str) -> str:
    """The file's path in the hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, file, repo_type="dataset")
    except Exception as error:  # of many kinds: hub, http, offline mode, no such file
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"the file cannot be loaded: {cause}",
            file=source,
            mend="Check owner, name and file, and that the hub can be reached; "
            "without the hub, give the path of the file instead",
        ) from error
