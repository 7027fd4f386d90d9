"""What a chat template would leave out of conversations: reasoning, tool calls, a system turn, tools.

Asks `chat.dropped_parts` for each row of messages; rows of text have no template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.audit.faults import OTHER, PREFERRED, PROMPT, Fault, reply_sides, share_in_words
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.chat import THINK, dropped_parts
from dpo_kit.errors import InputError

# What stands below these has names that the data give.
_NAMED_BY_DATA = re.compile(r"(\.(?:arguments|parameters))[.\[].*")


class TemplateChecks:
    """Parts of conversations that the chat template does not write out.

    A part is known by its name without numbers, and content by its role: `prompt[2].tool_calls` is
    `prompt[].tool_calls`, a system turn's `prompt[0].content` is `prompt[system].content`; names that the
    data give (of arguments and of parameters) are left off. Rows that the template refuses are the encoder's
    to tell of (`encoded`).

    Figures: `{"rows": rows of messages or with tools, "dropped": {part: rows}}`. Findings: for each part
    `dropped_by_template`; an error where it is a part of a preferred reply (the model is not trained on what
    was judged), a note for the reasoning of earlier turns (`<think>`, which templates take out on purpose),
    else a warning.
    """

    name = "templates"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._template_kwargs = tokenizer, template_kwargs
        self._rows = 0
        self._faults: dict[str, Fault] = {}

    def add(self, example: Example) -> None:
        row = example.row
        if example.held_out or not (isinstance(row["prompt"], list) or row.get("tools")):
            return
        self._rows += 1
        try:
            dropped = dropped_parts(row, self._tokenizer, self._template_kwargs)
        except InputError:
            return
        places: dict[str, list[str]] = {}
        for place in dict.fromkeys(dropped):
            places.setdefault(_part(row, place), []).append(place)
        for part, found in places.items():
            fault = self._faults.setdefault(part, Fault())
            fault.add(example, _side(example, part), {"dropped": ", ".join(found[:5])})

    def result(self) -> Result:
        most_first = sorted(self._faults.items(), key=lambda item: -len(item[1].places))
        findings = tuple(self._finding(part, fault) for part, fault in most_first)
        counts = {part: len(fault.places) for part, fault in most_first}
        return Result(findings, {"rows": self._rows, "dropped": counts})

    def _finding(self, part: str, fault: Fault) -> Finding:
        count = len(fault.places)
        advice = (
            "The model does not see what the replies answer: write it into the content of a turn, or use a "
            "template that knows it."
        )
        severity: Severity = "warning"
        if fault.preferred:
            severity = "error"
            advice = (
                "A run stops at such a row, where less would be trained on than what was judged: write the "
                "part into the content, or use a template that knows it."
            )
        elif part.startswith("prompt") and part.endswith(THINK):
            severity = "note"
            advice = "Many templates take the reasoning out of earlier turns on purpose: nothing to do then."
        return fault.finding(
            "dropped_by_template",
            severity,
            self._rows,
            f"The chat template leaves out '{part}' of {count:,} of {self._rows:,} rows of messages "
            f"({share_in_words(count, self._rows)}).",
            advice,
        )


def _part(row: Mapping[str, Any], place: str) -> str:
    """What is dropped, whichever turn of the row it stands in."""
    turn = re.match(r"prompt\[(\d+)\]\.content", place)
    if turn and isinstance(row["prompt"], list):
        role = row["prompt"][int(turn[1])]["role"]
        place = place.replace(f"[{turn[1]}]", f"[{role}]", 1)
    return _NAMED_BY_DATA.sub(r"\1", re.sub(r"\[\d+\]", "[]", place))


def _side(example: Example, part: str) -> int:
    """Whose part it is: the prompt's, or (of a list any) a reply's."""
    field = re.split(r"[.\[]", part)[0]
    names, sides = example.kind.replies, reply_sides(example)
    if field not in names:
        return PROMPT
    return sides[names.index(field)] if len(names) == len(sides) else PREFERRED | OTHER
