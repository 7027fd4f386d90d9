"""Rows that have dpo_kit's own columns: canonical pairs, labelled replies and ranked lists."""

from __future__ import annotations

from collections.abc import Callable

from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.kinds import LISTS, UNPAIRED
from dpo_kit.pairs.schema import BadRow


def columns(*names: str) -> Callable[[Row], Row]:
    """An adapter that takes these columns as they are, those that there are."""
    return lambda row: {name: row[name] for name in names if name in row}


def _not_conversations(row: Row) -> list[str]:
    sides = [name for name in ("chosen", "rejected") if name in row]
    return [f"a list of messages in '{name}'" for name in sides if not isinstance(row[name], list)]


def _implicit(row: Row) -> Row:
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str):
            raise BadRow(
                "expected a whole conversation as a list of messages, found text; where a reply begins "
                "in a whole text cannot be told from its characters",
                field=name,
            )
    return {name: row[name] for name in ("chosen", "rejected")}


def _not_ranked(row: Row) -> list[str]:
    return [] if row.keys() & {"scores", "ranks"} else ["the field 'scores' or 'ranks'"]


def _labelled_conversation(row: Row) -> Row:
    return {"completion": row["messages"], "label": row["label"]}


FORMATS = (
    Format(
        "explicit_prompt",
        "{prompt, chosen, rejected} as text or messages; chosen and rejected may repeat the prompt as "
        "messages (HuggingFaceH4/ultrafeedback_binarized)",
        ("prompt", "chosen", "rejected"),
        columns("prompt", "chosen", "rejected"),
    ),
    Format(
        "implicit_prompt",
        "{chosen, rejected} as whole conversations, lists of messages",
        ("chosen", "rejected"),
        _implicit,
        _not_conversations,
    ),
    Format(
        "ranked",
        "{prompt, completions: [K], scores: [K] (higher is better) or ranks: [K] (1 is best)} as text or "
        "messages",
        ("prompt", "completions"),
        columns("prompt", "completions", "scores", "ranks"),
        _not_ranked,
        optional=("scores", "ranks"),
        kind=LISTS,
    ),
    Format(
        "unpaired",
        "{prompt, completion, label} as text or messages; label: true where the completion is desirable "
        "(huggingface/trl)",
        ("prompt", "completion", "label"),
        columns("prompt", "completion", "label"),
        kind=UNPAIRED,
    ),
    Format(
        "unpaired_messages",
        "{messages, label} with a whole conversation (hiyouga/LLaMA-Factory)",
        ("messages", "label"),
        _labelled_conversation,
        prompt_field="messages",
        kind=UNPAIRED,
    ),
)
