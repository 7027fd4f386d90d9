"""`dpo-kit data`: look at preference data, convert, split and build it; the known data sets and shapes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_kit.cli_options import (
    Json,
    Sources,
    naming_options,
    print_json,
    say,
    take_any_text,
    with_judge_options,
    with_load_options,
)
from dpo_kit.pairs.options import LoadOptions

data_app = typer.Typer(no_args_is_help=True, help="Look at preference data, convert, split and build it.")


@data_app.command("inspect")
@with_load_options(without=("invalid",))
def inspect(
    sources: Sources,
    options: LoadOptions,
    held_out: Annotated[list[str] | None, typer.Option("--eval", help="A source of held-out data.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id, to count tokens; default: beside the model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id, to estimate time and memory; not loaded.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Of training, in tokens of prompt and reply.")] = 1024,
    overlong: Annotated[str, typer.Option(help="What becomes of longer ones in training.")] = "drop",
    batch_size: Annotated[int, typer.Option(help="Examples of a training step.")] = 64,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Folder for a page, pictures and lists of rows.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 where a finding is grave or a row unusable.")
    ] = False,
    strict_level: Annotated[
        str, typer.Option(help="What is grave: warning (errors too), or error alone.")
    ] = "warning",
) -> None:
    """What is in preference data, what is wrong with it, and what training on it would cost."""
    from dataclasses import asdict

    from dpo_kit.audit import inspect_pairs
    from dpo_kit.audit.show import objections, print_audit, require_level
    from dpo_kit.report.page import require_extra

    # What is wrong with the command line is said before a long look at the data.
    require_level(strict_level)
    if out is not None:
        from dpo_kit.audit.page import require_folder

        require_extra()
        require_folder(out)
    loading = {name: value for name, value in asdict(options).items() if name != "invalid"}
    # A measurement of the model may print; stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr), naming_options():
        found = inspect_pairs(
            sources,
            held_out=held_out or None,
            tokenizer=tokenizer or model,
            model=model,
            max_length=max_length,
            overlong=overlong,
            batch_size=batch_size,
            progress=None if as_json else lambda rows: say(f"read {rows:,} rows"),
            **loading,
        )
        grave = objections(found, strict_level) if strict else []
        page = _write_audit(found, sources, out)
    if as_json:
        print_json(found.to_dict())
    else:
        take_any_text()
        print_audit(found)
    if page:
        say(f"page: {page}")
    if grave:
        say(f"strict: {'; '.join(grave)}")
        raise typer.Exit(1)


def _write_audit(found: Any, sources: Sequence[str], out: Path | None) -> Path | None:
    if out is None:
        return None
    from dpo_kit.audit.page import write_audit

    return write_audit(found, out, title=", ".join(sources))


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """A SIGTERM ends the command as an error does, so that no half-written file is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@data_app.command("convert")
@with_load_options()
def convert(
    sources: Sources,
    out: Annotated[Path, typer.Argument(help="File to write: .jsonl (.gz, .zst), .json or .parquet.")],
    options: LoadOptions,
    as_json: Json = False,
) -> None:
    """Write canonical rows; where each comes from stands in its `origin`."""
    from dpo_kit.pairs.writing import convert_pairs

    with _ending_cleanly():
        report = convert_pairs(sources, out, options)
    if as_json:
        print_json({"out": str(out), **report.to_dict()})
        return
    say(report.summary())
    say(f"wrote {report.made:,} rows to {out}")


