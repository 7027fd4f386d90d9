"""The whole comparison: start, reward model, every run, then its tables, pictures and page.

What lies in the folder is `dpo_kit.comparison`'s to say. A comparison that was stopped goes on: what is
finished is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.checkpoint_folders import put_aside
from dpo_kit.comparison.checks import check_comparison
from dpo_kit.comparison.costs import write_costs
from dpo_kit.comparison.execute import (
    REFERENCE_FILE,
    Ended,
    Job,
    carry_out,
    changed_key,
    default_workers,
    has_cached_reference,
    outcome,
)
from dpo_kit.comparison.folder import open_folder
from dpo_kit.comparison.matched import write_matched
from dpo_kit.comparison.progress import Progress
from dpo_kit.comparison.results import read_table, write_frontier, write_runs
from dpo_kit.comparison.runs import Run, output_folder, quick_form, runs_of
from dpo_kit.comparison.tables import print_tables
from dpo_kit.errors import InputError, TrainingError
from dpo_kit.measurement import Say
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import alone_in, write_text
from dpo_kit.start import is_made
from dpo_kit.yaml_file import apply_override, read_yaml

# Longest first, so that the workers end together.
_ORDER = ("ppo", "rloo", "best_of_n", "train")


def run_frontier(recipe_path: Path, overrides: list[str], *, quick: bool, say: Say) -> dict[str, Any]:
    """Carry a comparison out, or go on with it where it stopped.

    Args:
        recipe_path: of a recipe with a section `frontier`.
        overrides: key.path=value.
        quick: its quick form.
        say: gets lines of progress.

    Returns:
        folder, the rows of its tables by their names (runs, frontier, matched, costs), and failed: the names
        of the runs that did not end as they should.

    Raises:
        InputError: the recipe, what it names, or a folder that holds another comparison, or is at work.
        TrainingError: what all runs start from could not be made.
    """
    recipe = load_comparison(recipe_path, overrides, quick)
    folder = output_folder(recipe)
    runs = runs_of(recipe, folder)
    check_comparison(recipe, runs)
    with alone_in(folder, "comparison", "frontier.output_dir"):
        open_folder(folder, recipe, runs)
        _make_shared(recipe, folder, runs, say)
        _carry_out_runs(recipe, folder, runs, say)
        write_matched(folder)
        write_costs(folder)
        _draw(folder, say)
        print_tables(folder)
    tables = {name: read_table(folder / f"{name}.csv") for name in ("runs", "frontier", "matched", "costs")}
    failed = [row["run"] for row in tables["runs"] if row["outcome"] == "failed"]
    return {"folder": str(folder), **tables, "failed": failed}


def _make_shared(recipe: Recipe, folder: Path, runs: Sequence[Run], say: Say) -> None:
    """What all runs start from, as far as it is not there."""
    if not is_made(recipe, folder / "start"):
        _make(Job("the start", "start", folder, folder / "start.log"), say)
    if _needs_reward_model(recipe, runs) and not (folder / "reward_model" / "summary.json").exists():
        _make(Job("the reward model", "reward_model", folder, folder / "reward_model.log"), say)
    if not (folder / REFERENCE_FILE).exists() and any(map(has_cached_reference, runs)):
        _make(Job("the reference's log-probs", "reference", folder, folder / "reference.log"), say)


def load_comparison(recipe_path: Path, overrides: Sequence[str], quick: bool) -> Recipe:
    """The recipe of a comparison, or of its quick form; overrides have the last word.

    Raises:
        InputError: naming file, line and key.
    """
    content, lines = read_yaml(recipe_path)
    if quick:
        content = quick_form(content)
        for key in content["frontier"]["quick"]:
            lines[key] = lines.get(f"frontier.quick.{key}")
    for override in overrides:
        lines[apply_override(content, override)] = None
    recipe = Recipe.check(content, str(recipe_path), lines)
    if recipe.frontier is None:
        raise InputError(
            "the recipe names no methods to compare",
            file=recipe_path,
            field="frontier",
            mend="See recipes/sentiment-small.yaml.",
        )
    return recipe


def _needs_reward_model(recipe: Recipe, runs: Sequence[Run]) -> bool:
    learned = [
        run.command == "best_of_n"
        or run.recipe.ppo.reward == "model"
        or run.recipe.ppo.value == "reward_model"
        for run in runs
        if run.command != "train"
    ]
    return recipe.reward_model.path is None and any(learned)


def _make(job: Job, say: Say) -> None:
    """Make what all runs need, in a process of its own."""
    say(f"making {job.name} (see {job.log})")
    endings: list[Ended] = []
    carry_out([job], 1, endings.append)
    if endings[0].status:
        raise TrainingError(f"{job.name} could not be made:\n{endings[0].last_lines()}\nMore in {job.log}")


def _carry_out_runs(recipe: Recipe, folder: Path, runs: Sequence[Run], say: Say) -> None:
    """Run what is not finished; the tables of runs and of what they measured follow each that ends."""
    assert recipe.frontier is not None
    wanted = [run for run in runs if not outcome(run)]
    if finished := len(runs) - len(wanted):
        say(f"{finished} of {len(runs)} runs are finished already")
    if changed := [key for run in wanted if (key := changed_key(run))]:
        keys = ", ".join(dict.fromkeys(changed))
        say(f"{len(changed)} finished runs are put aside and made anew, because {keys} changed")
    failures: dict[str, str] = {}
    workers = min(recipe.frontier.workers or default_workers(), max(len(wanted), 1))
    progress = Progress(runs, wanted, workers)

    def ended(ending: Ended) -> None:
        run = named[ending.job.name]
        if not outcome(run):
            failures[run.name] = ending.last_lines(1) or f"exit status {ending.status}"
        write_runs(folder, runs, failures)
        write_frontier(folder, runs)
        say(progress.ended(run, ending.seconds))
        if run.name in failures:
            say(f"{run.name} failed, see {ending.job.log}:\n{ending.last_lines()}")

    named = {run.name: run for run in wanted}
    jobs = [_job(run) for run in sorted(wanted, key=lambda run: _ORDER.index(run.command))]
    carry_out(jobs, workers, ended)
    write_runs(folder, runs, failures)
    write_frontier(folder, runs)


def _job(run: Run) -> Job:
    """A run as a process: its recipe is written, and what another recipe left in its folder put aside."""
    place = run.folder.with_name(f"{run.name}.yaml")
    place.parent.mkdir(parents=True, exist_ok=True)
    resolved = run.recipe.resolved(run.recipe.training_config())
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    known = place.exists() and place.read_text(encoding="utf-8") == text
    if not known and run.folder.exists():
        put_aside(run.folder)
    write_text(place, text)
    return Job(run.name, run.command, place, place.with_suffix(".log"))


def _draw(folder: Path, say: Say) -> None:
    """Pictures and the page; the tables stand without them."""
    try:
        from dpo_kit.comparison.page import write_page

        say(f"page: {write_page(folder)}")
    except (InputError, ImportError) as error:
        say(f"warning: no page was made: {error}")
