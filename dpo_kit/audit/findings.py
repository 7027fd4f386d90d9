"""What a check is given, what it finds, and the audit that all of them make. Checks nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.tally import PairsReport

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
        count: rows that it is about, `of` so many that were looked at.
        sentence: what was found, with its numbers.
        advice: what to do.
        places: all rows that it is about, in the order of the data.
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

    def add(self, example: Example) -> None: ...

    def result(self) -> Result: ...


@dataclass(slots=True)
class Audit(PairsReport):
    """The account of the loading, the findings (the gravest first), and each check's figures by its name."""

    goes_on: ClassVar[bool] = True
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        # `super()` without arguments does not find a class that was made anew for its slots.
        account = PairsReport.to_dict(self)
        return account | {"findings": [asdict(each) for each in self.findings], "figures": self.figures}

    def take_in(self, name: str, result: Result) -> None:
        """Add what a check found."""
        self.findings = sorted(
            [*self.findings, *result.findings], key=lambda finding: SEVERITIES.index(finding.severity)
        )
        self.figures[name] = result.figures
