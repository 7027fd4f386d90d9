"""OASST's message trees, whole or message by message: a ranked list for each prompter's message with two or
more ranked replies.

Left out, and accounted for: replies without a rank beside ranked ones, and messages that were deleted or
that reviewers turned down, with all that follows them. Replies that a model wrote (`synthetic`) stay: they
were ranked by people like the others.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.formats.values import rank
from dpo_kit.pairs.json_rows import RawRow
from dpo_kit.pairs.kinds import LISTS
from dpo_kit.pairs.messages import known_role
from dpo_kit.pairs.schema import BadRow, Place, UnusablePair, checked_text, kind_of, need

_ROLES = {"prompter": "user", "assistant": "assistant"}
Message = dict[str, str]


def _oasst(row: Row) -> list[Row | UnusablePair]:
    return _all_lists(row["prompt"], "prompt")


def _root(row: Row) -> list[Row | UnusablePair]:
    """The adapter of a message with its replies, as `gather` puts them together."""
    if row.get("parent_id") is not None:
        raise UnusablePair("unjudged", field="parent_id", message="the message that it answers is not there")
    return _all_lists(row, "")


def gather(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The messages of a source -> its trees: each first message with all below it in `replies`, at its place.

    Holds the source. Messages that cannot be read are given as they are met, and what answers a message that
    is not there stands as a tree of its own, whose `parent_id` is filled.
    """
    nodes: dict[str, dict[str, Any]] = {}
    places: dict[str, Place] = {}
    for row, place in rows:
        if isinstance(row, InputError):
            yield row, place
            continue
        try:
            identity = _checked_identity(row, nodes)
        except BadRow as bad:
            yield place.error(f"{bad.message} [format oasst]", field=bad.field, mend=bad.mend), place
            continue
        nodes[identity], places[identity] = {**row, "replies": []}, place
    for node in nodes.values():
        if (parent := nodes.get(node.get("parent_id") or "")) is not None:
            parent["replies"].append(node)
    below: set[str] = set()
    for identity, node in nodes.items():
        if (node.get("parent_id") or "") not in nodes:
            below |= _names(node)
            yield node, places[identity]
    for identity in (name for name in nodes if name not in below):
        circle = "the messages that it answers go round in a circle [format oasst]"
        yield places[identity].error(circle, field="parent_id"), places[identity]


def _names(root: Mapping[str, Any]) -> set[str]:
    """The names of a message and of all below it."""
    names, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        names.add(node["message_id"])
        waiting += node["replies"]
    return names


def _checked_identity(row: Mapping[str, Any], known: Container[str]) -> str:
    """The name of a message all of whose fields can be read; raises `BadRow`."""
    identity = checked_text(need(row, "message_id"), "message_id")
    if row.get("parent_id") is not None:
        checked_text(row["parent_id"], "parent_id")
    _message(row, "")
    _stands(row, "")
    if row.get("rank") is not None:
        rank(row["rank"], "rank", 0)
    if identity in known:
        raise BadRow(f"there is another message '{identity}' before it", field="message_id")
    return identity


def _all_lists(root: Any, field: str) -> list[Row | UnusablePair]:
    parts = list(_lists(root, field))
    if not any(isinstance(part, Mapping) for part in parts):
        raise UnusablePair("nothing_to_compare", field=field or None)
    return parts


def _lists(root: Any, field: str) -> Iterator[Row | UnusablePair]:
    """Depth first, in the order of the file; a stack of its own, since nothing bounds a tree's depth."""
    waiting: list[tuple[Any, str, list[Message]]] = [(root, field, [])]
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


def _inside(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key


def _message(node: Any, field: str) -> Message:
    if not isinstance(node, dict):
        raise BadRow(f"expected a message, found {kind_of(node)}", field=field)
    for key in ("role", "text"):
        if key not in node:
            raise BadRow("the message has no such key", field=_inside(field, key))
    role = known_role(node["role"], _ROLES, _inside(field, "role"))
    return {"role": role, "content": checked_text(node["text"], _inside(field, "text"))}


def _stands(node: Mapping[str, Any], field: str) -> bool:
    """Whether the message is neither deleted nor turned down; one that was not reviewed yet stands."""
    flags = {name: node.get(name) for name in ("deleted", "review_result")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise BadRow(f"expected true or false, found {kind_of(value)}", field=_inside(field, name))
    return not flags["deleted"] and flags["review_result"] is not False


def _replies(node: Mapping[str, Any], field: str) -> list[tuple[Any, str]]:
    replies = node.get("replies")
    if replies is None:
        return []
    listed = _inside(field, "replies")
    if not isinstance(replies, list):
        raise BadRow(f"expected a list of messages, found {kind_of(replies)}", field=listed)
    return [(reply, f"{listed}[{i}]") for i, reply in enumerate(replies)]


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
    Format(
        "oasst",
        "{message_id, parent_id, message_tree_id, role, text, rank}: the messages of such trees one by one, "
        "rank 0 is best (OpenAssistant/oasst1, oasst2 on the hub)",
        ("message_id", "message_tree_id", "role", "text"),
        _root,
        optional=("parent_id", "rank", "deleted", "review_result", "tree_state", "replies"),
        prompt_field="text",
        names={"completions": "replies"},
        kind=LISTS,
        gather=gather,
    ),
)
