"""Runs a side on a task in a process of its own, and keeps what came of it so that it is not run twice."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from machine import OthersClock, machine
from workload import Task, write_task

from dpo_kit.errors import InputError
from dpo_kit.roofline import matmul_rates, shapes_in_use

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEWEST = ROOT / ".venv-trl-newest" / "bin" / "python"
# Kept runs that are older are run again: the machine's speed moves, and a ratio wants both sides of one time.
KEPT_FOR = timedelta(hours=12)
# Raised by hand when a change of the benchmark itself makes what was kept worthless.
FORMAT = 1
_VERSIONS = (
    "import json\nfrom importlib.metadata import version as v, PackageNotFoundError as E\nfound = {}\n"
    "for n in ('torch', 'transformers', 'trl'):\n"
    "    try: found[n] = v(n)\n    except E: pass\nprint(json.dumps(found))"
)


class SideFailed(Exception):  # noqa: N818
    """A side's process ended without a result; the message is what it printed last."""


def is_ours(side: str) -> bool:
    """Whether a side is dpo_kit in one of its forms."""
    return side.startswith("dpo_kit")


def newest_trl() -> str:
    """The version that trl-newest.txt pins."""
    lines = (HERE / "trl-newest.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("trl=="))


def python_of(side: str) -> str:
    """The interpreter of a side's environment."""
    return str(NEWEST) if side == "trl-newest" and NEWEST.exists() else sys.executable


@functools.cache
def _versions(python: str) -> dict[str, str]:
    found = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def check_side(side: str) -> None:
    """A peer's name says its version; the number must not be another's.

    Raises:
        InputError: that version of TRL is not installed where it is looked for.
    """
    if not side.startswith("trl-"):
        return
    wanted = newest_trl() if side == "trl-newest" else side.removeprefix("trl-")
    found = _versions(python_of(side)).get("trl", "not installed")
    if found != wanted and not found.startswith(f"{wanted}."):
        raise InputError(
            f"trl {wanted} is asked for, and trl in {python_of(side)} is {found}",
            field="--peer",
            mend="make bench sets the environments up; --peer none or naive needs no TRL.",
        )


def sources_digest() -> str:
    """Of dpo_kit's own source: what a kept run of ours is worth nothing without."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "dpo_kit").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """The commit of dpo_kit, with a plus where the tree has changes; empty outside a repository."""
    # Whichever git is on the path.
    found = subprocess.run(  # nosec B607
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip()


class Runner:
    """Runs sides, and keeps finished runs under a folder.

    Args:
        kept: where finished runs are kept; None to keep nothing.
        quiet: print no progress.
    """

    def __init__(self, kept: Path | None = None, quiet: bool = False) -> None:
        self.kept, self.quiet = kept, quiet
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / ".gitignore").write_text("*\n")

    def forget(self) -> None:
        """Delete what is kept."""
        for file in self.kept.glob("*.json") if self.kept else ():
            file.unlink()

    def run(self, side: str, task: Task, repeat: int = 0, profile: bool = False) -> dict[str, Any]:
        """One epoch of a side, or the kept result of it.

        Returns:
            What peers.py wrote, with matmul_rates (before and after), others_cores, at and commit.
        """
        kept = self._kept(side, task, repeat)
        if kept is not None and not profile:
            return kept
        self._say(f"{side}: {task.work}, {task.pairs} pairs, {task.dtype}, {task.order}, {task.reference}")
        with tempfile.TemporaryDirectory(prefix="dpo-kit-bench-") as scratch:
            folder = Path(scratch)
            write_task(task, folder)
            before = _rates(task)
            clock, source = OthersClock(), sources_digest()
            printed = _peers(side, [folder], task.threads, profile)
            others = clock.cores()
            if is_ours(side) and source != sources_digest():
                raise SideFailed(f"{side}: dpo_kit's source was changed while it ran; run it again")
            result = _result(folder) | {"matmul_rates": [before, _rates(task)], "others_cores": others}
        if profile:
            print(printed)
            return result
        return self._keep(side, task, repeat, result)

    def run_each(self, side: str, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Many small tasks of a side: a process each, libraries imported once; no rates are measured."""
        # Curves cross: a task that stands in several of them is run once.
        unique = list({json.dumps(asdict(task), sort_keys=True): task for task in tasks}.values())
        found = [(task, self._kept(side, task, 0)) for task in unique]
        todo = [task for task, result in found if result is None]
        done = [(task, result) for task, result in found if result is not None]
        if todo:
            self._say(f"{side}: {len(todo)} points of the curves")
        # In portions, so that not all is lost where this is cut off.
        for begin in range(0, len(todo), 8):
            portion = todo[begin : begin + 8]
            with tempfile.TemporaryDirectory(prefix="dpo-kit-bench-") as scratch:
                folders = [Path(scratch) / str(i) for i in range(len(portion))]
                for task, folder in zip(portion, folders, strict=True):
                    write_task(task, folder)
                _peers(side, folders, portion[0].threads, many=True)
                for task, folder in zip(portion, folders, strict=True):
                    done.append((task, self._keep(side, task, 0, _result(folder))))
        return [next(result for task, result in done if task == wanted) for wanted in tasks]

    def _kept(self, side: str, task: Task, repeat: int) -> dict[str, Any] | None:
        file = self._file(side, task, repeat)
        if file is None or not file.exists():
            return None
        if datetime.now(UTC) - datetime.fromtimestamp(file.stat().st_mtime, UTC) > KEPT_FOR:
            return None
        return json.loads(file.read_text(encoding="utf-8"))["result"]

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)

    def _key(self, side: str, task: Task, repeat: int) -> dict[str, Any]:
        here = machine(task.device)
        return {
            "format": FORMAT,
            "side": side,
            "task": asdict(task),
            "repeat": repeat,
            "versions": _versions(python_of(side)),
            "dpo_kit": sources_digest() if is_ours(side) else None,
            "machine": {name: here[name] for name in ("cpu", "cores", "gpu") if name in here},
        }

    def _file(self, side: str, task: Task, repeat: int) -> Path | None:
        if self.kept is None:
            return None
        text = json.dumps(self._key(side, task, repeat), sort_keys=True)
        return self.kept / f"{side}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _keep(self, side: str, task: Task, repeat: int, result: dict[str, Any]) -> dict[str, Any]:
        result = result | {"at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        if is_ours(side):
            result["commit"] = git_commit()
        file = self._file(side, task, repeat)
        if file is not None:
            write_whole(file, json.dumps({"key": self._key(side, task, repeat), "result": result}, indent=1))
        return result


def write_whole(file: Path, text: str) -> None:
    """Write to a temporary name and rename, so that a file is never half there."""
    written = file.with_name(file.name + ".writing")
    written.write_text(text, encoding="utf-8")
    os.replace(written, file)


def _rates(task: Task) -> dict[str, float]:
    shapes = shapes_in_use(
        task.model["hidden_size"], task.model["intermediate_size"], task.model["vocab_size"], task.device
    )
    return matmul_rates(task.dtype, shapes, device=task.device)


def _peers(
    side: str, folders: Sequence[Path], threads: int, profile: bool = False, many: bool = False
) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # TRL asks that features of its own be acknowledged; none of them is used here.
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    flags = ["--profile"] * profile + ["--many"] * many
    command = [python_of(side), str(HERE / "peers.py"), side, *map(str, folders), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not all((folder / "result.json").exists() for folder in folders):
        raise SideFailed(
            f"{side} failed with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
