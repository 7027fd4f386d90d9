"""Folders, globs and packed files from elsewhere: nothing outside is read, nothing hangs or explodes."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import socket
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hostile import run
from pair_files import error_of, write

from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs, read_pairs
from dpo_kit.texts import read_prompts, read_texts

ROW = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def prompts_of(source: Any) -> list[str]:
    return list(load_pairs(source)["prompt"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rows, beside one with others."""
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.jsonl", ROW | {"prompt": name})
        (tmp_path / name / f"{name}.txt").write_text(f"{name}\n")
    return tmp_path / "own"


@pytest.mark.parametrize(
    "source", ["", "/*", "/*.jsonl", "/**/*.jsonl", "/../own/*.jsonl", "/../o[w]n/*.jsonl"]
)
def test_a_link_out_of_a_folder_is_refused(source: str, folder: Path) -> None:
    assert prompts_of(f"{folder}{source}") == ["own"]
    (folder / "more.jsonl").symlink_to(folder.parent / "other" / "other.jsonl")
    if "o[w]n" in source:
        # The folder before the first sign is the one above, which holds both.
        assert prompts_of(f"{folder}{source}") == ["other", "own"]
        return
    error = error_of(f"{folder}{source}")
    assert Path(str(error.file)).name == "more.jsonl"
    assert "link out of" in str(error)
    # What the user names himself is read.
    assert prompts_of(folder / "more.jsonl") == ["other"]


def test_links_to_folders(folder: Path) -> None:
    (folder / "away").symlink_to(folder.parent / "other", target_is_directory=True)
    assert prompts_of(folder) == ["own"]
    assert "link out of" in str(error_of(f"{folder}/**/*.jsonl"))
    assert "link out of" in str(error_of(f"{folder}/*/*.jsonl"))
    (folder / "away").unlink()
    (folder / "again").symlink_to(folder, target_is_directory=True)
    pairs, report = read_pairs(f"{folder}/**/*.jsonl")
    assert [pair["prompt"] for pair in pairs] == ["own"]
    assert report.ignored


def test_links_within_a_folder_and_to_it(folder: Path) -> None:
    (folder / "same.jsonl").symlink_to("own.jsonl")
    pairs, report = read_pairs(folder)
    assert [pair["prompt"] for pair in pairs] == ["own"]
    assert len(report.ignored) == 2
    (folder.parent / "linked").symlink_to(folder, target_is_directory=True)
    assert prompts_of(folder.parent / "linked") == ["own"]
    assert prompts_of(f"{folder.parent}/linked/*.jsonl") == ["own"]


def test_the_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    """Its snapshots are links to blobs beside them."""
    repository = tmp_path / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "1234" / "data"
    snapshot.mkdir(parents=True)
    write(repository / "blobs" / "abcd", ROW)
    (snapshot / "train.jsonl").symlink_to("../../../blobs/abcd")
    assert prompts_of(repository / "snapshots" / "1234") == ["q"]
    assert prompts_of(snapshot) == ["q"]
    write(tmp_path / "secret.jsonl", ROW)
    (snapshot / "more.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "link out of" in str(error_of(snapshot))


def test_texts_of_a_glob_stay_in_their_folder(folder: Path) -> None:
    assert list(read_texts([f"{folder}/*.txt"], field="f")) == ["own"]
    (folder / "more.txt").symlink_to(folder.parent / "other" / "other.txt")
    for read in (read_texts, read_prompts):
        with pytest.raises(InputError, match="link out of"):
            list(read([f"{folder}/*.txt"], field="f"))
    assert list(read_texts([f"{folder}/more.txt"], field="f")) == ["other"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "nowhere", "loop"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    kind: str, suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / f"x{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(folder)  # its path must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "/no/such/file", "loop": path}[kind])
    for source in (path, folder, f"{folder}/*"):
        error = error_of(source)
        assert Path(str(error.file)) == path
    if kind == "pipe" and suffix == ".csv":
        os.mkfifo(folder / "x.txt")
        for source in (f"{folder}/x.txt", f"{folder}/*.txt"):
            with pytest.raises(InputError, match="no regular file"):
                list(read_texts([source], field="f"))


def test_a_folder_that_is_called_like_a_file(folder: Path) -> None:
    (folder / "deep.jsonl").mkdir()
    write(folder / "deep.jsonl" / "a.jsonl", ROW)
    assert prompts_of(folder) == ["own", "q"]
    assert prompts_of(f"{folder}/*.jsonl") == ["own"]


def packed(path: Path) -> Path:
    """An archive whose member would lie outside."""
    content = json.dumps(ROW).encode()
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../escaped.jsonl", content)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '').replace('tgz', 'gz')}") as archive:
            member = tarfile.TarInfo("../escaped.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.tar.gz"])
