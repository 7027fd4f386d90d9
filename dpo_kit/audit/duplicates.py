"""What is in the data more than once: rows, prompts, the same pair with both orders, rows of held-out data.

Rows leave digests of 64 bits and MinHash signatures behind (`minhash`), some 500 bytes in all; texts are kept
of the first rows only, to show. All but equal rows are told apart whatever their case and white space.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from dpo_kit.audit.faults import EXAMPLES, Places, share_in_words, shown
from dpo_kit.audit.findings import Check, Example, Finding, Result, Severity
from dpo_kit.audit.minhash import HASHES, NEAR, Signatures, near_groups, words_of
from dpo_kit.audit.preferences import both_orders, on_cycles
from dpo_kit.pairs.kinds import LISTS, PAIRS, UNPAIRED, Kind

# Rows whose texts are kept for examples.
KEPT_TO_SHOW = 10_000

# Rows per prompt are counted in these classes: from each number up to below the next.
ROWS_PER_PROMPT = (1, 2, 3, 4, 5, 10, 20, 50, 100)

_ESTIMATE = f"estimated Jaccard index of word triples of {NEAR} or more by {HASHES} hashes"


class Duplicates:
    """Repeated and contradictory rows, and what training and held-out data share."""

    name = "duplicates"

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._places = Places()
        self._held_out = array("B")
        self._whole, self._prompts, self._rows = array("Q"), array("Q"), array("Q")
        self._prompt_signature = array("I")
        self._prompt_signatures = Signatures()
        # Of the first reply, and of the others: a long one must not hide that a short one differs.
        self._first_signatures, self._other_signatures = Signatures(), Signatures()
        # Of the preferences: the better and the worse reply, and the row. Of labelled replies: reply, label.
        self._better, self._worse, self._edge_row = array("Q"), array("Q"), array("I")
        self._labelled, self._labels = array("Q"), array("B")
        self._last_prompt: str | None = None
        self._last_digest = 0
        self._last_place = ""
        self._last_edges: tuple[tuple[int, int], ...] = ()
        self._kept: dict[int, dict[str, str]] = {}

    def add(self, example: Example) -> None:
        """One row's digests and signatures."""
        index = len(self._places)
        self._kind = example.kind
        if index < KEPT_TO_SHOW:
            self._kept[index] = shown(example)
        self._places.add(example)
        self._held_out.append(example.held_out)
        if example.prompt != self._last_prompt:
            self._last_prompt = example.prompt
            words = words_of(example.prompt)
            self._last_digest = _digest(b" ".join(words))
            self._prompt_signatures.add(words)
        self._prompt_signature.append(len(self._prompt_signatures) - 1)
        self._prompts.append(self._last_digest)
        judgement = example.row.get(example.kind.judgement) if example.kind.judgement else None
        texts = "\0".join([example.prompt, *example.replies, str(judgement)])
        self._whole.append(_digest(texts.encode("utf-8", "surrogatepass")))
        words_of_replies = [words_of(reply) for reply in example.replies]
        replies = [_digest(b" ".join(words), self._last_digest) for words in words_of_replies]
        self._first_signatures.add(*words_of_replies[:1])
        self._other_signatures.add(*words_of_replies[1:])
        self._rows.append(_digest(f"{replies} {judgement}".encode()))
        if not example.held_out:
            self._add_preferences(example, replies, index)

    def _add_preferences(self, example: Example, replies: list[int], index: int) -> None:
        if example.kind == UNPAIRED:
            self._labelled.append(replies[0])
            self._labels.append(bool(example.row["label"]))
            return
        edges = tuple(_edges(example, replies))
        if example.place == self._last_place and edges == tuple((b, a) for a, b in self._last_edges):
            # A tie or a share of votes, made into a pair each way from one row on purpose.
            for column in (self._better, self._worse, self._edge_row):
                del column[len(column) - len(edges) :]
            self._last_place = ""
            return
        self._last_place, self._last_edges = example.place, edges
        for better, worse in edges:
            self._better.append(better)
            self._worse.append(worse)
            self._edge_row.append(index)

    def result(self) -> Result:
        """Findings of all rows that came; `rows_per_prompt` counts prompts by their number of rows."""
        if self._kind is None:
            return Result()
        training = np.flatnonzero(_numbers(self._held_out) == 0)
        findings = [
            *self._of_rows(training),
            *self._of_preferences(training),
            *self._of_labels(training),
            *self._of_prompts(training),
            *self._of_held_out(training),
        ]
        _, rows = np.unique(_numbers(self._prompts)[training], return_counts=True)
        figures = {
            "rows": len(training),
            "distinct_prompts": len(rows),
            "rows_per_prompt": _histogram(rows),
            "counts": {finding.name: finding.count for finding in findings},
        }
        return Result(tuple(findings), figures)

    def _of_rows(self, training: np.ndarray) -> Iterator[Finding]:
        _, firsts, group = np.unique(_numbers(self._whole)[training], return_index=True, return_inverse=True)
        again = training != training[firsts[group]]
        yield from self._finding(
            "duplicate_rows",
            "warning",
            training[again],
            len(training),
            "are equal to an earlier one, prompt, replies and judgement",
            "Take the repeated rows out, or say with a weight how much each row should count",
            _mate(training, group),
        )
        distinct = np.sort(training[firsts])
        group = near_groups(
            (self._first_signatures.array(), distinct),
            (self._other_signatures.array(), distinct),
            (self._prompt_signatures.array(), _numbers(self._prompt_signature)[distinct]),
            proposing=2,
        )
        yield from self._finding(
            "near_duplicate_rows",
            "warning",
            distinct[_of_several(group)],
            len(training),
            f"are nearly the same as another, prompt and each reply ({_ESTIMATE})",
            "Read a few of them; keep one of each group, where they say the same",
            _mate(distinct, group),
        )

    def _of_preferences(self, training: np.ndarray) -> Iterator[Finding]:
        rows = _numbers(self._edge_row).astype(np.int64)
        better, worse = _numbers(self._better), _numbers(self._worse)
        unequal = better != worse
        rows, better, worse = rows[unequal], better[unequal], worse[unequal]
        if not len(rows):
            return
        _, nodes = np.unique(np.concatenate([better, worse]), return_inverse=True)
        better, worse = nodes[: len(rows)], nodes[len(rows) :]
        turned = both_orders(better, worse)
        between = np.minimum(better, worse) * len(nodes) + np.maximum(better, worse)
        yield from self._finding(
            "both_orders",
            "error",
            np.unique(rows[turned]),
            len(training),
            "prefer one reply to another where some other row with that prompt prefers the other",
            "Decide which order is right, or take both out; for real disagreement give weights",
            _mate(rows[turned], between[turned], better[turned]),
        )
        component = on_cycles(better, worse)
        inside = component >= 0
        yield from self._finding(
            "preference_cycles",
            "error",
            np.unique(rows[inside]),
            len(training),
            "stand in a cycle of preferences among the replies of one prompt (A over B, B over C, C over A): "
            "no reward orders them",
            "Look at how the replies were judged, and take out one preference of each cycle",
            _mate(rows[inside], component[inside]),
        )

    def _of_labels(self, training: np.ndarray) -> Iterator[Finding]:
        if self._kind != UNPAIRED:
            return
        replies, labels = _numbers(self._labelled), _numbers(self._labels).astype(bool)
        among = np.isin(replies, np.intersect1d(replies[labels], replies[~labels]))
        yield from self._finding(
            "both_labels",
            "error",
            training[among],
            len(training),
            "have a reply that is called good in one row and bad in another with that prompt",
            "Decide which label is right, or take both out",
            _mate(training, replies, labels),
        )

    def _of_prompts(self, training: np.ndarray) -> Iterator[Finding]:
        _, firsts, group, count = np.unique(
            _numbers(self._prompts)[training], return_index=True, return_inverse=True, return_counts=True
        )
        yield from self._finding(
            "shared_prompts",
            "note",
            training[count[group] > 1],
            len(training),
            f"share their prompt with another; {len(firsts):,} prompts are distinct",
            "Split the data by prompt (`dpo-kit data split`); set group_by_prompt, and training costs less",
            _mate(training, group),
        )
        distinct = np.sort(training[firsts])
        near = self._near_prompts(distinct)
        yield from self._finding(
            "near_duplicate_prompts",
            "note",
            distinct[_of_several(near)],
            len(distinct),
            f"have a prompt that is nearly that of another, one row counted of each prompt ({_ESTIMATE})",
            "See whether they are one prompt, before you split the data or count its prompts",
            _mate(distinct, near),
        )

    def _of_held_out(self, training: np.ndarray) -> Iterator[Finding]:
        held_out = np.flatnonzero(_numbers(self._held_out))
        if not len(held_out) or not len(training):
            return
        advice = "Take them out of one side; `dpo-kit data split` makes a split by prompt"
        rows, prompts = _numbers(self._rows), _numbers(self._prompts)
        known = np.isin(prompts[held_out], prompts[training])
        for name, inside, digests, what in (
            ("held_out_rows", np.isin(rows[held_out], rows[training]), rows, "are in the training data"),
            ("held_out_prompts", known, prompts, "have a prompt of the training data"),
        ):
            beside = _mate(np.arange(len(prompts)), digests, _numbers(self._held_out))
            found = held_out[inside]
            yield from self._finding(name, "error", found, len(held_out), what, advice, beside)
        _, firsts, number = np.unique(prompts, return_index=True, return_inverse=True)
        group = self._near_prompts(firsts)[number]
        near = held_out[~known & np.isin(group[held_out], group[training])]
        yield from self._finding(
            "near_held_out_prompts",
            "warning",
            near,
            len(held_out),
            f"have a prompt that is nearly one of the training data ({_ESTIMATE})",
            "Read a few of them; take them out of one side where they are the same question",
            _mate(np.arange(len(prompts)), group, _numbers(self._held_out)),
        )

    def _near_prompts(self, rows: np.ndarray) -> np.ndarray:
        """For each row the least place in `rows` of one whose prompt is near it, by some way."""
        return near_groups((self._prompt_signatures.array(), _numbers(self._prompt_signature)[rows]))

    def _finding(
        self,
        name: str,
        severity: Severity,
        found: np.ndarray,
        of: int,
        what: str,
        advice: str,
        mate: Callable[[int], int],
    ) -> Iterator[Finding]:
        """The finding about the rows of these numbers, if there are any; `mate` gives the one that a row is
        shown beside."""
        if not len(found):
            return
        assert self._kind is not None
        rows = self._kind.rows if not self._held_out[found[0]] else f"held-out {self._kind.rows}"
        sentence = f"{len(found):,} of {of:,} {rows} ({share_in_words(len(found), of)}) {what}."
        examples = tuple(self._shown(row, mate(row)) for row in found[:EXAMPLES].tolist())
        places = tuple(self._places[i] for i in found.tolist())
        yield Finding(name, severity, len(found), of, sentence, advice, places, examples)

    def _shown(self, row: int, beside: int) -> dict[str, str]:
        example = {"place": self._places[row], "beside": self._places[beside], **self._kept.get(row, {})}
        other = self._kept.get(beside, {})
        return example | {
            f"{label} beside": text
            for label, text in other.items()
            if label != "place" and text != example.get(label)
        }


