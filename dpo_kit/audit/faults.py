"""What the checks that look at one row after the other have in common: whose text has a fault, and where.

A row's texts are its prompt, its preferred replies (chosen, desirable, best of a list) and the others. The
account of a fault holds places in a few bytes a row, and the texts of a few examples. Looks for nothing
itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Final

from dpo_kit.audit.findings import Example, Finding, Severity
from dpo_kit.pairs.kinds import LISTS, PAIRS, UNPAIRED, Kind

PROMPT, PREFERRED, OTHER = 1, 2, 4

EXAMPLES = 5
SHOWN_CHARACTERS = 300

# Of the preferred replies: from this share on, what is a grave fault is learned.
NOTICEABLE: Final = 0.01

# Standard errors between two shares; beyond them chance is not what sets them apart.
CLEAR: Final = 3.0

_NAMES = {
    "pairs": ("chosen", "rejected"),
    "unpaired": ("desirable", "undesirable"),
    "lists": ("best", "other"),
}


def side_names(kind: Kind) -> tuple[str, str]:
    """What the preferred replies and the others are called in this kind of rows."""
    return _NAMES[kind.name]


def reply_sides(example: Example) -> tuple[int, ...]:
    """For each reply `PREFERRED` or `OTHER`; of a list, those with its highest score are preferred."""
    if example.kind == UNPAIRED:
        return (PREFERRED if example.row["label"] else OTHER,)
    if example.kind == LISTS:
        scores = example.row["scores"]
        return tuple(PREFERRED if score == max(scores) else OTHER for score in scores)
    return (PREFERRED, OTHER)


def reply_labels(example: Example) -> list[str]:
    """What each reply is called where it is shown."""
    if example.kind == LISTS:
        return [f"completion {i}" for i in range(1, len(example.replies) + 1)]
    names = side_names(example.kind)
    return [names[0] if side == PREFERRED else names[1] for side in reply_sides(example)]


def clipped(text: str, around: int = 0) -> str:
    """The text; of a long one the part around that character, with an ellipsis where it is cut."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    start = max(0, min(around - SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS))
    end = start + SHOWN_CHARACTERS
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def shown(example: Example) -> dict[str, str]:
    """The row's texts as examples show them; of its prompt the end, which the replies answer."""
    texts = {"place": example.place, "prompt": clipped(example.prompt, len(example.prompt))}
    for label, reply in list(zip(reply_labels(example), example.replies, strict=True))[:EXAMPLES]:
        texts[label] = clipped(reply)
    return texts


def share_in_words(count: int, of: int) -> str:
    """A share in per cent, with enough digits not to call something nothing."""
    share = count / of if of else 0.0
    return f"{share:.1%}" if share >= 0.0005 or not count else "less than 0.1%"


_VERBS = {"have": "has", "are": "is"}


def agreeing(what: str, count: int) -> str:
    """A clause that begins with a verb in the plural, as it stands after so many: of 1, `holds ...`."""
    verb, _, rest = what.partition(" ")
    return f"{_VERBS.get(verb, verb + 's')} {rest}" if count == 1 else what


class Places:
    """Places of rows in the order in which they came, in some 20 bytes each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._prefixes: list[str] = []
        self._source = array("I")
        self._ends = array("Q")
        self._rest = bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, example: Example) -> None:
        prefix = example.source if example.place.startswith(example.source) else ""
        number = self._numbers.setdefault(prefix, len(self._prefixes))
        if number == len(self._prefixes):
            self._prefixes.append(prefix)
        self._source.append(number)
        self._rest += example.place[len(prefix) :].encode("utf-8", "surrogatepass")
        self._ends.append(len(self._rest))

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        rest = self._rest[start : self._ends[index]].decode("utf-8", "surrogatepass")
        return self._prefixes[self._source[index]] + rest

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Fault:
    """The rows with one fault: how many have it in the prompt, in preferred replies and in others."""

    def __init__(self) -> None:
        self.places = Places()
        self.examples: list[dict[str, str]] = []
        self.prompt = self.preferred = self.other = 0

    def add(self, example: Example, where: int, what: Mapping[str, str] | None = None) -> None:
        """A row with it; `where` is a sum of the sides that have it, `what` is shown beside or in place of
        the texts of the row."""
        self.add_row(example, what)
        self.add_texts(where)

    def add_row(self, example: Example, what: Mapping[str, str] | None = None) -> None:
        """The row's place, and what is shown of it."""
        self.places.add(example)
        if len(self.examples) < EXAMPLES:
            self.examples.append({**shown(example), **(what or {})})

    def finding(self, name: str, severity: Severity, of: int, sentence: str, advice: str) -> Finding:
        """The finding of this fault among so many rows."""
        # Several pairs may come from one place.
        places = tuple(dict.fromkeys(self.places))
        return Finding(name, severity, len(self.places), of, sentence, advice, places, tuple(self.examples))

    def add_texts(self, where: int) -> None:
        """A text more on each of these sides."""
        self.prompt += bool(where & PROMPT)
        self.preferred += bool(where & PREFERRED)
        self.other += bool(where & OTHER)


