"""Parts of a comparison as processes of their own, several at once: so that what each takes is its own.

`carry_out` starts them; each runs `main`, as `python -m dpo_kit.comparison.execute COMMAND PLACE`. What they
make, and which of them are wanted, is said elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_kit.comparison.runs import Run, runs_of
from dpo_kit.errors import DivergedError, DpoKitError
from dpo_kit.losses import make_objective
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import digest_recipe, flat_keys, write_text
from dpo_kit.shown_text import visible, without_secrets
from dpo_kit.start import make_start, started
from dpo_kit.yaml_file import read_yaml

# Where a run that stopped at a loss that is not finite says so: that is a result, and is not tried again.
DIVERGED_FILE = "diverged.json"

# What computing the reference's log-probs took.
REFERENCE_FILE = "reference.json"

# How long an ended process may take to go.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Job:
    """A process to be: `command` is one of `COMMANDS`, `place` what it works on, `log` where it writes."""

    name: str
    command: str
    place: Path
    log: Path


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, and its seconds from start to end."""

    job: Job
    status: int
    seconds: float

    def last_lines(self, count: int = 3) -> str:
        """The end of its log."""
        text = self.job.log.read_text(encoding="utf-8", errors="replace")
        # A progress bar ends its lines with a carriage return, and colours them.
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
        return "\n".join([line for line in lines if line.strip()][-count:])


def carry_out(jobs: Sequence[Job], workers: int, ended: Callable[[Ended], None]) -> None:
    """Run processes, `workers` at once, each with its share of the cores and, where there are any, a GPU.

    However this is left, no process stays behind; they also end when this process is killed.

    Args:
        jobs: in the order in which they are started.
        workers: how many at once.
        ended: called with each that has ended.
    """
    waiting, running = deque(jobs), dict[subprocess.Popen[bytes], tuple[Job, int, float]]()
    slots = list(range(workers))
    with _ended_by_sigterm():
        try:
            while waiting or running:
                while waiting and slots:
                    job, slot = waiting.popleft(), slots.pop(0)
                    running[_start(job, _environment(slot, workers))] = job, slot, time.perf_counter()
                time.sleep(0.05)
                for process in [process for process in running if process.poll() is not None]:
                    job, slot, began = running.pop(process)
                    slots.append(slot)
                    ended(Ended(job, int(process.returncode), time.perf_counter() - began))
        finally:
            _end(list(running))


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dpo_kit.comparison.execute", job.command, str(job.place)]
    with open(job.log, "ab") as log:
        # A session of its own: an interrupt from the keyboard reaches this process alone, which ends them.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM unwinds this process as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """One for each GPU; without one half the cores, or 2 where there are as many."""
    return torch.cuda.device_count() or max(min(2, cores()), cores() // 2)


def _environment(slot: int, workers: int) -> dict[str, str]:
    """The environment of the process in a slot: a share of the cores and one GPU, in turn."""
    found = os.environ | {"GOMP_SPINCOUNT": "0", "PYTHONUNBUFFERED": "1"}
    if workers > 1:
        threads = max(1, cores() // workers)
        if (given := found.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, int(given))
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    gpus = torch.cuda.device_count()
    if workers > 1 and gpus > 1:
        visible = found.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return found


def recipe_digest(recipe: Recipe) -> str:
    """What tells a run's recipe from another."""
    return digest_recipe(recipe.resolved(recipe.training_config()))


def outcome(run: Run) -> str:
    """How a run of this very recipe ended: done, diverged, or "" where it has not."""
    return "" if changed_key(run) else _ended(run)


def changed_key(run: Run) -> str | None:
    """The key in which a run that ended was of another recipe; None where it was of this, or did not end.

    Where the folder lies, and what changes no result, makes no other recipe; nor does a key that the run's
    version did not know yet, where it has its default.
    """
    digest = next((found for file in _ENDINGS if (found := _digest_in(run.folder / file))), None)
    if digest is None or digest == recipe_digest(run.recipe):
        return None
    before = _written_recipe(run.folder)
    if before is None or digest_recipe(before) != digest:
        return "recipe"
    recipe = Recipe.check(before)
    then, now = (_comparable(r.resolved(r.training_config())) for r in (recipe, run.recipe))
    return next((key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)), None)


# What a run leaves at its end, and how it ended then.
_ENDINGS = {"summary.json": "done", DIVERGED_FILE: "diverged"}

# Keys of a run's recipe that change no result.
FREE_KEYS = ("data.num_proc", "data.cache_dir", "reference.cache_dir", "train.disable_tqdm")


def _ended(run: Run) -> str:
    return next((word for file, word in _ENDINGS.items() if _digest_in(run.folder / file)), "")


def _digest_in(file: Path) -> str | None:
    return json.loads(file.read_text(encoding="utf-8")).get("recipe") if file.exists() else None


def _written_recipe(folder: Path) -> dict[str, Any] | None:
    """What a run wrote of its recipe; where it ended before that, what it was given."""
    for place in (folder / "recipe.yaml", folder.with_name(f"{folder.name}.yaml")):
        if place.exists():
            return read_yaml(place)[0]
    return None


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    """Its keys without the free ones, and paths in the comparison's folder as they lie in it."""
    folder = str(Path(resolved["train"]["output_dir"]).parent.parent)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(each) for each in value]
        inside = isinstance(value, str) and (value == folder or value.startswith(f"{folder}/"))
        return f"FOLDER{value.removeprefix(folder)}" if inside else value

    found = flat_keys(json.loads(json.dumps(resolved)))
    return {key: placed(value) for key, value in found.items() if key not in FREE_KEYS}


