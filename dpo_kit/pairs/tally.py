"""The account of a loading: what was read, kept, left out and ignored, in numbers, places and words.

Only counts and words; `loading` fills it in, `inspection` adds what the kept pairs look like.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, ClassVar

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import KINDS_OF_ROWS, Kind
from dpo_kit.pairs.schema import KINDS, Place
from dpo_kit.pairs.statistics import Statistics

FIRST_PLACES = 3
# What `Place` writes behind a file.
_BEHIND_FILE = re.compile(r":(row \d+|\d+( \(row \d+\))?)\Z")


@dataclass(frozen=True, slots=True)
class Problem:
    """What was left out of a row: its kind (see `schema.KINDS`), place and field, and the mend."""

    kind: str
    place: Place
    field: str | None
    message: str
    mend: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "place": str(self.place)}


@dataclass(slots=True)
class SourceReport:
    """One file or hub split: rows read, those that something was made of, what was made, unused columns.

    `lost_columns`: those of the unused that look like part of the prompt (`lost.PROMPT_LIKE`), each with the
    number of rows in which it says what the prompt does not.
    """

    file: str
    format: str
    read: int = 0
    kept: int = 0
    made: int = 0
    unused_columns: list[str] = field(default_factory=list)
    lost_columns: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class PairsReport:
    """All sources of one loading. Of a row that is one example there is at most one problem.

    `goes_on`: rows of the wrong structure are counted, and do not stop the reading.
    """

    goes_on: ClassVar[bool] = False

    sources: list[SourceReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # files passed over in folders and globs
    remarks: list[str] = field(default_factory=list)  # on the sources, which drop nothing
    kind: Kind | None = None  # of the rows kept; None where there is none
    statistics: Statistics | None = None

    @property
    def read(self) -> int:
        """Rows read, over all sources."""
        return sum(source.read for source in self.sources)

    @property
    def kept(self) -> int:
        """Rows of which something was made, over all sources."""
        return sum(source.kept for source in self.sources)

    @property
    def made(self) -> int:
        """Pairs (or unpaired rows, or lists) made, over all sources."""
        return sum(source.made for source in self.sources)

    @property
    def unusable(self) -> list[Problem]:
        """The problems that are not what the options leave out."""
        return [problem for problem in self.problems if not KINDS[problem.kind].by_option]

    def leave_out(
        self, kind: str, place: Place, field: str | None = None, message: str | None = None
    ) -> None:
        """Take a problem into the account."""
        known = KINDS[kind]
        self.problems.append(Problem(kind, place, field, message or known.message, known.mend))

    def meet(self, error: InputError, place: Place) -> None:
        """A row that cannot be read or is of the wrong structure: raise, or count it and go on."""
        if not self.goes_on:
            raise error
        mend = error.mend or KINDS["bad_row"].mend
        self.problems.append(Problem("bad_row", place, error.field, error.problem, mend))

    @property
    def counts(self) -> dict[str, int]:
        """What was left out by kind, the most frequent kind first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "kind": self.kind.name if self.kind else None,
            "read": self.read,
            "kept": self.kept,
            "made": self.made,
            "counts": self.counts,
            "sources": [asdict(source) for source in self.sources],
            "problems": [problem.to_dict() for problem in self.problems],
            "ignored": list(self.ignored),
            "remarks": list(self.remarks),
            "statistics": asdict(self.statistics) if self.statistics else None,
        }

    def to_state(self) -> dict[str, Any]:
        """What `from_state` makes an equal report of. Without statistics: a loading has none."""
        return {
            "kind": self.kind.name if self.kind else None,
            "sources": [asdict(source) for source in self.sources],
            "problems": [asdict(problem) for problem in self.problems],
            "ignored": self.ignored,
            "remarks": self.remarks,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PairsReport:
        """The report that `to_state` was asked of. Raises KeyError or TypeError for anything else."""
        kinds = {kind.name: kind for kind in KINDS_OF_ROWS}
        return cls(
            sources=[SourceReport(**source) for source in state["sources"]],
            problems=[
                Problem(**{**problem, "place": Place(**problem["place"])}) for problem in state["problems"]
            ],
            ignored=state["ignored"],
            remarks=state["remarks"],
            kind=kinds[state["kind"]] if state["kind"] else None,
        )

    def kinds_in_words(self) -> list[str]:
        """For each kind its count and the first few places: `empty_prompt 2 (a.jsonl:3, :9)`."""
        words = []
        for kind, count in self.counts.items():
            places = islice(
                (problem.place for problem in self.problems if problem.kind == kind), FIRST_PLACES
            )
            more = ", ..." if count > FIRST_PLACES else ""
            words.append(f"{kind} {count} ({short_places([*map(str, places)])}{more})")
        return words

    def left_out(self) -> str:
        """One line on what was left out."""
        words = dict(zip(self.counts, self.kinds_in_words(), strict=True))
        unusable = "; ".join(words[kind] for kind in words if not KINDS[kind].by_option)
        by_option = "; ".join(words[kind] for kind in words if KINDS[kind].by_option)
        rows = rows_of(self.unusable)
        lines = [f"{rows} of {self.read} rows cannot be used: {unusable}"] if unusable else []
        return ". ".join([*lines, f"By the options: {by_option}"] if by_option else lines)

    def worth_knowing(self) -> list[str]:
        """The remarks, and for each source what of its prompts may be lost, with the mend."""
        lost = [(source.file, lost_in_words(source)) for source in self.sources if source.lost_columns]
        mend = (
            "if the prompt should have it, give a mapping (data.mapping, --map) or put it into the prompt; "
            "else rename or leave out the column"
        )
        return [*self.remarks, *(f"{file}: {words}; {mend}" for file, words in lost)]

    def summary(self) -> str:
        """A few readable lines."""
        lines = []
        for source in self.sources:
            made = f", {source.made} examples made" if source.made != source.kept else ""
            lines.append(
                f"{source.file} ({source.format}): {source.read} rows read, {source.kept} kept{made}"
            )
            if source.unused_columns:
                lines.append(f"  columns not used: {', '.join(source.unused_columns)}")
            if source.lost_columns:
                lines.append(f"  {lost_in_words(source)}")
        lines += [f"left out: {words}" for words in self.kinds_in_words()]
        lines += self.remarks
        if self.ignored:
            lines.append(f"ignored files: {', '.join(self.ignored)}")
        if self.kind:
            lines.append(f"kind: {self.kind.rows}")
        return "\n".join(lines + (self.statistics.in_words() if self.statistics else []))

    def as_error(self, *, dropped: bool) -> InputError:
        """The first problem, for the user to mend, with the count of all of them.

        `dropped` says that leaving such rows out was tried, and left nothing.
        """
        first = (self.unusable or self.problems)[0]
        mend = "set data.invalid: drop (--invalid drop) to leave them out, counted"
        return first.place.error(
            f"{first.message}. {self.left_out()}",
            field=first.field,
            mend="No row is left" if dropped or not self.unusable else f"Correct the rows, or {mend}",
        )


def rows_of(problems: Iterable[Problem]) -> int:
    """In how many rows they are."""
    return len({problem.place for problem in problems})


def lost_in_words(source: SourceReport) -> str:
    """`columns not used that look like part of the prompt: system (2 rows)`."""
    counts = ", ".join(
        f"{name} ({rows} {'row' if rows == 1 else 'rows'})" for name, rows in source.lost_columns.items()
    )
    return f"columns not used that look like part of the prompt: {counts}"


def short_places(places: Sequence[str]) -> str:
    """Places one after the other; a file is named once for those in it that follow each other."""
    words, before = [], None
    for place in places:
        file = _BEHIND_FILE.sub("", place)
        words.append(place[len(file) :] if file == before else place)
        before = file
    return ", ".join(words)
