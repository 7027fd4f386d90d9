"""What a check is given, what it finds, and the audit that all of them make. Checks nothing itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.tally import PairsReport, SourceReport

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Example:
    """One canonical row as checks see it.

    Attributes:
        row: as `load_pairs` gives it; messages may stand in the place of texts.
        kind: of the row.
        prompt: its characters (of messages, the content alone, one after the other).
        replies: likewise; of a pair (chosen, rejected), of a list in its order.
        place: where a person finds it.
        source: the name of the file or hub split.
        held_out: it is of the held-out data.
    """

    row: Mapping[str, Any]
    kind: Kind
    prompt: str
    replies: tuple[str, ...]
    place: str
    source: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        name: of the kind of finding, as `duplicate_pairs`.
        severity: `error`: training on it teaches the wrong thing; `warning`: a person should look;
            `note`: good to know.
        count: rows that it is about, `of` so many that were looked at (of what is found of the data as a
            whole, which has no places, both are what was looked at: pairs, where replies are compared).
        sentence: what was found, with its numbers.
        advice: what to do.
        places: of all rows that it is about, each once, in the order of the data; several pairs may come
            from one place.
        examples: of a few of them, what is shown: labels and texts, `place` among them.
    """

    name: str
    severity: Severity
    count: int
    of: int
    sentence: str
    advice: str
    places: tuple[str, ...] = ()
    examples: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a check gives: findings, and figures as JSON can hold them, which pictures are drawn from."""

    findings: tuple[Finding, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


class Check(Protocol):
    """Sees the rows one by one and does not hold them; `name` is where its figures stand in the audit."""

    name: str

    def add(self, example: Example) -> None:
        """Look at one row."""

    def result(self) -> Result:
        """What all the rows together show."""
        ...


@dataclass(slots=True)
class Account(PairsReport):
    """What was read, kept and left out: the reading goes on behind rows of the wrong structure."""

    goes_on: ClassVar[bool] = True

    def counts_of(self, source: SourceReport) -> dict[str, int]:
        """What was left out of one source by kind, the most frequent kind first."""
        kinds = (problem.kind for problem in self.problems if problem.place.file == source.file)
        return dict(Counter(kinds).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; each source with its own counts."""
        # `super()` without arguments does not find a class that was made anew for its slots.
        account = PairsReport.to_dict(self)
        for source, shown in zip(self.sources, account["sources"], strict=True):
            shown["counts"] = self.counts_of(source)
        return account


@dataclass(slots=True)
class Audit(Account):
    """The account of the loading, the findings (the gravest first), and each check's figures by its name.

    Attributes:
        held_out: the account of the held-out data; None where none were given.
        settings: what was asked for: sources, options, tokenizer, model, and `dpo_kit`'s version and the
            `date` (UTC).
    """

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    held_out: Account | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return Account.to_dict(self) | {
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "settings": self.settings,
            "findings": [asdict(each) for each in self.findings],
            "figures": self.figures,
        }

    def take_in(self, name: str, result: Result) -> None:
        """Add what a check found."""
        self.add_findings(result.findings)
        self.figures[name] = result.figures

    def add_findings(self, findings: Iterable[Finding]) -> None:
        """Put them among the others, the gravest first."""
        self.findings = sorted(
            [*self.findings, *findings], key=lambda finding: SEVERITIES.index(finding.severity)
        )