def _say(line: str) -> None:
    print(visible(without_secrets(line)), flush=True)


def _start_of(folder: Path) -> None:
    """start/ of a comparison."""
    recipe = Recipe.load(folder / "recipe.yaml")
    (folder / "start").mkdir(exist_ok=True)
    make_start(recipe, folder / "start", _say)


def _reward_model_of(folder: Path) -> None:
    """reward_model/ of a comparison."""
    from dpo_kit.comparison.reward_model import trained_reward_model

    recipe = Recipe.load(folder / "recipe.yaml")
    trained_reward_model(started(recipe, folder / "start"), folder / "reward_model", _say)


def has_cached_reference(run: Run) -> bool:
    """Whether a run compares its policy with log-probs of the start that are kept on disk."""
    if run.command != "train" or run.recipe.reference.mode not in ("auto", "cached"):
        return False
    objective = make_objective(run.recipe.loss)
    return objective.needs_reference and not objective.needs_distributions


def _reference_of(folder: Path) -> None:
    """The log-probs of the SFT policy on the pairs, which the runs of a comparison then find."""
    from dpo_kit.run import fill_cache

    runs = runs_of(Recipe.load(folder / "recipe.yaml"), folder)
    recipe = next(run.recipe for run in runs if has_cached_reference(run))
    # In no run's folder: this is work of them all.
    recipe = recipe.model_copy(update={"train": recipe.train | {"output_dir": str(folder / "reference")}})
    figures = fill_cache(recipe, say=_say)
    write_text(folder / REFERENCE_FILE, json.dumps(figures))


def _run_by(module: str, name: str, **keywords: Any) -> Callable[[Path], None]:
    def carried_out(place: Path) -> None:
        recipe = Recipe.load(place)
        digest = recipe_digest(recipe)
        folder = Path(str(recipe.training_config().output_dir))
        function = getattr(importlib.import_module(f"dpo_kit.{module}"), name)
        try:
            function(recipe, say=_say, **keywords)
        except DivergedError as error:
            write_text(folder / DIVERGED_FILE, json.dumps({"recipe": digest, "problem": str(error)}))
            _say(str(error))

    return carried_out


COMMANDS: dict[str, Callable[[Path], None]] = {
    "start": _start_of,
    "reward_model": _reward_model_of,
    "reference": _reference_of,
    "train": _run_by("run", "run_recipe", resume=True),
    "ppo": _run_by("comparison.ppo_run", "run_ppo", resume=True),
    "rloo": _run_by("comparison.rloo_run", "run_rloo", resume=True),
    "best_of_n": _run_by("comparison.best_of_n", "run_best_of_n"),
}


def _end_with_the_one_who_started() -> None:
    """Leave when stdin is closed: the process at its other end is gone, however it went."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Carry out one part of a comparison; the exit status."""
    _end_with_the_one_who_started()
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    command, place = arguments
    try:
        COMMANDS[command](Path(place))
    except DpoKitError as error:
        _say(f"error: {error}")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
