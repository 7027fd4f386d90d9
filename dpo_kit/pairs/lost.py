"""Columns that a format does not use, and that look like part of the prompt.

They are counted only, and `tally` says it: a column's name does not tell for sure what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpo_kit.pairs.formats.registry import Format
from dpo_kit.pairs.schema import plain_text

# Names under which public data sets keep what comes before the reply. Compared without case.
PROMPT_LIKE = frozenset(
    {
        *("system", "system_prompt", "system_message", "instruction", "instructions", "input", "inputs"),
        *("question", "query", "prompt", "user_prompt"),
        *("context", "contexts", "contexto", "passage", "document", "documents", "background"),
        *("history", "conversation", "conversations", "messages", "dialogue", "dialog"),
        *("image", "images", "video", "videos", "audio", "audios", "tools", "functions"),
    }
)
_WIRING = frozenset(("role", "from", "type", "name", "id"))


class LostColumns:
    """Counts the rows in which a column that looks like part of the prompt is filled and not used.

    Attributes:
        rows: column -> rows whose prompt has not what stands there.
    """

    def __init__(self, form: Format) -> None:
        self.rows: dict[str, int] = {}
        self._form = form

    def look_at(self, row: Mapping[str, Any], columns: Iterable[str], made: Mapping[str, Any]) -> None:
        """Compare these columns of a row with the canonical row that was made of it."""
        prompt = None
        for name in columns:
            value = row.get(name)
            if not isinstance(value, str | list | dict):
                continue
            if prompt is None:
                prompt = _words(plain_text(made["prompt"]))
            within = prompt
            if not isinstance(value, str):  # a conversation holds the reply too
                within += " " + " ".join(_words(text) for text in _replies(made))
            if any(text not in within for text in _texts(value)):
                self.rows[name] = self.rows.get(name, 0) + 1

    def watched(self, columns: Iterable[str]) -> list[str]:
        """Those of the columns that the format does not use and that look like part of the prompt."""
        return [name for name in self._form.unused(columns) if name.lower() in PROMPT_LIKE]


def _texts(value: Any) -> list[str]:
    """All texts in a value that say something, white space made even; bytes as what no prompt holds."""
    texts, level = [], [value]
    while level:  # level by level: some JSON is nested too deeply to be gone into by recursion
        texts += [
            "\0" if isinstance(each, bytes) else _words(each)
            for each in level
            if isinstance(each, str | bytes)
        ]
        inner = [each for each in level if isinstance(each, list)]
        inner += [
            [part for name, part in each.items() if name not in _WIRING]
            for each in level
            if isinstance(each, dict)
        ]
        level = [part for each in inner for part in each]
    return [text for text in texts if text]


def _words(text: str) -> str:
    return " ".join(text.split())


def _replies(made: Mapping[str, Any]) -> list[str]:
    if "completions" in made:
        return [plain_text(reply) for reply in made["completions"]]
    return [plain_text(made[name]) for name in ("chosen", "rejected", "completion") if name in made]
