"""OASST's message trees: one ranked list for each prompter's message with two or more ranked replies.

Left out, and accounted for: replies without a rank beside ranked ones, and messages that were deleted or
that reviewers turned down, with all that follows them. Replies that a model wrote (`synthetic`) stay: they
were ranked by people like the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_kit.pairs.formats.ranked import rank
from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.kinds import LISTS
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, kind_of

_ROLES = {"prompter": "user", "assistant": "assistant"}
Message = dict[str, str]


def _oasst(row: Row) -> list[Row | UnusablePair]:
    parts = list(_lists(row["prompt"]))
    if not any(isinstance(part, Mapping) for part in parts):
        raise UnusablePair("nothing_to_compare", field="prompt")
    return parts


def _lists(root: Any) -> Iterator[Row | UnusablePair]:
    """Depth first, in the order of the file; a stack of its own, since nothing bounds a tree's depth."""
    waiting: list[tuple[Any, str, list[Message]]] = [(root, "prompt", [])]
    while waiting:
        node, field, before = waiting.pop()
        message = _message(node, field)
        if not _stands(node, field):
            yield UnusablePair("unjudged", field=field, message="the message was deleted or turned down")
            continue
        path = [*before, message]
        replies = _replies(node, field)
        if message["role"] == "user":
            yield from _ranked(path, replies)
        waiting += [(reply, place, path) for reply, place in reversed(replies)]


def _ranked(
    prompt: list[Message], replies: list[tuple[Mapping[str, Any], str]]
) -> Iterator[Row | UnusablePair]:
    """The list of the ranked replies to one message, where there are two; their unranked siblings."""
    judged, unranked = [], []
    for reply, field in replies:
        message = _message(reply, field)
        if message["role"] != "assistant" or not _stands(reply, field):
            continue
        if reply.get("rank") is None:
            unranked.append(field)
        else:
            judged.append(([message], rank(reply["rank"], f"{field}.rank", 0)))
    if len(judged) < 2:
        return
    yield {"prompt": prompt, "completions": [reply for reply, _ in judged], "ranks": [at for _, at in judged]}
    for field in unranked:
        yield UnusablePair("unjudged", field=f"{field}.rank")


def _message(node: Any, field: str) -> Message:
    if not isinstance(node, dict):
        raise BadRow(f"expected a message, found {kind_of(node)}", field=field)
    for key in ("role", "text"):
        if key not in node:
            raise BadRow("the message has no such key", field=f"{field}.{key}")
    role = node["role"]
    if not isinstance(role, str) or role not in _ROLES:
        found = f"'{role}'" if isinstance(role, str) else kind_of(role)
        known = ", ".join(_ROLES)
        raise BadRow(f"unknown role {found}", field=f"{field}.role", mend=f"Known roles: {known}")
    return {"role": _ROLES[role], "content": checked_text(node["text"], f"{field}.text")}


def _stands(node: Mapping[str, Any], field: str) -> bool:
    """Whether the message is neither deleted nor turned down; one that was not reviewed yet stands."""
    flags = {name: node.get(name) for name in ("deleted", "review_result")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise BadRow(f"expected true or false, found {kind_of(value)}", field=f"{field}.{name}")
    return not flags["deleted"] and flags["review_result"] is not False


def _replies(node: Mapping[str, Any], field: str) -> list[tuple[Any, str]]:
    replies = node.get("replies")
    if replies is None:
        return []
    if not isinstance(replies, list):
        raise BadRow(f"expected a list of messages, found {kind_of(replies)}", field=f"{field}.replies")
    return [(reply, f"{field}.replies[{i}]") for i, reply in enumerate(replies)]


def _lacks_tree(row: Row) -> list[str]:
    root = row.get("prompt")
    fits = "prompt" not in row or (isinstance(root, dict) and "replies" in root)
    return [] if fits else ["a message with 'replies' in 'prompt'"]


FORMATS = (
    Format(
        "oasst_tree",
        "{message_tree_id, prompt: {role, text, replies: [{role, text, rank, replies}]}}, rank 0 is best "
        "(OpenAssistant/oasst1, oasst2: the files of trees)",
        ("message_tree_id", "prompt"),
        _oasst,
        _lacks_tree,
        optional=("tree_state",),
        names={"completions": "replies"},
        kind=LISTS,
    ),
)
