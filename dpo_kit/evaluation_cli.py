"""The command eval: what a model is worth, on pairs, by its samples, and to judges."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_kit.cli_options import (
    Json,
    naming_options,
    print_json,
    say,
    silent,
    with_judge_options,
    with_load_options,
)
from dpo_kit.errors import InputError
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.shown_text import visible

_SAMPLING = "How replies are sampled"

_FIELDS = {
    "eval.prompts": "--prompts",
    "eval.samples": "--samples",
    "eval.max_new_tokens": "--max-new-tokens",
    "data.train": "--data",
    "model": "MODEL",
    "model.path": "MODEL",
    "data.chat_template_kwargs": "--chat-template-kwargs",
}


@with_judge_options
@with_load_options(invalid="drop", without=("seed",))
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal LM.")],
    options: LoadOptions,
    endpoint: Any,
    reference: Annotated[str | None, typer.Option(help="The model it is compared with.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Pairs: files, folders, hf://...; as often as given.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to sample on; default: those of the data.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="reward:SPEC with a SPEC as of --reward, or http(s)://HOST/v1#MODEL; as often as given."
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="True reward of samples: FILE.py:FUNCTION, classifier:MODEL[@LABEL] or model:FOLDER."
        ),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Whom to judge against: reference, chosen; default: both.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Judge the data's pairs too, and compare with their labels.")
    ] = False,
    beta: Annotated[float | None, typer.Option(help="Of the implicit reward; default: 0.1.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval.json, eval-samples.jsonl and comparisons.jsonl.")
    ] = None,
    as_json: Json = False,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Of the samples, as often as given; default: 1.", rich_help_panel=_SAMPLING),
    ] = None,
    reference_temperature: Annotated[
        float | None, typer.Option(help="Of the reference's; default: the same.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling below 1.", rich_help_panel=_SAMPLING)] = 1.0,
    samples: Annotated[
        int, typer.Option(help="Replies to each prompt; 0: none.", rich_help_panel=_SAMPLING)
    ] = 1,
    max_prompts: Annotated[int, typer.Option(help="The first so many.", rich_help_panel=_SAMPLING)] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.", rich_help_panel=_SAMPLING)] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.", rich_help_panel=_SAMPLING)] = 64,
    seed: Annotated[
        int, typer.Option(help="Of the samples, and of --pairs random:k.", rich_help_panel=_SAMPLING)
    ] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: beside the model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON object for the chat template of prompts that are messages.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Leave out longer pairs; default: none.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one forward pass over pairs.")] = 4096,
) -> None:
    """Accuracy, margins and loss on pairs; reward, KL and win rates of samples; agreement of judges."""
    from dpo_kit.model_evaluation import EvalRequest, evaluate_model

    if out is not None and out.exists() and not out.is_dir():
        raise InputError("this is a file", file=out, field="--out", mend="Name a folder.")
    request = EvalRequest(
        model=model,
        reference=reference,
        data=tuple(data or ()),
        load=replace(options, seed=seed),
        prompts=prompts,
        judges=tuple(judge or ()),
        endpoint=endpoint,
        reward=reward,
        against=tuple(against or ()),
        agreement=agreement,
        temperatures=tuple(temperature or (1.0,)),
        reference_temperature=reference_temperature,
        top_p=top_p,
        samples=samples,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        beta=beta,
        tokenizer=tokenizer,
        dtype=dtype,
        chat_template_kwargs=_template_settings(chat_template_kwargs),
        max_length=max_length,
        tokens=tokens,
    )
    with contextlib.redirect_stdout(sys.stderr), naming_options(_FIELDS):
        found = evaluate_model(request, say=silent if as_json else say)
    if out is not None:
        found.write(out)
    if as_json:
        print_json(found.figures)
        return
    _show(found.figures)
    if out is not None:
        say(f"written: {out}")


def _template_settings(given: str | None) -> dict[str, Any]:
    try:
        found = json.loads(given or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        mend = """As in '{"enable_thinking": false}'"""
        raise InputError("expected a JSON object", field="--chat-template-kwargs", mend=mend)
    return found


def _show(figures: dict[str, Any]) -> None:
    """Tables on stderr, one for each part that there is."""
    if pairs := figures.get("pairs"):
        _table("held-out pairs", [_with_interval(pairs, "accuracy", "accuracy_low", "accuracy_high")])
    if samples := figures.get("samples"):
        _table("samples", samples)
    if rates := figures.get("win_rates"):
        _table("win rates, with 95% intervals", [_rate(row) for row in rates])
    if rows := figures.get("agreement"):
        _table("agreement on the data's pairs (a tie is a verdict of its own)", [_agreement(r) for r in rows])


def _rate(row: dict[str, Any]) -> dict[str, Any]:
    fixed = "" if row["against_temperature"] is None else f" at {row['against_temperature']:g}"
    return {
        "judge": row["judge"],
        "at": f"{row['temperature']:g}",
        "against": row["against"] + fixed,
        "won/tied/lost": f"{row['wins']}/{row['ties']}/{row['losses']}",
        "win rate": _with_interval(row, "rate", "low", "high")["rate"],
    } | _doubts(row)


def _agreement(row: dict[str, Any]) -> dict[str, Any]:
    columns = {"first": "of", "second": "and", "n": "n", "agreement": "agreement", "kappa": "kappa"}
    without = f"{_cell(row['agreement_decided'])} of {row['n_decided']}"
    return {shown: row[name] for name, shown in columns.items()} | {"without ties": without} | _doubts(row)


def _doubts(row: dict[str, Any]) -> dict[str, Any]:
    """What there is against a judge's figures, where there is something."""
    found: dict[str, Any] = {"no verdict": row["no_verdict"]} if row.get("no_verdict") else {}
    if position := row.get("position"):
        found["position bias"] = position["share"]
        found["to the first"] = position["first"]
        found |= {"unreadable": position["unreadable"]} if position["unreadable"] else {}
    return found


def _with_interval(row: dict[str, Any], name: str, low: str, high: str) -> dict[str, Any]:
    shown = {key: value for key, value in row.items() if key not in (low, high)}
    if row[name] is not None:
        shown[name] = f"{row[name]:.3f} [{row[low]:.3f}, {row[high]:.3f}]"
    return shown


def _table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(visible(_cell(row.get(name)))) for name in columns))
    Console(stderr=True).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
