"""How long it takes to plan: rows of an Arrow data set -> micro-batches with their attention plans.

Nothing is trained. The pairs are random tokens, with lengths as in HH harmless-base (lengths.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from lengths import LENGTHS, Distribution
from torch.utils.data import DataLoader, RandomSampler

from dpo_kit.dealing import TokenRows
from dpo_kit.examples import PairTokens
from dpo_kit.packing import MicroBatch, plan_step

ROWS_PER_PART = 1000


def generated(pairs: int, seed: int = 0) -> Dataset:
    """A tokenised data set in parts, as it lies on disk."""
    random, known = np.random.default_rng(seed), LENGTHS["hh-like"]
    drawn = {"prompt_ids": known.prompt, "chosen_ids": known.chosen, "rejected_ids": known.rejected}

    def column(lengths: Distribution, rows: int) -> pa.Array:
        offsets = np.append(0, lengths.draw(random, rows).cumsum()).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, random.integers(2, 50_000, offsets[-1], np.int32))

    parts = []
    for first in range(0, pairs, ROWS_PER_PART):
        rows = min(ROWS_PER_PART, pairs - first)
        columns: dict[str, Any] = {name: column(lengths, rows) for name, lengths in drawn.items()}
        parts.append(pa.table(columns | {"source": [f"generated:{first + i + 1}" for i in range(rows)]}))
    return Dataset(pa.concat_tables(parts))


def plans(rows: list[dict[str, Any]], token_budget: int) -> list[MicroBatch]:
    """What the trainer's collator does."""
    return plan_step([PairTokens.from_row(row) for row in rows], token_budget)


def measure(dataset: Dataset, batch_size: int, workers: int, token_budget: int) -> dict[str, float]:
    """Seconds to read and plan all steps of a data set in random order, through torch's dataloader."""
    started, rows = time.perf_counter(), TokenRows(dataset)
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        sampler=RandomSampler(rows),
        collate_fn=partial(plans, token_budget=token_budget),
        num_workers=workers,
    )
    pairs = sum(batch.num_pairs for step in loader for batch in step)
    seconds = time.perf_counter() - started
    return {"pairs": pairs, "batch_size": batch_size, "workers": workers, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--step-seconds", type=float, nargs="+", help="of a step of each batch size")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    dataset, results = generated(given.pairs), []
    step_seconds = dict(zip(given.batch_sizes, given.step_seconds or [], strict=False))
    print(
        "| pairs a step | workers | us a pair | s per 1,000,000 pairs | share of a step |\n"
        + "|--:" * 5
        + "|"
    )
    for size in given.batch_sizes:
        for workers in given.workers:
            found = measure(dataset, size, workers, given.token_budget)
            each = found["seconds"] / found["pairs"]
            share = f"{each * size / step_seconds[size]:.2%}" if size in step_seconds else "-"
            print(f"| {size} | {workers} | {each * 1e6:.1f} | {each * 1e6:.1f} | {share} |", flush=True)
            results.append(found)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
