"""The command that merges an adapter into its base model."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpo_kit.cli_options import Json, naming_options, print_json, say, silent


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, such as a run's model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it is not there yet.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model; default: what the adapter names.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the base's own), float32, bfloat16, float16, float64.")
    ] = "auto",
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Sources of pairs to compare on, beside random tokens.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model, compare the logits, and write the model with its tokenizer."""
    from dpo_kit.merging import merge_adapter

    with contextlib.redirect_stdout(sys.stderr), naming_options({"model.path": "--base"}):
        merged = merge_adapter(
            adapter, out, base=base, dtype=dtype, data=data or (), say=silent if as_json else say
        )
    if as_json:
        print_json(dataclasses.asdict(merged) | {"folder": str(merged.folder)})