def _edges(example: Example, replies: list[int]) -> Iterator[tuple[int, int]]:
    """(better, worse): of a list, each reply above all those of the next lower score."""
    if example.kind == PAIRS:
        yield replies[0], replies[1]
    elif example.kind == LISTS:
        by_score: dict[Any, list[int]] = {}
        for reply, score in zip(replies, example.row["scores"], strict=True):
            by_score.setdefault(score, []).append(reply)
        levels = [by_score[score] for score in sorted(by_score, reverse=True)]
        for upper, lower in pairwise(levels):
            yield from ((a, b) for a in upper for b in lower)


def _digest(data: bytes, key: int = 0) -> int:
    """64 bits that tell the data, under this key, from others."""
    return int.from_bytes(blake2b(data, digest_size=8, salt=key.to_bytes(8, "little")).digest(), "little")


def _numbers(column: array) -> np.ndarray:
    return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, column.typecode)


def _of_several(group: np.ndarray) -> np.ndarray:
    """Whether each thing's group (the number of its least member) has other members [things]."""
    return np.bincount(group, minlength=len(group))[group] > 1


def _mate(rows: np.ndarray, group: np.ndarray, side: np.ndarray | None = None) -> Callable[[int], int]:
    """A function: row -> another one of its group (on another side, where there are sides), the last before
    it if any is."""

    def mate(row: int) -> int:
        at = np.flatnonzero(rows == row)[0]
        others = rows[(group == group[at]) & ((rows != row) if side is None else (side != side[at]))]
        before = others[others < row]
        return int(before[-1] if len(before) else others[0])

    return mate


def _histogram(rows: np.ndarray) -> dict[str, int]:
    """Prompts by how many rows they have; classes without any are left out."""
    counts = {}
    for low, above in zip(ROWS_PER_PROMPT, (*ROWS_PER_PROMPT[1:], None), strict=True):
        number = int(((rows >= low) & (rows < above if above else True)).sum())
        if number:
            wide = above is None or above - low > 1
            counts[f"{low}+" if above is None else f"{low}-{above - 1}" if wide else str(low)] = number
    return counts


CHECKS: tuple[type[Check], ...] = (Duplicates,)
