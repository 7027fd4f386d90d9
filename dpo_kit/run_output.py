"""What a run leaves behind: its folder opened, where it comes from, and in the end model, summary and report.

On several ranks the first one writes; all of them come here together.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PreTrainedModel

from dpo_kit import ranks
from dpo_kit.config import PreferenceConfig
from dpo_kit.disk import writing
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import (
    alone_in,
    check_same_run,
    describe_environment,
    digest_recipe,
    is_finished,
    make_room,
    replace_folder,
    without_leftovers,
    write_text,
)


@dataclass
class RunResult:
    """What a run came to.

    Attributes:
        folder: the run folder.
        summary: what summary.json holds.
        page: the report, where one was made.
    """

    folder: Path
    summary: dict[str, Any]
    page: Path | None = None


def finished_run(recipe: Recipe, folder: Path, resolved: dict[str, Any], say: Say) -> RunResult | None:
    """What a resume finds done already: all of the run, or nothing. A report that is missing is made.

    Raises:
        InputError: the folder holds a run of another recipe, or no run.
    """
    check_same_run(folder, resolved)
    if not ranks.broadcast(is_finished(folder, resolved)):
        return None
    say(f"the run in {folder} is finished")
    result = None
    if ranks.is_first():
        page = folder / "report.html"
        summary = json.loads((folder / "summary.json").read_text())
        result = RunResult(folder, summary, page if page.exists() else _report(recipe, folder, say))
    return ranks.broadcast(result)


def write_origin(
    folder: Path,
    resolved: dict[str, Any],
    config: PreferenceConfig,
    policy: PreTrainedModel,
    data: dict[str, Dataset | None],
) -> dict[str, Any]:
    """Write recipe.yaml and environment.json, what the run is made from, and in; what the latter holds."""
    # The other ranks' weights are the same, or not there yet.
    environment = ranks.by_first(lambda: describe_environment(config, policy, data))
    if ranks.is_first():
        write_text(folder / "recipe.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        write_text(folder / "environment.json", json.dumps(environment, indent=2))
    return environment


@contextlib.contextmanager
def open_folder(folder: Path, resume: bool, say: Say) -> Iterator[None]:
    """The run folder, without what an earlier run left there unless this one goes on from it.

    As long as this lasts no other run can open it.

    Raises:
        InputError: another one has it open, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if ranks.is_first():
            if not resume and (moved := make_room(folder)):
                say(f"the earlier run in {folder} is now {moved}")
            stack.enter_context(alone_in(folder, "run", "train.output_dir"))
        ranks.wait()
        yield


def close_run(
    recipe: Recipe,
    folder: Path,
    resolved: dict[str, Any],
    figures: dict[str, Any],
    save_model: Callable[[str], None],
    say: Say,
) -> RunResult:
    """model/, summary.json with the figures, and the report: what makes a run whole."""
    written = without_leftovers(folder / ".model.writing")
    # All ranks: a model in shards is gathered.
    with writing("the model", folder / "model", partial=written):
        save_model(str(written))
    ranks.wait()
    result = None
    if ranks.is_first():
        replace_folder(written, folder / "model")
        figures["recipe"] = digest_recipe(resolved)
        write_text(folder / "summary.json", json.dumps(figures, indent=2))
        result = RunResult(folder, figures, _report(recipe, folder, say))
    return ranks.broadcast(result)  # type: ignore[return-value]


def _report(recipe: Recipe, folder: Path, say: Say) -> Path | None:
    if not recipe.report.enabled:
        return None
    from dpo_kit.report import write_report

    try:
        return write_report(folder)
    except InputError as error:
        # The run itself is whole; a picture library that is not there must not turn it into a failure.
        warnings.warn(f"no report was made: {error}", DpoKitWarning, stacklevel=2)
        return None
