"""Runs of a recipe in processes that die at a chosen place, and what such a run leaves behind.

A run is a row of events: each file opened for writing, renamed, made or removed (Python's audit events), and
each forward pass, backward pass and optimiser step. A `Death` is a place in that row: the process kills
itself with SIGKILL right before the event, or in the middle of the next write that goes beyond some bytes
(RLIMIT_FSIZE with the default action of SIGXFSZ: what was written up to there stays, as a crash would leave
it; writes of Arrow and of safetensors' Rust die so too). Processes are forked from a server that has imported
everything and computed nothing.

Which deaths are tried is `test_kills`' business.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PRELOADED = [
    *("dpo_kit.run", "dpo_kit.sft", "dpo_kit.candidates", "dpo_kit.report", "peft"),
    "matplotlib.pyplot",
]
# Event of the interpreter -> which of its arguments are the path, and the descriptor that it is relative to.
_FILE_EVENTS = {"os.rename": (1, 3), "os.mkdir": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1)}

# Where a path of a run or its caches belongs; the first that fits.
KINDS = {
    "tokens": ("cache/tokens",),
    "rows": ("cache",),
    "reference": ("reference",),
    "checkpoint": ("run/checkpoints",),
    "metrics": ("run/metrics",),
    "sft": ("run/sft",),
    "pairs": ("run/pairs",),
    "samples": ("run/evaluations", "run/samples", "run/.samples"),
    "model": ("run/model", "run/.model"),
    "report": ("run/plots", "run/report", "run/.report"),
    "run": ("run",),
}
COMPUTED = ("forward", "backward", "update")


@dataclass(frozen=True)
class Death:
    """When a process dies.

    Attributes:
        number: of the event, from 0, before which it happens.
        kind: only events of this kind are counted.
        torn_at: not there, but in the first write after it that goes beyond so many bytes of a file.
        seconds: after so many since the run began, whatever comes first.
        signal: that it sends itself; it may live on after another one than SIGKILL.
        times: how often, at one event after the other.
        launcher: the signal goes to the process that started it, and not to itself.
    """

    number: int = 1 << 62
    kind: str | None = None
    torn_at: int | None = None
    seconds: float | None = None
    signal: int = signal.SIGKILL
    times: int = 1
    launcher: bool = False


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        killed: whether it died of its `Death`.
        events: what it came to, the one before which it died at the end.
        error: traceback of what it raised.
        seconds: it took.
        status: of its exit; below 0 the signal that it died of.
        said: what a command wrote to stderr.
    """

    killed: bool
    events: list[str]
    error: str | None
    seconds: float
    status: int
    said: str = ""

    @property
    def kind(self) -> str:
        """Of the last event."""
        return kind_of(self.events[-1]) if self.events else "nothing"


def kind_of(event: str) -> str:
    """One of `KINDS` or `COMPUTED`."""
    if event in COMPUTED:
        return event
    path = event.split(" ", 1)[1]
    return next(kind for kind, starts in KINDS.items() if path.startswith(starts))


def run(content: dict[str, Any], folder: Path, *, resume: bool, death: Death | None = None) -> Ended:
    """`run_recipe` in a process of its own.

    Args:
        content: of the recipe.
        folder: of this run alone: run/, cache/, reference/ are in it.
        resume: as `run_recipe` has it.
        death: when it dies; None: it may live.
    """
    return _end_of(_carry_out, (content, resume), folder, death)


def command(arguments: list[str], folder: Path, *, death: Death | None = None) -> Ended:
    """The command line in a process of its own; see `run`."""
    return _end_of(_obey, (arguments,), folder, death)


