"""What is in the data more than once: rows, prompts, the same pair with both orders, rows of held-out data.

Rows leave digests of 64 bits and MinHash signatures behind (`minhash`), some 600 bytes in all; texts are kept
of a few rows only, to show. What rows are, for this, is for `identity`: all but equal rows are told apart
whatever their case and white space. Pairs from one place, as of one ranked list, are never repetitions of
each other.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from dpo_kit.audit.faults import EXAMPLES, Places, agreeing, share_in_words, shown
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.audit.identity import LAST_WORDS, Came, digest, words_in_context
from dpo_kit.audit.minhash import HASHES, NEAR, Compared, Signatures, near_groups
from dpo_kit.audit.preferences import both_orders, on_cycles
from dpo_kit.pairs.kinds import CONTEXT, LISTS, PAIRS, UNPAIRED, Kind
from dpo_kit.pairs.statistics import content_of

# Rows whose texts are kept for examples: so many of the first ones, of training and held-out data each. And
# behind them, of those with each digest that came before, so many.
KEPT_TO_SHOW = 10_000
KEPT_OF_REPEATED = 50

# Rows per prompt are counted in these classes: from each number up to below the next.
ROWS_PER_PROMPT = (1, 2, 3, 4, 5, 10, 20, 50, 100)

# Of the last words of prompts, that two of them are near each other: one word of them may differ, but not the
# question behind a long instruction that many prompts have in common.
_NEAR_AT_END = 0.6

_ESTIMATE = f"estimated Jaccard index of word triples of {NEAR} or more by {HASHES} hashes"


class Duplicates:
    """Repeated and contradictory rows, and what training and held-out data share."""

    name = "duplicates"

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._places = Places()
        self._place_number = array("I")
        self._held_out = array("B")
        self._whole, self._prompts, self._rows = array("Q"), array("Q"), array("Q")
        self._prompt_signature = array("I")
        self._prompt_signatures, self._end_signatures = Signatures(), Signatures()
        # Of the first reply, and of the others: a long one must not hide that a short one differs.
        self._first_signatures, self._other_signatures = Signatures(), Signatures()
        # Of the preferences: the better and the worse reply, and the row. Of labelled replies: reply, label.
        self._better, self._worse, self._edge_row = array("Q"), array("Q"), array("I")
        self._labelled, self._labels = array("Q"), array("B")
        self._last_prompt: tuple[Any, ...] | None = None
        self._last_digest = 0
        self._last_place = self._last_turned = ""
        self._last_edges: tuple[tuple[int, int], ...] = ()
        self._kept: dict[int, dict[str, str]] = {}
        self._kept_counts: Counter[tuple[bool, int]] = Counter()
        self._came = Came()

    def add(self, example: Example) -> None:
        """One row's digests and signatures."""
        index, row = len(self._places), example.row
        self._kind = example.kind
        self._places.add(example)
        number = self._place_number[-1] if index else 0
        self._place_number.append(number + (example.place != self._last_place))
        self._last_place = example.place
        self._held_out.append(example.held_out)
        prompt = (row["prompt"], *(row.get(name) for name in CONTEXT))
        if prompt != self._last_prompt:
            self._last_prompt = prompt
            words = words_in_context(row, row["prompt"])
            self._last_digest = digest(b" ".join(words))
            self._prompt_signatures.add(words)
            self._end_signatures.add(words[-LAST_WORDS:])
        self._prompt_signature.append(len(self._prompt_signatures) - 1)
        self._prompts.append(self._last_digest)
        self._whole.append(digest(content_of(row, example.kind)))
        parts = example.kind.parts(row).values()
        words_of_replies = [words_in_context(row, reply) for reply in parts]
        replies = [digest(b" ".join(words), self._last_digest) for words in words_of_replies]
        self._first_signatures.add(*words_of_replies[:1])
        self._other_signatures.add(*words_of_replies[1:])
        judgement = row.get(example.kind.judgement) if example.kind.judgement else None
        self._rows.append(digest(f"{replies} {judgement}".encode()))
        self._keep(example, index)
        if not example.held_out:
            self._add_preferences(example, replies, index)

    def _keep(self, example: Example, index: int) -> None:
        """Keep the row's texts, if it is of the first ones, or has a digest that came before."""
        count = self._kept_counts
        count[example.held_out, 0] += 1
        keep = count[example.held_out, 0] <= KEPT_TO_SHOW
        for which, column in enumerate((self._whole, self._rows, self._prompts), 1):
            if self._came.before(column[index] ^ which) and not keep:
                count[example.held_out, which] += 1
                keep = count[example.held_out, which] <= KEPT_OF_REPEATED
        if keep:
            self._kept[index] = shown(example)

    def _add_preferences(self, example: Example, replies: list[int], index: int) -> None:
        if example.kind == UNPAIRED:
            self._labelled.append(replies[0])
            self._labels.append(bool(example.row["label"]))
            return
        edges = tuple(_edges(example, replies))
        if example.place == self._last_turned and edges == tuple((b, a) for a, b in self._last_edges):
            # A tie or a share of votes, made into a pair each way from one row on purpose.
            for column in (self._better, self._worse, self._edge_row):
                del column[len(column) - len(edges) :]
            self._last_turned = ""
            return
        self._last_turned, self._last_edges = example.place, edges
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
        places = _numbers(self._place_number)
        again = places[training] != places[training[firsts[group]]]
        yield from self._finding(
            "duplicate_rows",
            "warning",
            training[again],
            len(training),
            "are equal to an earlier one, prompt, replies and judgement",
            "Take the repeated rows out, or say with a weight how much each row should count.",
            _mate(training, group),
        )
        distinct = np.setdiff1d(training[firsts], training[self._with_both_labels()])
        group = near_groups(
            Compared(self._first_signatures.array(), distinct),
            Compared(self._other_signatures.array(), distinct),
            *self._by_prompt(distinct),
            proposing=2,
        )
        yield from self._finding(
            "near_duplicate_rows",
            "warning",
            distinct[_of_several(group, places[distinct])],
            len(training),
            f"are nearly the same as another, prompt and each reply ({_ESTIMATE})",
            "Read a few of them; keep one of each group, where they say the same.",
            _mate(distinct, group, places[distinct]),
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
            "Decide which order is right, or take both out; for real disagreement give weights.",
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
            "Look at how the replies were judged, and take out one preference of each cycle.",
            _mate(rows[inside], component[inside]),
        )

    def _of_labels(self, training: np.ndarray) -> Iterator[Finding]:
        if self._kind != UNPAIRED:
            return
        replies, labels = _numbers(self._labelled), _numbers(self._labels)
        among = self._with_both_labels()
        yield from self._finding(
            "both_labels",
            "error",
            training[among],
            len(training),
            "have a reply that is called good in one row and bad in another with that prompt",
            "Decide which label is right, or take both out.",
            _mate(training, replies, labels),
        )

    def _with_both_labels(self) -> np.ndarray:
        """The places among the training rows of those whose reply has the other label too."""
        replies, labels = _numbers(self._labelled), _numbers(self._labels).astype(bool)
        return np.flatnonzero(np.isin(replies, np.intersect1d(replies[labels], replies[~labels])))

    def _of_prompts(self, training: np.ndarray) -> Iterator[Finding]:
        _, firsts, group, count = np.unique(
            _numbers(self._prompts)[training], return_index=True, return_inverse=True, return_counts=True
        )
        yield from self._finding(
            "shared_prompts",
            "note",
            training[count[group] > 1],
            len(training),
            f"share the prompt with another; {len(firsts):,} prompts are distinct, whatever their case "
            "and white space",
            "Split the data by prompt (`dpo-kit data split`); set group_by_prompt, and training costs less.",
            _mate(training, group),
        )
        distinct = np.sort(training[firsts])
        near = near_groups(*self._by_prompt(distinct))
        places = _numbers(self._place_number)[distinct]
        yield from self._finding(
            "near_duplicate_prompts",
            "note",
            distinct[_of_several(near, places)],
            len(distinct),
            f"have a prompt that is nearly that of another, one row counted of each prompt ({_ESTIMATE})",
            "See whether they are one prompt, before you split the data or count its prompts.",
            _mate(distinct, near, places),
        )

    def _of_held_out(self, training: np.ndarray) -> Iterator[Finding]:
        held_out = np.flatnonzero(_numbers(self._held_out))
        if not len(held_out) or not len(training):
            return
        advice = "Take them out of one side; `dpo-kit data split` makes a split by prompt."
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
        group = near_groups(*self._by_prompt(firsts))[number]
        near = held_out[~known & np.isin(group[held_out], group[training])]
        yield from self._finding(
            "near_held_out_prompts",
            "warning",
            near,
            len(held_out),
            f"have a prompt that is nearly one of the training data ({_ESTIMATE})",
            "Read a few of them; take them out of one side where they are the same question.",
            _mate(np.arange(len(prompts)), group, _numbers(self._held_out)),
        )

    def _by_prompt(self, rows: np.ndarray) -> tuple[Compared, Compared]:
        """How near the prompts of these rows are: each as a whole, and its last words."""
        place = _numbers(self._prompt_signature)[rows]
        return (
            Compared(self._prompt_signatures.array(), place),
            Compared(self._end_signatures.array(), place, _NEAR_AT_END),
        )

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
        count, share = len(found), share_in_words(len(found), of)
        sentence = f"{count:,} of {of:,} {rows} ({share}) {agreeing(what, count)}."
        examples = tuple(self._shown(row, mate(row)) for row in found[:EXAMPLES].tolist())
        places = tuple(dict.fromkeys(self._places[i] for i in found.tolist()))
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


def _numbers(column: array) -> np.ndarray:
    return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, column.typecode)


def _of_several(group: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether each thing's group (the number of its least member) has members from other places [things]."""
    least, greatest = places.copy(), places.copy()
    np.minimum.at(least, group, places)
    np.maximum.at(greatest, group, places)
    return (least != greatest)[group]


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
