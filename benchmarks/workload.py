"""The work that every side of the benchmark gets: a task, and the folder of token ids that stands for it.

`peers.py` reads the folder in the sides' own processes, so that ids and order are the same on all sides;
the weights are made there from the same configuration and seed. Nothing is timed here, and what needs
the `datasets` package is imported only where real pairs are read.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lengths import LENGTHS, generated_pairs, lengths_of

from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens
from dpo_kit.roofline import Work, count_work

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
BPE_TOKENS = 8192
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Task:
    """What one run computes; with the side and its versions, what a kept result is found by.

    Attributes:
        work: "hh" (the real file), a name in `lengths.LENGTHS`, "fixed-P-R", or a file of pairs.
        pairs: the first so many.
        batch_size: pairs in a step.
        replies: ranked replies per prompt of generated pairs.
        order: "random" (as they come) or "sorted" (by length, shortest first).
        model: the configuration's fields.
        dtype: "fp32", or "bf16" for autocast.
        weights: dtype of the weights.
        device: "cpu" or "cuda".
        reference: "live" or "precomputed".
        warmup_steps: first steps that no time is taken of.
        threads: 0 for torch's own choice.
        tokens_per_micro_batch: of dpo_kit.
        seed: of weights and generated pairs.
    """

    model: dict[str, Any]
    work: str = "hh"
    pairs: int = 64
    batch_size: int = 8
    replies: int = 2
    order: str = "random"
    dtype: str = "fp32"
    weights: str = "fp32"
    device: str = "cpu"
    reference: str = "live"
    warmup_steps: int = 0
    threads: int = 0
    tokens_per_micro_batch: int | str = "auto"
    seed: int = 0


def settled_work(work: str) -> str:
    """The work itself, or its stand-in: real HH where the file is, else its lengths."""
    return "hh-like" if work == "hh" and not HH.exists() else work


def described(work: str) -> str:
    """A work's pairs in words, with the source of their lengths."""
    lengths = lengths_of(work)
    if lengths is None:
        return "HH harmless-base, test split, from the first" if work == "hh" else Path(work).name
    name = "random tokens of fixed lengths" if work not in LENGTHS else f"random tokens, lengths as {work}"
    return f"{name}: {lengths.source}" if work in LENGTHS else f"{name} ({work})"


def task_rows(task: Task) -> list[dict[str, Any]]:
    """The pairs of a task as ids, in its order, each with a `source` of its own.

    Raises:
        InputError: fewer pairs than asked for, or what reading them raises.
    """
    lengths = lengths_of(task.work)
    if lengths is None:
        if task.replies != 2:
            raise InputError("ranked replies are generated, not read", field="--replies")
        source = HH if task.work == "hh" else Path(task.work)
        rows = loaded_pairs(source, task.pairs, min(BPE_TOKENS, task.model["vocab_size"]))
    else:
        rows = generated_pairs(lengths, task.pairs, task.model["vocab_size"], task.replies, task.seed)
    if task.order == "sorted":
        rows = sorted(rows, key=_longest)
    return [{**row, "source": f"pair {i}"} for i, row in enumerate(rows)]


def _longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


@functools.lru_cache(maxsize=2)
def loaded_pairs(source: Path, count: int, vocabulary: int) -> list[dict[str, Any]]:
    """The first pairs of a source as ids, under a byte-level BPE learned on all of the source."""
    from datasets import Dataset

    from dpo_kit.pairs import read_pairs
    from dpo_kit.tokenization import tokenize_pairs
    from dpo_kit.tokenizer import train_byte_level_bpe

    rows, _ = read_pairs(source, invalid="drop")
    if len(rows) < count:
        raise InputError(f"{len(rows)} usable pairs, {count} asked for", file=source, field="--pairs")
    texts = (row["prompt"] + row[reply] for row in rows for reply in ("chosen", "rejected"))
    tokenizer = train_byte_level_bpe(texts, vocabulary)
    columns = ("prompt", "chosen", "rejected")
    first = Dataset.from_list([{name: row[name] for name in columns} for row in rows[:count]])
    with tempfile.TemporaryDirectory() as cache:
        ids = tokenize_pairs(first, tokenizer, max_length=None, cache_dir=cache).dataset
        return [{name: row[name] for name in COLUMNS} for row in ids]


def write_task(task: Task, folder: Path) -> Work:
    """Write `task.json`, `pairs.json` and, for the peers that must hold one, a tokenizer.

    Returns:
        Tokens and least arithmetic of the steps that are timed.
    """
    rows = task_rows(task)
    begin = task.warmup_steps * task.batch_size
    if begin >= len(rows):
        raise InputError(f"{len(rows)} pairs are all warm-up", field="--pairs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
    if importlib.util.find_spec("datasets"):
        from dpo_kit.tokenizer import train_byte_level_bpe

        train_byte_level_bpe([], 258).save_pretrained(folder / "tokenizer")
    pairs = [PairTokens.from_row(row) for row in rows[begin:]]
    return count_work(pairs, task.batch_size, task.model, reference=task.reference == "live")
