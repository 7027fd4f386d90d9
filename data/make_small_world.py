"""Make the small world: film reviews from a grammar, and preference pairs labelled by a known reward.

    python data/make_small_world.py [--out data/small_world] [--seed 0]

Writes corpus.txt, train.jsonl, heldout.jsonl and prompts.jsonl (described in data/README.md). The
grammar lies in small_world_grammar.txt, the reward in reward.py. Standard library only; one seed
gives the same bytes on every machine. Trains nothing and tokenises nothing: words are split at spaces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from reward import reward

CORPUS_REVIEWS = 10_000
POOL_REVIEWS = 110_000
"""Reviews, none of them in the corpus, out of which pairs with a common prefix are picked."""
TRAIN_PAIRS = 8_000
HELDOUT_PAIRS = 500
HELDOUT_PROMPTS = 200
PROMPT_WORDS = range(2, 9)
HELDOUT_SHARE = 0.25
"""Share of the prefixes that are kept out of training."""
REVIEW_WORDS = range(18, 46)

HERE = Path(__file__).resolve().parent

Triple = tuple[str, str, str, str]
"""Prompt and two completions, not labelled yet."""
Item = TypeVar("Item")

_AN = re.compile(r"\b([Aa]) (?=[aeiou]|honest|hour)(?!one|uni[qf]|use)")


class Scope(NamedTuple):
    """What a part of a review inherits: is it to praise, and on which topic does it speak."""

    positive: bool
    topic: str


class Rule(NamedTuple):
    alternatives: list[list[str]]
    """Each alternative cut at its references: text, reference, text, reference, ..., text."""
    once: bool
    """Drawn once per review."""


class Grammar:
    """Review texts from the rules of a grammar file, whose notation the file itself explains."""

    def __init__(self, text: str) -> None:
        joined = re.sub(r"\n +", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
        self.rules: dict[str, Rule] = {}
        for line in filter(None, joined.splitlines()):
            name, assign, body = _groups(r"(\w+[+-]?) (:?=) (.+)", line)
            alternatives = []
            for alternative in body.split("|"):
                times, phrase = _groups(r"(?:(\d+)x\b)?(.*)", alternative.strip())
                alternatives += [re.split(r"[{}]", phrase.strip())] * int(times or 1)
            self.rules[name] = Rule(alternatives, once=assign == ":=")

    def review(self, rng: random.Random) -> tuple[str, float]:
        """One review, and its latent positivity in [0, 1]: Beta(1/4, 1/4), so that most take a side."""
        positivity = rng.betavariate(0.25, 0.25)
        text = _Expansion(self, rng, positivity).expand("review", Scope(positive=True, topic=""))
        return _polish(text), positivity


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ValueError(f"the grammar has a line that cannot be read: {text!r}")
    return match.groups()


class _Expansion:
    """The drawing of one review, with what it has to remember."""

    def __init__(self, grammar: Grammar, rng: random.Random, positivity: float) -> None:
        self.rules, self.rng, self.positivity = grammar.rules, rng, positivity
        self.once: dict[str, str] = {}
        self.used: set[str] = set()

    def expand(self, reference: str, scope: Scope) -> str:
        name = reference.lstrip("?!>*")
        marks = reference[: len(reference) - len(name)]
        if "?" in marks:
            scope = scope._replace(positive=self.rng.random() < self.positivity)
        if "!" in marks:
            scope = scope._replace(positive=not scope.positive)
        if ">" in marks:
            scope = scope._replace(topic=self.expand("topic", scope))
        if "*" in marks:
            name = f"{scope.topic}_{name}"
        if name not in self.rules:
            name += "+" if scope.positive else "-"
        if name in self.once:
            return self.once[name]
        text = self._draw(self.rules[name], scope)
        if self.rules[name].once:
            self.once[name] = text
        return text

    def _draw(self, rule: Rule, scope: Scope) -> str:
        for _ in range(6):
            parts = self.rng.choice(rule.alternatives)
            if len(parts) > 1 or parts[0] not in self.used:
                break
        if len(parts) == 1:
            if parts[0]:
                self.used.add(parts[0])
            return parts[0]
        return "".join(self.expand(part, scope) if i % 2 else part for i, part in enumerate(parts))


def _polish(text: str) -> str:
    """Single spaces, `an` before a vowel sound, a capital at the start of each sentence."""
    text = " ".join(text.split())
    text = _AN.sub(r"\1n ", text)
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda letter: letter.group().upper(), text)


def reviews(grammar: Grammar, rng: random.Random) -> Iterator[str]:
    """Reviews of REVIEW_WORDS words, never the same one twice."""
    seen: set[str] = set()
    while True:
        text, _ = grammar.review(rng)
        if text not in seen and len(text.split()) in REVIEW_WORDS:
            seen.add(text)
            yield text


class Prefixes:
    """A pool of reviews dealt to the prompt lengths in turn and bucketed by their first words.

    A review lies in one bucket only and is used at most once.
    """

    def __init__(self, pool: list[str], rng: random.Random) -> None:
        self.rng = rng
        self.buckets: dict[int, dict[str, list[str]]] = {n: defaultdict(list) for n in PROMPT_WORDS}
        for i, text in enumerate(pool):
            n = PROMPT_WORDS[i % len(PROMPT_WORDS)]
            words = text.split(" ")
            self.buckets[n][" ".join(words[:n])].append(" " + " ".join(words[n:]))

    def split(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """The prefixes that three or more reviews share, by length, shuffled: for training and held out."""
        train, heldout = {}, {}
        for n, buckets in self.buckets.items():
            prefixes = [prefix for prefix, completions in buckets.items() if len(completions) > 2]
            self.rng.shuffle(prefixes)
            cut = round(HELDOUT_SHARE * len(prefixes))
            train[n], heldout[n] = prefixes[cut:], prefixes[:cut]
        return train, heldout

    def triples(self, prefixes: dict[int, list[str]]) -> dict[int, list[Triple]]:
        """Three completions of one prefix each, by length, in rounds: a second one of a prefix comes after
        the first of all."""
        return {n: self._in_rounds(n, names) for n, names in prefixes.items()}

    def _in_rounds(self, n: int, prefixes: list[str]) -> list[Triple]:
        rounds: dict[int, list[Triple]] = defaultdict(list)
        for prefix in prefixes:
            completions = self.buckets[n][prefix]
            for i in range(0, len(completions) - 2, 3):
                rounds[i].append((prefix, *completions[i : i + 3]))
        return [triple for i in sorted(rounds) for triple in rounds[i]]


def take_evenly(by_length: dict[int, list[Item]], count: int) -> list[Item]:
    """The first `count` items, one prompt length after the other; one that has run out is passed over."""
    rounds = zip_longest(*by_length.values())
    taken = list(islice((item for items in rounds for item in items if item is not None), count))
    if len(taken) < count:
        raise SystemExit(f"only {len(taken)} of {count} could be made: raise POOL_REVIEWS")
    return taken


def label(triple: Triple, rng: random.Random) -> dict[str, str | float]:
    """A canonical row from the best and the worst of three completions.

    The label follows Bradley-Terry: P(first preferred) = sigmoid(r_1 - r_2). Of three, because two drawn at
    random are often so alike that their label is a coin's.
    """
    prompt, *completions = triple
    worst, _, best = sorted(completions, key=lambda completion: reward(prompt + completion))
    first, second = rng.sample([worst, best], 2)
    margin = reward(prompt + first) - reward(prompt + second)
    if rng.random() >= 1.0 / (1.0 + math.exp(-margin)):
        first, second, margin = second, first, -margin
    return {"prompt": prompt, "chosen": first, "rejected": second, "margin": round(margin, 4)}


def make(seed: int) -> dict[str, str]:
    """The files of the small world: name -> content."""
    rng = random.Random(seed)
    texts = reviews(Grammar((HERE / "small_world_grammar.txt").read_text(encoding="utf-8")), rng)
    corpus = list(islice(texts, CORPUS_REVIEWS))
    prefixes = Prefixes(list(islice(texts, POOL_REVIEWS)), rng)
    train_prefixes, heldout_prefixes = prefixes.split()
    train = take_evenly(prefixes.triples(train_prefixes), TRAIN_PAIRS)
    heldout = take_evenly(prefixes.triples(heldout_prefixes), HELDOUT_PAIRS)
    prompts = take_evenly(heldout_prefixes, HELDOUT_PROMPTS)
    for rows in (train, heldout, prompts):
        rng.shuffle(rows)
    return {
        "corpus.txt": "".join(f"{text}\n" for text in corpus),
        "train.jsonl": _jsonl([label(triple, rng) for triple in train]),
        "heldout.jsonl": _jsonl([label(triple, rng) for triple in heldout]),
        "prompts.jsonl": _jsonl([{"prompt": prompt} for prompt in prompts]),
    }


def _jsonl(rows: list[dict[str, str | float]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small world of film reviews.")
    parser.add_argument("--out", type=Path, default=HERE / "small_world")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in make(args.seed).items():
        temporary = args.out / f".{name}.tmp"
        temporary.write_bytes(content.encode("utf-8"))
        os.replace(temporary, args.out / name)
        print(f"{args.out / name}: {content.count(chr(10))} lines, {len(content):,} characters")


if __name__ == "__main__":
    main()
