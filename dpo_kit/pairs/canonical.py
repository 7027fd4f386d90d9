"""The canonical rows, and the one gate that every row of every on-disk shape goes through.

A canonical row is a dict with a `prompt` and its replies: all text, or all lists of {role, content, **extras}
messages (each reply one assistant message; extras are the `messages.KNOWN_EXTRAS`). Of a pair they are
`chosen` and `rejected`; an unpaired row has one `completion` and its `label` (bool: desirable or not), a
scored one its `score`; a ranked list has `completions` and their `scores` (floats, higher is better; beside
them `ranks`, where it came with these). The optional columns of a kind are its `Kind.extras`. What a field
must be is in `schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_kit.pairs.kinds import LISTS, PAIRS, SCORED, UNPAIRED, Kind
from dpo_kit.pairs.messages import require_usable, says_something, text_or_messages
from dpo_kit.pairs.misplaced import require_in_place
from dpo_kit.pairs.schema import (
    BadRow,
    UnusablePair,
    checked_extras,
    checked_label,
    checked_scores,
    finite,
    kind_of,
    need,
)

Part = str | list[dict]


def canonical_row(row: Mapping[str, Any], kind: Kind, *, prompt_field: str = "prompt") -> dict[str, Any]:
    """Check a row in a canonical shape of this kind and bring it to the canonical form.

    With a `prompt`: text and text replies stay text. Otherwise all become messages: a text prompt is a
    user message, a text reply an assistant message, and a reply list that begins with a copy of the prompt
    is split before its last message. Without a `prompt`, the replies are whole conversations and are split
    before the last message; whole *texts* are refused, because where the reply begins in them can only be
    guessed. `prompt_field` is what the source calls the prompt.

    Structure is looked at before sense, so that a row is bad whatever else is the matter with it. Raises
    `BadRow` and `UnusablePair`; of several problems only the first that is found.
    """
    return _CHECKS[kind.name](row, prompt_field)


def canonical_pair(row: Mapping[str, Any], prompt_field: str = "prompt") -> dict[str, Any]:
    """`canonical_row` of a pair."""
    replies = {name: text_or_messages(need(row, name), name) for name in PAIRS.replies}
    prompt = _prompt(row, prompt_field)
    extras = checked_extras(row, PAIRS)
    prompt, (chosen, rejected) = _prompt_and_replies(prompt, replies, prompt_field)
    if chosen == rejected:
        raise UnusablePair("identical", field="rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extras}


def _unpaired(row: Mapping[str, Any], prompt_field: str) -> dict[str, Any]:
    return _one_reply(row, prompt_field, UNPAIRED, checked_label)


def _scored(row: Mapping[str, Any], prompt_field: str) -> dict[str, Any]:
    return _one_reply(row, prompt_field, SCORED, lambda score: finite(score, "score"))


def _one_reply(
    row: Mapping[str, Any], prompt_field: str, kind: Kind, checked: Callable[[Any], Any]
) -> dict[str, Any]:
    """A row of a kind with one completion and a judgement of it."""
    assert kind.judgement is not None
    # Where the source has a whole conversation, its field is prompt and completion in one.
    field = "completion" if "prompt" in row or prompt_field == "prompt" else prompt_field
    replies = {field: text_or_messages(need(row, "completion"), field)}
    prompt = _prompt(row, prompt_field)
    judgement = checked(need(row, kind.judgement))
    extras = checked_extras(row, kind)
    prompt, (completion,) = _prompt_and_replies(prompt, replies, prompt_field)
    return {"prompt": prompt, "completion": completion, kind.judgement: judgement, **extras}


def _list(row: Mapping[str, Any], prompt_field: str) -> dict[str, Any]:
    listed = need(row, "completions")
    if not isinstance(listed, list):
        raise BadRow(
            f"expected a list of completions, found {kind_of(listed)}",
            field="completions",
            mend="Give a list of texts, or of lists of messages",
        )
    replies = {
        f"completions[{i}]": text_or_messages(value, f"completions[{i}]") for i, value in enumerate(listed)
    }
    prompt = _prompt(row, prompt_field)
    scores = checked_scores(row, len(replies))
    extras = checked_extras(row, LISTS)
    too_few = UnusablePair(
        "identical", field="completions", message="the list has fewer than two different completions"
    )
    if not replies:
        raise too_few
    prompt, completions = _prompt_and_replies(prompt, replies, prompt_field)
    if all(reply == completions[0] for reply in completions):
        raise too_few
    ranks = {} if row.get("ranks") is None else {"ranks": row["ranks"]}
    return {"prompt": prompt, "completions": completions, "scores": scores, **ranks, **extras}


_CHECKS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    PAIRS.name: canonical_pair,
    UNPAIRED.name: _unpaired,
    LISTS.name: _list,
    SCORED.name: _scored,
}


def _prompt(row: Mapping[str, Any], prompt_field: str) -> Part | None:
    return text_or_messages(row["prompt"], prompt_field) if "prompt" in row else None


def _prompt_and_replies(
    prompt: Part | None, replies: dict[str, Part], prompt_field: str
) -> tuple[Part, list[Part]]:
    """The prompt and the replies of one row (by field) -> the same in canonical form, none of them empty."""
    canonical: list[Part] = list(replies.values())
    given = prompt is not None
    if not (isinstance(prompt, str) and all(isinstance(reply, str) for reply in canonical)):
        _require_alike(prompt, replies)
        prompt, canonical = _as_messages(prompt, replies, prompt_field)
    if not says_something(prompt):
        raise UnusablePair("empty_prompt", field=prompt_field)
    for field, reply in zip(replies, canonical, strict=True):
        if not says_something(reply):
            raise UnusablePair("empty_completion", field=field)
    require_in_place(prompt, canonical, list(replies), prompt_field if given else None)
    return prompt, canonical


def _require_alike(prompt: Part | None, replies: dict[str, Part]) -> None:
    """Replies must be all text or all messages, and messages where there is no prompt; raises `BadRow`."""
    texts = [isinstance(reply, str) for reply in replies.values()]
    if len(set(texts)) > 1:
        odd = next(field for field, text in zip(replies, texts, strict=True) if text != texts[0])
        raise BadRow("one reply is text and the other a list of messages", field=odd)
    if prompt is None and texts[0]:
        raise BadRow(
            "there is no prompt, and where a reply begins in a whole text cannot be told from its characters",
            field="prompt",
            mend="Add a 'prompt' field, or give "
            f"{' and '.join(repr(field) for field in replies)} as lists of messages or HH dialogues",
        )


def _as_messages(
    prompt: Part | None, replies: dict[str, Part], prompt_field: str
) -> tuple[list[dict], list[Part]]:
    sides = {field: _reply_messages(reply) for field, reply in replies.items()}
    for field, messages in ((prompt_field, prompt), *sides.items()):
        if isinstance(messages, list):
            require_usable(messages, field)
    split = [
        split_conversation(messages, field) if prompt is None else _split_reply(prompt, messages, field)
        for field, messages in sides.items()
    ]
    first = split[0][0]
    for field, (lead, _) in zip(sides, split, strict=True):
        if lead != first:
            raise UnusablePair("prompts_differ", field=field)
    return first, [reply for _, reply in split]


def _reply_messages(reply: Part) -> list[dict]:
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply


def split_conversation(conversation: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """Messages -> (prompt, [reply]), cut before the last message, which must be the assistant's."""
    if not conversation or conversation[-1]["role"] != "assistant":
        end = f"ends with a message of role '{conversation[-1]['role']}'" if conversation else "is empty"
        raise UnusablePair(
            "reply_not_one_assistant_message",
            field=field,
            message=f"the conversation {end}, where the assistant's reply should be",
        )
    return conversation[:-1], conversation[-1:]


def _split_reply(prompt: Part, reply: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """A reply list beside a given prompt -> (prompt, [reply]): the reply alone, or a whole conversation."""
    lead, last = split_conversation(reply, field)
    if not lead:
        return (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]), last
    if lead[0]["role"] in ("assistant", "tool"):
        raise UnusablePair("reply_not_one_assistant_message", field=field)
    if isinstance(prompt, list):
        holds_prompt = lead == prompt
    else:
        asked = [message["content"] or "" for message in lead if message["role"] == "user"]
        holds_prompt = any(content.strip() == prompt.strip() for content in asked)
    if not holds_prompt:
        raise UnusablePair(
            "prompts_differ", field=field, message="the conversation is not one that the prompt begins"
        )
    return lead, last
