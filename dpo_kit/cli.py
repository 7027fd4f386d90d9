"""The command line: parses and calls. What a command does stands in the module it calls.

Exit status: 0 done, 1 failed, 2 the user's input was wrong. No traceback without --debug.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_kit import comparison_cli, evaluation_cli, merge_cli, sample_cli
from dpo_kit.cli_options import Json, Sources, say, silent, with_load_options
from dpo_kit.data_cli import data_app
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.shown_text import visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Offline preference optimisation: DPO and its family.",
)
app.add_typer(data_app, name="data")
cache_app = typer.Typer(no_args_is_help=True, help="Look after the reference's log-probs on disk.")
app.add_typer(cache_app, name="cache")
app.command()(comparison_cli.ppo)
app.command()(comparison_cli.frontier)
app.command()(sample_cli.sample)
app.command("eval")(evaluation_cli.evaluate)
app.command()(merge_cli.merge)

CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Default: $DPO_KIT_CACHE or ~/.cache/dpo_kit.")
]


# What several processes can do together.
_SHARED = ("train", "cache")


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The option is taken from the arguments by `main`; here for --help."""
    from dpo_kit.errors import InputError

    if _several() and context.invoked_subcommand not in _SHARED:
        raise InputError(
            f"{context.invoked_subcommand} is done by one process, and several were started",
            mend="Start it without torchrun or accelerate launch.",
        )


_debug = False

# Number of the signal that was to end this command; 0: none.
_ended_by = 0
# How long another rank waits for the first one to say what is wrong.
_PATIENCE_S = 30.0
# What gloo says on the ranks that wait for one that has ended.
_LOST = ("Connection closed by peer", "Connection reset by peer")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only kernels that give the same bits each time; slower.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, evaluate, and write the run folder; under torchrun or accelerate launch on all ranks."""
    from dpo_kit.recipe import Recipe
    from dpo_kit.run import run_recipe

    more = ["train.full_determinism=true"] if deterministic else []
    loaded = Recipe.load(recipe, [*(overrides or []), *more])
    # A reward of the user's own may print; stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_recipe(loaded, resume=resume, say=silent if as_json else say)
    if _rank():
        return
    if as_json:
        print(json.dumps({"folder": str(result.folder), **result.summary}))
        return
    _print_summary(result.summary)
    say(f"run folder: {result.folder}" + (f"   report: {result.page}" if result.page else ""))


@app.command()
@with_load_options(invalid="drop")
def logps(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal LM.")],
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    options: LoadOptions,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: beside the model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    max_length: Annotated[int | None, typer.Option(help="Leave out longer pairs; default: none.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 4096,
) -> None:
    """Log-probs of both replies of every pair, to a parquet file."""
    from dpo_kit.logps import write_logps

    write_logps(
        model,
        sources,
        out,
        options=options,
        tokenizer=tokenizer,
        dtype=dtype,
        max_length=max_length,
        token_budget=tokens,
        say=say,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for a comparison.")] = None,
) -> None:
    """Page and pictures of one run, or of several side by side."""
    from dpo_kit.report import write_comparison, write_report

    several = len(runs) > 1
    print(write_comparison(runs, out or Path("comparison")) if several else write_report(runs[0]))


@app.command()
def bench(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; default: a small model.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps that are measured.")] = 5,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Speed and memory on this machine: what fits, how fast, how far from the limit, where the time goes."""
    from dpo_kit.bench import print_results, run_bench
    from dpo_kit.recipe import Recipe

    loaded = None if recipe is None else Recipe.load(recipe, overrides or [])
    with contextlib.redirect_stdout(sys.stderr):
        found = run_bench(loaded, steps=steps, out=out, say=silent if as_json else say)
    if as_json:
        print(json.dumps(found))
    else:
        print_results(found)


@app.command("losses")
def list_losses(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README has it.")] = False,
) -> None:
    """The objectives that a recipe can name: what each learns from, and where it was published."""
    from dpo_kit.losses.table import markdown as as_markdown
    from dpo_kit.losses.table import objectives

    rows = objectives()
    if markdown:
        print(as_markdown())
    elif as_json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        _print_table("objectives", list(rows[0]), rows)


@cache_app.command("fill")
def cache_fill(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    as_json: Json = False,
) -> None:
    """Compute the reference's log-probs of a recipe's data ahead of training; under torchrun on all ranks."""
    from dpo_kit.recipe import Recipe
    from dpo_kit.run import fill_cache

    loaded = Recipe.load(recipe, overrides or [])
    with contextlib.redirect_stdout(sys.stderr):
        figures = fill_cache(loaded, say=silent if as_json else say)
    if as_json and not _rank():
        print(json.dumps(figures))


