"""What becomes of a row of ids: kept, cut or left out, and why. Knows no texts and no tokenizer."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import LISTS, UNPAIRED, Kind

if TYPE_CHECKING:
    # What imports transformers, which takes seconds: a length is checked without it.
    from dpo_kit.encoding import Ids

OVERLONG = ("drop", "cut_prompt_left", "cut_completion_right")
DROPPED = ("overlong", "prompt_too_long", "empty_prompt", "identical_after_tokenisation", "all_tied")
CUT = ("cut_prompt", "cut_completion")


@dataclass(frozen=True)
class LengthPolicy:
    """What becomes of a row whose longest sequence, prompt + completion, has more than `max_length` tokens.

    A row is kept or left out whole: no reply is taken out of a pair or a list.

    `drop`: it is left out.
    `cut_prompt_left`: the prompt loses its beginning (but not its BOS) until the longest sequence fits, alike
    for all; the row is left out where no prompt token would stay.
    `cut_completion_right`: each completion that is too long loses its end, and with it the end token; the
    row is left out where no completion token would stay.
    `max_length` None accepts every length. Raises `InputError` for an unknown name or a length below 2.
    """

    max_length: int | None = 1024
    overlong: str = "drop"

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            near = difflib.get_close_matches(str(self.overlong), OVERLONG, n=1, cutoff=0.0)[0]
            raise InputError(
                f"'{self.overlong}' is not one of {', '.join(OVERLONG)}",
                field="data.overlong",
                mend=f"Did you mean '{near}'?",
            )
        if self.max_length is not None and self.max_length < 2:
            raise InputError(
                f"{self.max_length} leaves no room for a prompt and a completion",
                field="data.max_length",
                mend="Set it to 2 or more, or to null for no limit",
            )

    def apply(self, ids: Ids, bos_id: int | None = None) -> tuple[Ids | None, str]:
        """-> the row's ids as they are kept (None: left out), and `kept` or one of `CUT` or `DROPPED`."""
        prompt, replies = ids
        if not prompt:
            return None, "empty_prompt"
        longest = max(map(len, replies))
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return ids, "kept"
        if self.overlong == "cut_prompt_left":
            opening = prompt[:1] if prompt[:1] == [bos_id] else []
            room = self.max_length - longest - len(opening)
            if room > 0:
                return ([*opening, *prompt[-room:]], replies), "cut_prompt"
        if self.overlong == "cut_completion_right":
            room = self.max_length - len(prompt)
            if room > 0:
                return (prompt, [reply[:room] for reply in replies]), "cut_completion"
            return None, "prompt_too_long"
        return None, "overlong"


def outcome_of(
    ids: Ids, kind: Kind, scores: Sequence[float], policy: LengthPolicy, bos_id: int | None
) -> tuple[Ids | None, str]:
    """-> a row's ids as they are kept (those given, where whole; None: left out), and `kept` or one of `CUT`
    or `DROPPED`. `scores` are of a list."""
    kept, outcome = policy.apply(ids, bos_id)
    if kept is None or kind == UNPAIRED:
        return kept, outcome
    if all(reply == kept[1][0] for reply in kept[1]):
        return None, "identical_after_tokenisation"
    if kind == LISTS and len(set(scores)) < 2:
        return None, "all_tied"
    if kind == LISTS and _cut_alike(ids[1], kept[1], scores):
        return None, "identical_after_tokenisation"
    return kept, outcome


def _cut_alike(whole: list[list[int]], cut: list[list[int]], scores: Sequence[float]) -> bool:
    """Whether completions with different scores were different before they were cut, and are not now."""
    places = itertools.combinations(range(len(cut)), 2)
    return any(cut[i] == cut[j] and whole[i] != whole[j] and scores[i] != scores[j] for i, j in places)
