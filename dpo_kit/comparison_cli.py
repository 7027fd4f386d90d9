"""The commands that compare methods: PPO through TRL, and the whole frontier."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_kit.cli_options import Json, say, silent

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, see recipes/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value ...")]


def ppo(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave a finished run of this recipe; begin another anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """PPO through TRL on the prompts of the pairs, with a reward learned from them, or the true reward."""
    from dpo_kit.comparison.ppo_run import run_ppo
    from dpo_kit.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    with contextlib.redirect_stdout(sys.stderr):
        result = run_ppo(loaded, resume=resume, say=silent if as_json else say)
    if as_json:
        print(json.dumps({"folder": str(result.folder), **result.summary}))
        return
    say(f"run folder: {result.folder}" + (f"   report: {result.page}" if result.page else ""))


def frontier(
    recipe: RecipeFile,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's quick form (frontier.quick).")] = False,
    as_json: Json = False,
) -> None:
    """All methods from the same policy, on the same pairs: the reward-KL frontier. Goes on where it stopped.

    Exit status 1 where a run failed; one whose loss did not stay finite is a result, and marked.
    """
    from dpo_kit.comparison.frontier import run_frontier

    with contextlib.redirect_stdout(sys.stderr):
        found: dict[str, Any] = run_frontier(
            recipe, overrides or [], quick=quick, say=silent if as_json else say
        )
    if as_json:
        print(json.dumps(found))
    if found["failed"]:
        raise typer.Exit(1)