@cache_app.command("ls")
def cache_ls(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """The models of which log-probs are kept."""
    from dpo_kit.reference import ReferenceCache

    cache = ReferenceCache(cache_dir)
    models = [model.to_dict() for model in cache.models()]
    if as_json:
        print(json.dumps({"folder": str(cache.folder), "models": models}))
        return
    columns = ("key", "name", "dtype", "autocast", "sequences", "with_tokens", "damaged", "bytes", "used")
    _print_table(f"reference cache in {cache.folder}", columns, models)


@cache_app.command("verify")
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Read every shard, and name those that are damaged (exit status 1 where there is one)."""
    from dpo_kit.reference import ReferenceCache

    found = list(ReferenceCache(cache_dir).verify())
    damaged = [(path, problem) for path, problem in found if problem]
    for path, problem in damaged:
        print(visible(f"{path}: {problem}"))
    say(f"{len(found)} shards, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(1)


@cache_app.command("prune")
def cache_prune(
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="Models not used for so many days.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model's key, or how it begins.")] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Shards that were set aside.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, say what would be.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Remove what is not wanted any more, and say what that was."""
    from dpo_kit.reference import ReferenceCache

    removed = ReferenceCache(cache_dir).prune(
        older_than=older_than, model=model, damaged=damaged, everything=everything, dry_run=dry_run
    )
    for path, _ in removed:
        print(visible(str(path)))
    did = "would be removed" if dry_run else "removed"
    say(f"{did}: {len(removed)} files, {sum(size for _, size in removed):,} bytes")


def _print_table(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Rows under columns, on stdout; nothing is cut, so that keys can be copied."""
    table = [
        list(columns),
        *(["-" if row[name] is None else visible(str(row[name])) for name in columns] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(title)
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _print_summary(summary: dict[str, Any]) -> None:
    """The table at the end of a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="run summary", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for label, value in summary_rows(summary):
        table.add_row(label, value)
    Console(stderr=True).print(table)


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of the figures that a run has, in the order a person asks for them."""
    forms = [
        ("eval/accuracy", "held-out accuracy", "{:.3f}"),
        ("eval/accuracy_ceiling", "its ceiling (label noise)", "{:.3f}"),
        ("eval/reward_before", "true reward of samples, before", "{:+.2f}"),
        ("eval/reward_after", "true reward of samples, after", "{:+.2f}"),
        ("eval/kl", "KL to the reference, nats", "{:.2f}"),
        ("eval/loss", "held-out loss", "{:.4f}"),
        ("sft/runtime", "time of SFT, s", "{:.0f}"),
        ("reference_runtime", "time of the reference's log-probs, s", "{:.0f}"),
        ("reference_computed", "sequences that these took", "{}"),
        ("train_runtime", "time of preference training, s", "{:.0f}"),
        ("pairs_per_second", "pairs per second", "{:.1f}"),
        ("tokens_saved_share", "tokens saved by the tree", "{:.1%}"),
        ("peak_memory_bytes", "peak memory, GiB", "{:.2f}"),
    ]
    rows = []
    for key, label, form in forms:
        if key in summary:
            value = summary[key] / 2**30 if key == "peak_memory_bytes" else summary[key]
            rows.append((label, form.format(value)))
    return rows


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from dpo_kit.errors import RankWarning

    # What is found on all ranks is said by one of them.
    if _rank() == 0:
        say(f"warning: {message}")
    elif issubclass(category, RankWarning):
        say(f"warning, rank {_rank()}: {message}")


def _rank() -> int:
    """As its launcher says: nothing that knows more is imported yet."""
    return int(os.environ.get("RANK", 0))


def _several() -> bool:
    """Whether a launcher has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _end(number: int, frame: Any) -> None:
    """A signal that is to end the command: as no Exception, which somebody might take for another failure."""
    global _ended_by
    _ended_by = number
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> None:
    """Say why, and leave."""
    if _debug:
        message = f"{traceback.format_exc()}{message}"
    if _rank():
        # All ranks find the same in the same input. Then the first one says it, and its end is that of all.
        time.sleep(_PATIENCE_S)
        message = f"rank {_rank()}: {message}"
    say(message)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit status."""
    from dpo_kit.disk import refusal
    from dpo_kit.errors import DpoKitError, StoppedError

    warnings.showwarning = _show_warning
    if hasattr(sys.stdout, "reconfigure"):
        # Names of files and columns may hold half a surrogate pair: its number, which JSON reads too.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What was left out is said by the commands themselves.
    logging.getLogger("dpo_kit.pairs").setLevel(logging.ERROR)
    # Says at each start that it has no faster kernel for the processor.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    global _debug
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Before or after the command: it is wanted when the line has been typed already.
    _debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if _rank() == 0:
        # Other ranks are ended by their launcher, and may be waiting where no handler is called.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
    try:
        app(args=arguments, standalone_mode=True)
    except (KeyboardInterrupt, SystemExit):
        # Typer makes a silent exit of an interrupt.
        if not _ended_by:
            raise
        how = "terminated" if _ended_by == signal.SIGTERM else "interrupted"
        mend = " (--resume goes on from the newest checkpoint)" if arguments[:1] == ["train"] else ""
        _fail(f"{how}{mend}", 128 + _ended_by)
    except StoppedError as error:
        _fail(str(error), error.exit_status)
    except DpoKitError as error:
        _fail(f"error: {error}", error.exit_status)
    except Exception as error:
        if reason := refusal(error):
            _fail(f"error: {getattr(error, 'filename', None) or 'the disk'}: {reason}", 1)
        if _several() and any(lost in str(error) for lost in _LOST):
            _fail("stopped: another rank has ended, and its own message says why", 1)
        _fail(f"failed: {type(error).__name__}: {error}\n(--debug before the command shows where)", 1)