def launch(arguments: list[str], folder: Path, *, death: Death | None = None) -> tuple[int, str]:
    """The command line on two ranks of torchrun, of which the second dies; exit status, and what was said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    told = json.dumps(None if death is None else asdict(death))
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DPO_KIT_CACHE": f"{folder}/cache"}
    done = subprocess.run(
        [sys.executable, *launcher, str(folder), told, *arguments],
        env=os.environ | own,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def _end_of(work: Any, arguments: tuple[Any, ...], folder: Path, death: Death | None) -> Ended:
    folder.mkdir(parents=True, exist_ok=True)
    said = folder.parent / f"{folder.name}.stderr"
    said.touch()
    with _server() as context:
        events, told = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(work, arguments, str(folder), str(said), death, told))
        process.start()
    told.close()
    seen: list[str] = []
    error, began = None, time.monotonic()
    while True:
        try:
            line = events.recv()
        except EOFError:
            break
        if isinstance(line, dict):
            error = line["error"]
        else:
            seen.append(line)
    process.join()
    status = process.exitcode
    assert status is not None
    dies_by = signal.SIGKILL if death is None or death.torn_at is None else signal.SIGXFSZ
    if status < 0 and status != -dies_by and error is None:
        error = f"exit status {status} after {seen[-3:]}"
    return Ended(status == -dies_by, seen, error, time.monotonic() - began, status, said.read_text())


@contextmanager
def _server() -> Iterator[Any]:
    """multiprocessing's server of forks; it begins with one thread, and no computation on several."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    wanted = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _live(
    work: Any, arguments: tuple[Any, ...], folder: str, said: str, death: Death | None, told: Any
) -> None:
    """What a process does; `told` takes its events, and the traceback where it raises."""
    os.environ["DPO_KIT_CACHE"] = f"{folder}/cache"
    # A limit of files' sizes is not for this one.
    output = said if death is None or death.torn_at is None else os.devnull
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _force_files()
    _count_events(_Counter(told, death, folder))
    if death is not None and death.seconds is not None:
        threading.Timer(death.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        work(*arguments)
    except Exception:
        told.send({"error": traceback.format_exc()})
        raise


def _carry_out(content: dict[str, Any], resume: bool) -> None:
    from dpo_kit.recipe import Recipe
    from dpo_kit.run import run_recipe

    run_recipe(Recipe.check(content), resume=resume, say=lambda line: None)


def _obey(arguments: list[str]) -> None:
    from dpo_kit.cli import main

    main(arguments)


def _force_files() -> None:
    """Make small data go the ways of large data."""
    from dpo_kit.pairs import row_cache
    from dpo_kit.reference import cached

    row_cache.BATCHES_IN_MEMORY = 0
    cached._TOGETHER = 8
    cached.SHARD_SEQUENCES = 5


class _Counter:
    """Tells of each event, and ends the process before one of them or in a write after it."""

    def __init__(self, told: Any, death: Death | None, folder: str) -> None:
        self._told, self._death, self._folder = told, death, folder.rstrip("/") + "/"
        self._number = 0

    def file(self, what: str, path: Any, beside: int = -1) -> None:
        """An event of a file; one elsewhere is none, nor is a folder that is there already."""
        if isinstance(path, int):
            return
        at = os.readlink(f"/proc/self/fd/{beside}") if beside >= 0 else os.getcwd()
        path = os.path.normpath(os.path.join(at, os.fsdecode(path)))
        if path.startswith(self._folder) and not (what == "os.mkdir" and os.path.isdir(path)):
            self(f"{what} {path.removeprefix(self._folder)}")

    def __call__(self, event: str) -> None:
        self._told.send(event)
        death = self._death
        if death is None or (death.kind is not None and kind_of(event) != death.kind):
            return
        number, self._number = self._number, self._number + 1
        if death.torn_at is not None and number == death.number:
            _limit_writes(death.torn_at)
        elif death.number <= number < death.number + death.times:
            os.kill(os.getppid() if death.launcher else os.getpid(), death.signal)


def _limit_writes(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _count_events(count: _Counter) -> None:
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from transformers import PreTrainedModel

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            count.file("open", args[0])
        elif event in _FILE_EVENTS:
            path, beside = _FILE_EVENTS[event]
            count.file(event, args[path], args[beside])

    def forward(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, PreTrainedModel) and hasattr(module, "lm_head"):
            count("forward")

    backward = torch.autograd.backward

    def counted(*args: Any, **keywords: Any) -> None:
        count("backward")
        backward(*args, **keywords)

    sys.addaudithook(audit)
    register_module_forward_pre_hook(forward)
    torch.autograd.backward = counted
    register_optimizer_step_pre_hook(lambda *_: count("update"))
    register_optimizer_step_post_hook(lambda *_: count("update"))


def draw(events: list[str], kind: str, generator: random.Random) -> Death:
    """A death at an event of a kind, by the events of a run that lived; in two of five a torn write."""
    number = generator.randrange(sum(kind_of(event) == kind for event in events))
    if kind in COMPUTED or generator.random() < 0.6:
        return Death(number, kind)
    return Death(number, kind, torn_at=generator.choice([16, 300]))


# What is measured, or what a resume has had to do again.
_TIMES = ("runtime", "seconds", "per_second", "peak_memory", "reference_")
_WITH_TIMES = ("metrics.jsonl", "summary.json", "figures.json", "train.samples.jsonl.meta")


def left(folder: Path) -> dict[str, Any]:
    """What a finished run has left, as far as it must not depend on how often it died."""
    from safetensors.torch import load_file

    from dpo_kit.json_lines import read_lines

    at = folder / "run"
    weights = {
        f"{path.name}:{name}": tensor.tolist()
        for path in sorted((at / "model").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    texts = {}
    for path in sorted(p for p in at.rglob("*") if p.suffix in (".jsonl", ".yaml", ".json")):
        inside = path.relative_to(at)
        if inside.parts[0] not in ("checkpoints", "model") and inside.name not in _WITH_TIMES:
            texts[str(inside)] = path.read_text(encoding="utf-8").replace(str(folder), "")
    for path in sorted(at.rglob("metrics.jsonl")):
        texts[str(path.relative_to(at))] = [_timeless(line) for line in read_lines(path)]
    summary = _timeless(json.loads((at / "summary.json").read_text()))
    summary.pop("recipe")
    # Its sum is of fp32 from one logged line to the next, or to a checkpoint.
    summary["train_loss"] = float(f"{summary['train_loss']:.6g}")
    checkpoints = sorted(path.name for path in (at / "checkpoints").iterdir())
    return {
        "weights": weights,
        "texts": texts,
        "summary": summary,
        "checkpoints": checkpoints,
        "reference": _cached_values(folder / "reference"),
        "folder": sorted(path.name for path in at.iterdir()),
        "unfinished": unfinished(folder),
    }


def _timeless(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if not any(part in name for part in _TIMES)}


def _cached_values(folder: Path) -> dict[str, float]:
    from dpo_kit.reference import ReferenceCache

    found = {}
    for store in ReferenceCache(folder).stores():
        for shard in store.read_new("sequences", set()):
            for key, value in zip(shard.keys, shard.sums.tolist(), strict=True):
                found.setdefault(f"{store.folder.name}:{key.tobytes().hex()}", value)
    return found


def unfinished(folder: Path) -> list[str]:
    """What a process that died has left under a temporary name."""
    signs = (".writing", "making-", "tmp", ".narrow")
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if any(sign in path.name for sign in signs) and "/." not in str(path.parent.relative_to(folder))
    )


def differences(first: Any, second: Any, at: str = "") -> list[str]:
    """Where two things of dictionaries and lists differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            line
            for key in sorted(first.keys() | second.keys())
            for line in differences(first.get(key), second.get(key), f"{at}/{key}")
        ]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{at}/{i}")]
    return [] if first == second else [f"{at}: {str(first)[:200]} and {str(second)[:200]}"]


class _Nobody:
    """Takes what is told."""

    def send(self, told: Any) -> None:
        return


if __name__ == "__main__":
    own_folder, own_death, *own_arguments = sys.argv[1:]
    _force_files()
    if (fields := json.loads(own_death)) is not None and os.environ["RANK"] == "1":
        _count_events(_Counter(_Nobody(), Death(**fields), own_folder))
    _obey(own_arguments)