@data_app.command("split")
@with_load_options()
def split(
    sources: Sources,
    train: Annotated[Path, typer.Option("--train", help="File to write, as of convert.")],
    held_out: Annotated[Path, typer.Option("--eval", help="File to write.")],
    options: LoadOptions,
    share: Annotated[float, typer.Option("--eval-share", help="Of the prompts, held out, about.")] = 0.05,
    prompts: Annotated[
        int | None, typer.Option("--eval-prompts", help="So many prompts, in place of a share.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Canonical rows in two files, no prompt in both.

    The prompt and --seed alone decide, so that more data later moves no earlier prompt (with --eval-prompts,
    it may). Prompts are the same if they differ in case, white space and Unicode form only.
    """
    from dpo_kit.pairs.splitting import split_pairs

    with _ending_cleanly():
        found = split_pairs(sources, train, held_out, share=share, prompts=prompts, options=options)
    if as_json:
        sides = {
            "train": {"out": str(train), "rows": found.train_rows, "prompts": found.train_prompts},
            "eval": {"out": str(held_out), "rows": found.held_out_rows, "prompts": found.held_out_prompts},
        }
        print_json({**sides, **found.report.to_dict()})
        return
    say(found.report.summary())
    say(f"wrote {found.train_rows:,} rows of {found.train_prompts:,} prompts to {train}")
    say(f"wrote {found.held_out_rows:,} rows of {found.held_out_prompts:,} prompts to {held_out}")


@data_app.command("build")
@with_judge_options
def build(
    sources: Annotated[
        list[str], typer.Argument(help="Candidates: prompt and completions, as `dpo-kit sample` writes them.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write, as of convert.")],
    endpoint: Any,
    reward: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION, classifier:MODEL[@LABEL] or model:REWARD_MODEL: gives scores."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="As of eval: compares each two replies; scores are Bradley-Terry strengths."),
    ] = None,
    shape: Annotated[str, typer.Option(help="pairs, or ranked lists: lists.")] = "pairs",
    labels: Annotated[
        str,
        typer.Option(
            help="best: the better reply is chosen; bradley_terry: drawn by the scores. Ties are left out."
        ),
    ] = "best",
    pairs: Annotated[str, typer.Option(help="all, best_worst, adjacent or random:k.")] = "all",
    min_margin: Annotated[float | None, typer.Option(help="Leave out pairs whose scores lie closer.")] = None,
    seed: Annotated[int, typer.Option(help="Of labels and of random:k.")] = 0,
    as_json: Json = False,
) -> None:
    """Candidates and a reward, or a judge -> pairs with margins, or ranked lists with scores."""
    from dpo_kit.errors import InputError
    from dpo_kit.labelling import Labelling, build_file, by_judge, by_reward

    labelling = Labelling(shape, labels, pairs, min_margin, seed)  # type: ignore[arg-type]
    if (reward is None) == (judge is None):
        raise InputError("one of the two is needed", field="--reward or --judge")
    with contextlib.redirect_stdout(sys.stderr):
        if reward is not None:
            from dpo_kit.evaluation import load_reward

            score = by_reward(load_reward(reward, field="--reward"))
        else:
            from dpo_kit.evaluation.judges import load_judge

            score = by_judge(load_judge(str(judge), endpoint).compare)
        with _ending_cleanly():
            account = build_file(sources, out, score, labelling)
    if as_json:
        print_json({"out": str(out), **account.to_dict()})
        return
    say(account.summary("pairs" if shape == "pairs" else "ranked lists"))
    say(f"wrote {account.rows:,} rows to {out}")


@data_app.command("list")
def list_data_sets(as_json: Json = False) -> None:
    """Public data sets by name: where they are, their licence and shape, and what to cite."""
    from dpo_kit.audit.show import print_records
    from dpo_kit.pairs.catalogue import CATALOGUE

    entries = [entry.to_dict() for entry in CATALOGUE]
    if as_json:
        print_json({"data_sets": entries})
    else:
        take_any_text()
        print_records(entries)


@data_app.command("formats")
def list_formats(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/data.md has it.")] = False,
) -> None:
    """The shapes of rows that are known, each with its fields."""
    from dpo_kit.audit.show import print_records
    from dpo_kit.pairs.formats.table import markdown as as_markdown
    from dpo_kit.pairs.formats.table import shapes

    if markdown:
        print(as_markdown())
    elif as_json:
        print_json({"formats": shapes()})
    else:
        take_any_text()
        print_records(shapes())
