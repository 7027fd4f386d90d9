"""The command that samples: replies of a model to prompts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpo_kit.cli_options import Json, naming_options, print_json, say, silent


def sample(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal LM.")],
    prompts: Annotated[
        list[str],
        typer.Argument(help="Sources of prompts: jsonl with prompt, preference data, text files, hf://..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to write.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Replies to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling below 1.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated at once.")] = 64,
    seed: int = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: beside the model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    max_prompts: Annotated[int | None, typer.Option(min=1, help="The first so many distinct ones.")] = None,
    as_json: Json = False,
) -> None:
    """Replies of a model to prompts, candidates for `data build`. Stopped, it goes on when called again."""
    from dpo_kit.samples_file import Sampling, sample_prompts

    sampling = Sampling(n, max_new_tokens, temperature, top_p, batch_size, seed)
    with contextlib.redirect_stdout(sys.stderr), naming_options():
        figures = sample_prompts(
            model,
            prompts,
            out,
            sampling,
            tokenizer=tokenizer,
            dtype=dtype,
            max_prompts=max_prompts,
            say=silent if as_json else say,
        )
    if as_json:
        print_json({"out": str(out), **figures})
        return
    say(
        f"{figures['replies']:,} replies to {figures['prompts']:,} prompts, {figures['tokens_sampled']:,} "
        f"tokens, in {figures['seconds']:.1f} s; {figures['unfinished']:,} stopped by --max-new-tokens"
    )
    say(f"wrote {figures['prompts']:,} lines to {out}")
