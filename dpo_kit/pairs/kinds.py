"""The kinds of canonical rows: which columns hold the replies, and what the data says of them.

Only names; `canonical` checks rows of each kind, `formats` knows how they lie on disk.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_kit.shapes import Shape


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of canonical rows; to be compared by value, since worker processes get copies.

    Attributes:
        name: what losses call the shape.
        rows: what several of them are called in messages.
        replies: the columns that hold replies, beside the prompt.
        judgement: the column that says how good they are, where the replies' columns do not.
        extras: optional columns.
    """

    name: Shape
    rows: str
    replies: tuple[str, ...]
    judgement: str | None
    extras: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All that every row has but `source`."""
        return ("prompt", *self.replies, *((self.judgement,) if self.judgement else ()))

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns that hold the replies once they are tokenised."""
        return tuple(f"{name}_ids" for name in self.replies)

    def parts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's replies by their place in it: `chosen`, `completion`, `completions[0]`, ..."""
        if self != LISTS:
            return {name: row[name] for name in self.replies}
        return {f"completions[{i}]": reply for i, reply in enumerate(row["completions"])}


# What a chat template reads beside the prompt: under another one it is another prompt.
CONTEXT = ("tools", "chat_template_kwargs")
_EXTRAS = ("weight", "prompt_id", *CONTEXT)
RANKS = ("chosen_rank", "rejected_rank")
PAIRS = Kind("pairs", "pairs", ("chosen", "rejected"), None, ("margin", *RANKS, *_EXTRAS))
UNPAIRED = Kind("unpaired", "unpaired rows", ("completion",), "label", _EXTRAS)
LISTS = Kind("lists", "ranked lists", ("completions",), "scores", _EXTRAS)
# Never loaded as such: the scored replies of a prompt are put together to a list.
SCORED = Kind("scored", "scored replies", ("completion",), "score", _EXTRAS)  # type: ignore[arg-type]
KINDS_OF_ROWS = (PAIRS, UNPAIRED, LISTS)


def kind_of_columns(columns: Container[str]) -> Kind | None:
    """The kind whose columns are all there (the first, if of several); None where there is none."""
    return next((kind for kind in KINDS_OF_ROWS if all(name in columns for name in kind.columns)), None)


def kind_of_ids(columns: Container[str]) -> Kind | None:
    """The kind of tokenised rows, by their first reply: of pairs the rejected one may be left out."""
    return next((kind for kind in KINDS_OF_ROWS if kind.ids[0] in columns), None)
