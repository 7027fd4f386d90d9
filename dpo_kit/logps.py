"""Pairs on disk + a model -> a parquet file of log-probs (`dpo-kit logps`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from dpo_kit.errors import InputError
from dpo_kit.evaluation import score_pairs
from dpo_kit.evaluation.request import DTYPES
from dpo_kit.models import check_length, load_model
from dpo_kit.pairs import LoadOptions, load_with_report
from dpo_kit.pairs.kinds import PAIRS, kind_of_columns
from dpo_kit.tokenization import longest_sequence, tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer


def write_logps(
    model: str,
    sources: Sequence[str],
    out: Path,
    *,
    options: LoadOptions = LoadOptions(invalid="drop"),  # noqa: B008
    tokenizer: str | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    token_budget: int = 4096,
    say: Callable[[str], None] = print,
) -> None:
    """Write a row per pair: source, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens.

    Args:
        model: folder or hub id.
        sources: as `load_pairs` takes them.
        out: the parquet file; written whole, then renamed.
        options: how rows are loaded; unusable ones are left out, and named, where they say nothing else.
        tokenizer: folder or hub id; default: beside the model.
        dtype: of the weights.
        max_length: longer pairs are left out, and counted; None for no limit.
        token_budget: tokens of one forward pass.
        say: gets lines of progress.

    Raises:
        InputError: wrong data, model or options.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'", field="--dtype", mend=f"Known: {', '.join(DTYPES)}.")
    if token_budget < 1:
        raise InputError(f"expected 1 or more, got {token_budget}", field="--tokens")
    if out.is_dir():
        raise InputError("this is a folder", file=out, field="--out", mend="Name a file, e.g. logps.parquet.")
    if not out.parent.is_dir():
        raise InputError("no such folder", file=out.parent, field="--out", mend="Make it first.")
    rows, report = load_with_report(sources, options)
    say(report.summary())
    kind = kind_of_columns(rows.column_names)
    if kind != PAIRS:
        got = "of no known kind" if kind is None else kind.rows
        raise InputError(
            f"log-probs are computed of pairs, and these are {got}",
            field="SOURCES",
            mend="Give rows with prompt, chosen and rejected.",
        )
    policy = load_model(model, getattr(torch, dtype))
    if torch.cuda.is_available():
        policy.cuda()  # type: ignore[call-arg]
    tokenized = tokenize_pairs(rows, load_tokenizer(tokenizer or model), max_length=max_length)
    data = tokenized.dataset
    for line in tokenized.account():
        say(line)
    longest, _ = longest_sequence(data)
    check_length(policy, max_length, longest)
    done = 0

    def progress(pairs: int) -> None:
        nonlocal done
        before, done = done, done + pairs
        if done // 256 > before // 256 or done == len(data):
            say(f"scored {done} of {len(data)} pairs")

    columns, (_, reason) = score_pairs(policy, data, token_budget=token_budget, progress=progress)
    if reason:
        say(f"{reason}; separate padded sequences were used")
    table = pyarrow.table({"source": list(data["source"]), **columns})
    written = out.with_name(f".{out.name}.writing")
    pyarrow.parquet.write_table(table, written)
    os.replace(written, out)
    say(f"wrote {len(data)} rows to {out}")
