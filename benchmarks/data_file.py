"""A file of generated preference pairs for the benchmark of the data path: real words, no two texts alike.

Texts are spans of consecutive words taken from a corpus, so that tokens are as long as in real text, and one
word in a hundred is made up or a number: a large file of real text goes on bringing words that were not seen
before, and a tokenizer that has met them all in its cache would be measured too fast.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
from lengths import LENGTHS

ROOT = Path(__file__).resolve().parent.parent
HH = ROOT.parent / "shared" / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
SMALL_WORLD = ROOT / "data" / "small_world" / "corpus.txt"

TOKENS_PER_WORD = 1.3
NEW_WORDS = 0.01
_LONGEST_SPAN = 12
_SYLLABLES = [a + b for a in "bcdfghjklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "il")]
_BATCH = 1000


def corpus() -> tuple[str, str]:
    """Real text to take words from, and what it is."""
    if HH.is_file():
        with gzip.open(HH, "rt", encoding="utf-8") as file:
            return "\n".join(json.loads(line)["chosen"] for line in file), "HH harmless-base (test split)"
    return SMALL_WORLD.read_text(encoding="utf-8"), "data/small_world/corpus.txt"


class _Writer:
    """Draws texts of so many words out of a corpus."""

    def __init__(self, text: str, seed: int) -> None:
        self._text = text
        self._starts = [found.start() for found in re.finditer(r"\s*\S+", text)] + [len(text)]
        self._random = np.random.default_rng(seed)

    def texts(self, words: np.ndarray) -> list[str]:
        """A text for each number of words."""
        text, starts, last = self._text, self._starts, len(self._starts) - 1
        spans = self._random.integers(3, _LONGEST_SPAN + 1, int(words.sum() // 3) + len(words) + 1).tolist()
        places = self._random.integers(0, last - _LONGEST_SPAN, len(spans)).tolist()
        new = self._random.random(len(spans)) < NEW_WORDS * (3 + _LONGEST_SPAN) / 2
        at, made = 0, []
        for wanted in words.tolist():
            parts = []
            while wanted > 0:
                length = min(spans[at], wanted)
                parts.append(text[starts[places[at]] : starts[places[at] + length]])
                if new[at]:
                    parts.append(f" {self._new_word()}")
                wanted -= length
                at += 1
            made.append("".join(parts).lstrip())
        return made

    def _new_word(self) -> str:
        drawn = self._random.integers(0, len(_SYLLABLES), 4)
        if drawn[0] % 4 == 0:
            return str(int(drawn[1]) * 97 + int(drawn[2]))
        return "".join(_SYLLABLES[i] for i in drawn[1 : 3 + drawn[0] % 2])


def write_pairs(file: Path, pairs: int, seed: int = 0) -> None:
    """Write so many {prompt, chosen, rejected} as JSON lines, of the lengths and the outer form of HH."""
    lengths = LENGTHS["hh-like"]
    writer, random = _Writer(corpus()[0], seed), np.random.default_rng(seed + 1)
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, pairs, _BATCH):
            count = min(_BATCH, pairs - start)
            columns = {
                name: writer.texts(np.ceil(part.draw(random, count) / TOKENS_PER_WORD).astype(int))
                for name, part in (
                    ("prompt", lengths.prompt),
                    ("chosen", lengths.chosen),
                    ("rejected", lengths.rejected),
                )
            }
            for prompt, chosen, rejected in zip(*columns.values(), strict=True):
                row = {
                    "prompt": f"\n\nHuman: {prompt}\n\nAssistant:",
                    "chosen": f" {chosen}",
                    "rejected": f" {rejected}",
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
