"""The work that every side of the speed benchmark gets, and the arithmetic that it asks for at least.

Model, tokenizer and pairs of token ids are written to a folder once; `peers.py` reads them there, so
that weights, ids and order are the same on all sides. Nothing is timed here.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.models import load_config, load_model, output_head
from dpo_kit.packing import PairTokens, sequences_of
from dpo_kit.pairs import read_pairs
from dpo_kit.tokenization import tokenize_pairs, train_byte_level_bpe
from dpo_kit.tree import build_tree

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
GENERATED = "generated"
BPE_TOKENS = 8192
HEAD_SIZE = 64

# Tokens of prompt, chosen and rejected in HH harmless-base (test split, 2303 usable pairs, byte-level BPE
# of 8192 tokens learned on it), at these percentiles; the longest one in a hundred is left out.
_PERCENTILES = (0, 5, 25, 50, 75, 95, 99)
_HH_LENGTHS = {
    "prompt_ids": (8, 16, 33, 97, 171, 354, 542),
    "chosen_ids": (2, 7, 16, 29, 55, 123, 204),
    "rejected_ids": (2, 7, 19, 38, 68, 150, 259),
}


@dataclass(frozen=True)
class Work:
    """What one epoch computes.

    Attributes:
        distinct_tokens: tokens of the token trees of all steps.
        separate_tokens: tokens of the same sequences kept apart, unpadded.
        padded_tokens: tokens of one rectangle per step, all sequences as long as the longest.
        predictions: completion tokens of the trees, each one once.
        flops: least arithmetic, two per multiply-add: see `count_work`.
    """

    distinct_tokens: int
    separate_tokens: int
    padded_tokens: int
    predictions: int
    flops: int


def model_fields(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Configuration of a Llama of DESIGN.md section 10's proportions (heads of 64, 3 per key-value head)."""
    heads = hidden // HEAD_SIZE
    if heads < 1 or hidden % HEAD_SIZE:
        raise InputError(f"hidden size {hidden} is not a multiple of {HEAD_SIZE}", field="--hidden")
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
        "intermediate_size": hidden * 8 // 3,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }


def write_workload(
    folder: Path, data: Path | None, pairs: int, fields: dict[str, Any], seed: int = 0
) -> list[PairTokens]:
    """Write `model/` (with the tokenizer) and `pairs.json` to a folder.

    Args:
        folder: an existing folder.
        data: where pairs are loaded from; None for generated ones.
        pairs: the first so many are taken.
        fields: see `model_fields`.
        seed: of the weights and of generated pairs.

    Raises:
        InputError: fewer pairs than asked for, or what loading them raises.
    """
    rows, tokenizer = (
        generated_pairs(pairs, fields["vocab_size"], seed)
        if data is None
        else loaded_pairs(data, pairs, min(BPE_TOKENS, fields["vocab_size"]))
    )
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    load_model(fields, seed=seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [PairTokens.from_row(row) for row in rows]


def loaded_pairs(
    source: Path, count: int, vocabulary: int
) -> tuple[list[dict[str, Any]], PreTrainedTokenizerBase]:
    """The first pairs of a source as ids, under a byte-level BPE learned on all of the source."""
    rows, _ = read_pairs(source, invalid="drop")
    if len(rows) < count:
        raise InputError(f"{len(rows)} usable pairs, {count} asked for", file=source, field="--pairs")
    texts = (row["prompt"] + row[reply] for row in rows for reply in ("chosen", "rejected"))
    tokenizer = train_byte_level_bpe(texts, vocabulary)
    columns = ("prompt", "chosen", "rejected")
    first = Dataset.from_list([{name: row[name] for name in columns} for row in rows[:count]])
    with tempfile.TemporaryDirectory() as cache:
        ids = tokenize_pairs(first, tokenizer, max_length=None, cache_dir=cache).dataset
        return [{f"{name}_ids": row[f"{name}_ids"] for name in columns} for row in ids], tokenizer


def generated_pairs(
    count: int, vocabulary: int, seed: int
) -> tuple[list[dict[str, Any]], PreTrainedTokenizerBase]:
    """Pairs of random tokens with lengths as in HH, and a tokenizer for the peers that must hold one."""
    random = np.random.default_rng(seed)
    lengths = {
        name: np.interp(random.uniform(0, _PERCENTILES[-1], count), _PERCENTILES, known).astype(int)
        for name, known in _HH_LENGTHS.items()
    }
    rows = [
        {name: random.integers(2, vocabulary, lengths[name][i]).tolist() for name in _HH_LENGTHS}
        for i in range(count)
    ]
    return rows, train_byte_level_bpe([], 258)


def count_work(pairs: list[PairTokens], batch_size: int, fields: dict[str, Any]) -> Work:
    """Tokens and least arithmetic of one epoch of DPO with a live reference.

    Every distinct token of a step goes through the body's matrices, and every distinct prediction through
    the head's, four times: once forward, twice backward (to the input and to the weight), and once forward
    in the reference. Attention adds the products of queries with keys and of weights with values, for the
    pairs of tokens that see each other, four times too. Norms, activations, softmax and optimiser are free.
    """
    body, head, attention = _matrix_sizes(fields)
    distinct = separate = padded = predictions = visible = 0
    for start in range(0, len(pairs), batch_size):
        sequences, begins = sequences_of(pairs[start : start + batch_size])
        tree = build_tree(sequences)
        replies = [rows[begin:] for rows, begin in zip(tree.sequence_rows, begins, strict=True)]
        distinct += len(tree)
        separate += sum(map(len, sequences))
        padded += len(sequences) * max(map(len, sequences))
        predictions += len(np.unique(np.concatenate(replies)))
        visible += int((tree.positions + 1).sum())
    multiply_adds = 4 * (body * distinct + head * predictions + 2 * attention * visible)
    return Work(distinct, separate, padded, predictions, 2 * multiply_adds)


def _matrix_sizes(fields: dict[str, Any]) -> tuple[int, int, int]:
    """Elements of the body's matrices, of the head's, and of all layers' query vectors of one token."""
    with torch.device("meta"):
        model = load_model(fields)
    head = output_head(model).module
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    config = load_config(fields)
    return sum(matrices), head.weight.numel(), config.num_hidden_layers * config.hidden_size