def test_archives_are_not_unpacked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    path = packed(tmp_path / "set" / name)
    for source in (
        path,
        path.parent,
        f"{path.parent}/*",
        f"hf://{path.parent}@train",
        f"hf://{path.parent}#{name}",
    ):
        error = error_of(source)
        assert error.file is not None
    assert "npack" in str(error_of(path))
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("elsewhere", ["../secret.jsonl", "/etc/../{folder}/secret.jsonl"])
def test_a_readme_names_no_files_elsewhere(
    elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes the files of a split from the front matter of README.md."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "secret.jsonl", ROW)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROW)
    assert prompts_of(f"hf://{tmp_path}/set@train") == ["q"]
    named = elsewhere.format(folder=tmp_path)
    head = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {named}\n"
    (tmp_path / "set" / "README.md").write_text(f"---\n{head}---\n")
    error = error_of(f"hf://{tmp_path}/set@train")
    assert "link out of" in str(error)
    assert str(error.file).endswith("secret.jsonl")


# Bombs


class _Bomb(io.RawIOBase):
    """So many bytes of one kind, which are never there at once."""

    def __init__(self, size: int, byte: bytes) -> None:
        self._left, self._byte = size, byte

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        size = min(len(into), self._left)
        into[:size] = self._byte * size
        self._left -= size
        return size


def bomb(path: Path, size: int, start: bytes, byte: bytes) -> Path:
    """A packed file that begins with a row and goes on with so many bytes of one kind."""
    with path.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packing:
                packing.write(start)
                source = _Bomb(size, byte)
                while block := source.read(1 << 20):
                    packing.write(block)
        else:
            with zstandard.ZstdCompressor().stream_writer(file) as packing:
                packing.write(start)
                packing.write(byte * size)
    return path


LINE = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "start", "byte"),
    [
        ("a.jsonl.gz", LINE, b"x"),
        ("a.jsonl.zst", LINE, b" "),
        ("a.jsonl.gz", LINE + b'{"prompt": "', b"x"),
        ("a.csv.gz", b"prompt,chosen,rejected\na,b,", b"c"),
        ("a.json.zst", b'[{"prompt": "', b"x"),
        ("a.json.gz", b'{"rows": [{"prompt": "', b"x"),
        ("a.json.gz", b"[" + b"1," * 10, b" "),
    ],
)
def test_a_line_without_end_is_refused_before_it_is_held(
    name: str, start: bytes, byte: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are made small here, so that the test is: 64 MiB against 1 MiB."""
    for place in ("reading.LONGEST", "json_rows.LONGEST", "json_rows._LONGEST_HELD"):
        monkeypatch.setattr(f"dpo_kit.pairs.{place}", 1 << 20)
    path = bomb(tmp_path / name, 1 << 26, start, byte)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = error_of(path)
    assert error.file == str(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10  # KiB


def test_many_rows_of_a_packed_file_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(LINE * 1000)
    from dpo_kit.pairs.reading import rows_of_file

    assert sum(1 for _ in rows_of_file(str(path))) == 40_000


@pytest.mark.parametrize("source", ["https://host/a.jsonl", "ftp://host/a", "s3://bucket/x.jsonl"])
def test_a_url_is_no_source(source: str, capsys) -> None:
    assert run("data", "inspect", source) == 2
    assert "a URL is no source" in capsys.readouterr().err


def test_a_file_of_a_data_set_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "secret.jsonl", ROW)
    for file in ("../secret.jsonl", f"{tmp_path}/secret.jsonl"):
        assert "lies in it" in str(error_of(f"hf://{tmp_path}/set#{file}"))
        assert "lies in it" in str(error_of(f"hf://owner/name#{file}"))
