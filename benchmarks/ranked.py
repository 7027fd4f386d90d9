"""What the token tree saves on real data: HH pairs, and all pairs of ranked OASST replies.

Counts tokens only; nothing is trained or timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workload import BPE_TOKENS, DATA, HH

from dpo_kit.examples import PairTokens, sequences_of
from dpo_kit.tree import build_tree

OASST = DATA / "oasst" / "en_100_tree.jsonl"
STEP = 64
PADDED_STEP = 8

TextPair = tuple[str, str, str]


def oasst_pairs(file: Path) -> list[TextPair]:
    """(conversation so far, better reply, worse reply) of all pairs of ranked assistant siblings."""
    pairs: list[TextPair] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            for prompt, replies in _siblings(json.loads(line)["prompt"], ""):
                ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
                pairs += [
                    (prompt, better["text"], worse["text"])
                    for i, better in enumerate(ranked)
                    for worse in ranked[i + 1 :]
                ]
    return pairs


def _siblings(message: dict[str, Any], before: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every conversation that ends with a prompter's message, and the assistant's replies to it."""
    role = "Human" if message["role"] == "prompter" else "Assistant"
    text = f"{before}\n\n{role}: {message['text']}"
    replies = message.get("replies") or []
    if message["role"] == "prompter":
        yield f"{text}\n\nAssistant: ", replies
    for reply in replies:
        yield from _siblings(reply, text)


def hh_pairs(file: Path) -> list[TextPair]:
    """The usable pairs of HH."""
    from dpo_kit.pairs import read_pairs

    rows, _ = read_pairs(file, invalid="drop")
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def token_pairs(pairs: Sequence[TextPair]) -> list[PairTokens]:
    """Ids under a byte-level BPE learned on the same texts; prompt and reply are encoded apart."""
    from dpo_kit.tokenizer import train_byte_level_bpe

    tokenizer = train_byte_level_bpe((text for pair in pairs for text in pair), BPE_TOKENS)
    texts = sorted({text for pair in pairs for text in pair})
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = {text: np.array(row, np.int64) for text, row in zip(texts, encoded, strict=True)}
    return [PairTokens(*(ids[text] for text in pair)) for pair in pairs]


def sharing(data: str, pairs: Sequence[PairTokens], seed: int = 0) -> dict[str, Any]:
    """Tokens that are computed of the same pairs, by how they are shared and dealt to steps of 64."""
    shuffled = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    grouped = sorted(pairs, key=lambda pair: pair.prompt.astype(">u4").tobytes())
    return {
        "data": data,
        "pairs": len(pairs),
        "separate": sum(len(s) for s in sequences_of(pairs)[0]),
        "within_pairs": tree_tokens(pairs, 1),
        "random": tree_tokens(shuffled, STEP),
        "grouped": tree_tokens(grouped, STEP),
        "padded": padded_tokens(shuffled, PADDED_STEP),
    }


def tree_tokens(pairs: Sequence[PairTokens], step: int) -> int:
    """Distinct tokens of all steps of so many pairs."""
    starts = range(0, len(pairs), step)
    return sum(len(build_tree(sequences_of(pairs[start : start + step])[0])) for start in starts)


def padded_tokens(pairs: Sequence[PairTokens], step: int) -> int:
    """Tokens of one rectangle per step."""
    total = 0
    for start in range(0, len(pairs), step):
        sequences, _ = sequences_of(pairs[start : start + step])
        total += len(sequences) * max(map(len, sequences))
    return total


def all_shares() -> list[dict[str, Any]]:
    """For each of the real data sets that is here."""
    found = []
    if HH.exists():
        found.append(sharing("HH harmless-base", token_pairs(hh_pairs(HH))))
    if OASST.exists():
        name = "OASST, all pairs of ranked replies"
        found.append(sharing(name, token_pairs(oasst_pairs(OASST))))
    return found