class Account:
    """How many rows were looked at, and the faults found in them by their names.

    Where one row of the file gave several pairs, as a ranked list does, a text that stands in more of them is
    counted once: in `with_preferred`, `with_other`, and in the sides of a fault.
    """

    def __init__(self) -> None:
        self.rows = self.with_preferred = self.with_other = 0
        self.kind: Kind | None = None
        self.faults: dict[str, Fault] = {}
        self._place = ""
        # Of the rows of this place: side and text, and where a fault was found the fault's name too.
        self._here: set[tuple[str, int, str]] = set()

    def count(self, example: Example, sides: tuple[int, ...]) -> None:
        """A row that is looked at, and the sides of its replies."""
        self.kind = example.kind
        self.rows += 1
        if example.place != self._place:
            self._place = example.place
            self._here.clear()
        new = self._new("", example, PREFERRED | OTHER) if example.kind == PAIRS else sum({*sides})
        self.with_preferred += bool(new & PREFERRED)
        self.with_other += bool(new & OTHER)

    def add(self, name: str, example: Example, where: int, what: Mapping[str, str] | None = None) -> None:
        """A row with the fault of this name, as `Fault.add` takes it."""
        self.add_to(self.faults.setdefault(name, Fault()), name, example, where, what)

    def add_to(
        self,
        fault: Fault,
        name: str,
        example: Example,
        where: int,
        what: Mapping[str, str] | None = None,
    ) -> None:
        """The same for a fault that is kept elsewhere, under a name that no other has."""
        fault.add_row(example, what)
        fault.add_texts(self._new(name, example, where) if example.kind == PAIRS else where)

    def _new(self, name: str, example: Example, where: int) -> int:
        """Those sides of a pair whose text did not come before from this place, under this name."""
        new = 0
        for side, text in zip((PROMPT, PREFERRED, OTHER), (example.prompt, *example.replies), strict=True):
            if where & side and (name, side, text) not in self._here:
                self._here.add((name, side, text))
                new |= side
        return new

    def leans(self, fault: Fault) -> bool:
        """Whether preferred replies have the fault more often than the others, beyond chance."""
        return excess(fault.preferred, self.with_preferred, fault.other, self.with_other) >= CLEAR

    def severity(self, fault: Fault, gravest: Severity) -> Severity:
        """`gravest` where training teaches the fault: preferred replies have it more often, or, if it is an
        error, at a `NOTICEABLE` share. Else a warning where prompts have it, or preferred replies an error.
        """
        noticeable = self.with_preferred > 0 and fault.preferred / self.with_preferred >= NOTICEABLE
        if self.leans(fault) or (gravest == "error" and noticeable):
            return gravest
        return "warning" if fault.prompt or (fault.preferred and gravest == "error") else "note"

    def finding(self, name: str, what: str, advice: str, gravest: Severity) -> Finding | None:
        """The finding of the fault of this name, if any row has it: "12 of 99 pairs (12.1%) `what`: ..."."""
        fault = self.faults.get(name)
        if fault is None or self.kind is None:
            return None
        severity = self.severity(fault, gravest)
        count = len(fault.places)
        of = f"{count:,} of {self.rows:,} {self.kind.rows} ({share_in_words(count, self.rows)})"
        sentence = f"{of} {agreeing(what, count)}{self._sides_in_words(fault)}."
        if self.leans(fault):
            preferred, other = side_names(self.kind)
            shares = (
                share_in_words(fault.preferred, self.with_preferred),
                share_in_words(fault.other, self.with_other),
            )
            sentence += (
                f" {preferred.capitalize()} replies have it more often than {other} ones"
                f" ({shares[0]} against {shares[1]}): training teaches it."
            )
        return fault.finding(name, severity, self.rows, sentence, advice)

    def _sides_in_words(self, fault: Fault) -> str:
        """How many texts on each side have the fault; nothing where it is of prompts alone."""
        assert self.kind is not None
        names = side_names(self.kind)
        counts = dict(zip(names, (fault.preferred, fault.other), strict=True))
        replies = [f"{count:,} {name}" for name, count in counts.items() if count]
        if not replies:
            return ""
        one = sum(counts.values()) == 1
        prompts = [f"{fault.prompt:,} prompt{'s' if fault.prompt > 1 else ''}"] if fault.prompt else []
        words = [*prompts, f"{' and '.join(replies)} {'reply' if one else 'replies'}"]
        return f": in {', '.join(words)}"

    def by_side(self) -> dict[str, dict[str, int]]:
        """For each fault the rows that have it, in all and by side."""
        if self.kind is None:
            return {}
        preferred, other = side_names(self.kind)
        return {
            name: {
                "rows": len(fault.places),
                "prompt": fault.prompt,
                preferred: fault.preferred,
                other: fault.other,
            }
            for name, fault in self.faults.items()
        }


def excess(count: int, of: int, other_count: int, other_of: int) -> float:
    """How many standard errors the first share lies above the second (two proportions, pooled)."""
    if not of or not other_of:
        return 0.0
    pooled = (count + other_count) / (of + other_of)
    spread = sqrt(pooled * (1 - pooled) * (1 / of + 1 / other_of))
    return (count / of - other_count / other_of) / spread if spread else 0.0
