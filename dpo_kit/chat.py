"""One canonical row -> the text of its prompt and replies, messages written out by the chat template.

What a template would lose of a reply is refused, never dropped. How texts become ids is in `encoding`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import kind_of_columns

# Stands for a reply's content to see what the template writes around it; no template takes it apart.
SENTINEL = "DpoKitReplyContent"

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class RowText:
    """A row as text.

    `end` is the token, as text, that closes a reply; it is not part of the `replies`. `templated`: the
    special tokens that open a prompt are in its text already.
    """

    prompt: str
    replies: list[str]
    end: str
    templated: bool


def row_text(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    added_tokens: frozenset[str],
) -> RowText:
    kind = kind_of_columns(row)
    if kind is None:
        raise InputError(
            f"the row is of no known kind, it has only: {', '.join(row)}",
            file=row.get("source"),
            field="prompt",
        )
    prompt, replies = row["prompt"], kind.parts(row)
    if all(isinstance(part, str) for part in (prompt, *replies.values())):
        return RowText(prompt, list(replies.values()), str(tokenizer.eos_token), templated=False)
    if not all(isinstance(part, list) for part in (prompt, *replies.values())):
        raise InputError(
            f"{', '.join(('prompt', *kind.replies))} are not all text and not all lists of messages",
            file=row.get("source"),
            field="prompt",
            mend="Load the data with load_pairs, or write them alike",
        )
    if tokenizer.chat_template is None and not (template_kwargs or {}).get("chat_template"):
        raise InputError(
            "the row holds messages, and the tokenizer has no chat template",
            file=row.get("source"),
            field="model.tokenizer",
            mend="Use the tokenizer of a chat model, or give prompt and replies as text",
        )
    return _render(row, replies, tokenizer, template_kwargs, added_tokens)


def _render(
    row: Mapping[str, Any],
    replies: Mapping[str, list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    added_tokens: frozenset[str],
) -> RowText:
    """A row of messages and its replies by field -> `RowText`, by the tokenizer's chat template.

    The prompt is the template's text of the prompt with the generation prompt. A reply is what the template
    writes after that, given the whole conversation, up to its end-of-turn token (`end`). Where the
    conversation's text does not go on from the prompt's or does not hold the reply's content as it is (the
    template takes the reasoning out, or its generation prompt opens what its history has not), a reply is its
    content with what the template writes around any reply. A template that ends a turn with ordinary text
    keeps that text, and `end` is the tokenizer's EOS. `added_tokens` are those that can end a turn.

    Raises `InputError`, naming the row, where the template refuses the conversation.
    """
    chat = _Chat(row, tokenizer, dict(template_kwargs or {}))
    messages = row["prompt"]
    prompt = chat.render(messages, add_generation_prompt=True)
    before, after = chat.around_reply(messages, prompt, replies)
    end = _first_token(after, added_tokens)
    texts = []
    for field, reply in replies.items():
        content = _content(row, field, reply)
        whole = chat.render([*messages, *reply])
        if whole.startswith(prompt) and content.strip() in whole[len(prompt) :]:
            text = whole[len(prompt) :]
        else:
            text = _join(prompt, before, content) + after
        if end is not None:
            text = _until_turn_end(text, after, end)
        texts.append(text)
    return RowText(prompt, texts, end or str(tokenizer.eos_token), templated=True)


@dataclass(frozen=True)
class _Chat:
    """One row's conversation and what it is rendered with."""

    row: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    kwargs: dict[str, Any]

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        tools = _tools(self.row)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        except Exception as error:  # a template is somebody's program: it may raise anything
            raise InputError(
                f"the chat template refuses the conversation: {error}",
                file=self.row.get("source"),
                field="prompt",
                mend="Change the messages to what this model's template accepts, or use another template",
            ) from error
        return str(text)

    def around_reply(
        self, messages: list[dict], prompt: str, replies: Mapping[str, list[dict]]
    ) -> tuple[str, str]:
        """What the template writes around any reply's content: between it and the prompt, and after it."""
        field, first = next(iter(replies.items()))
        role = first[0]["role"] if first else "assistant"
        text = self.render([*messages, {"role": role, "content": SENTINEL}])
        before, found, after = text.rpartition(SENTINEL)
        if not found:
            raise InputError(
                f"the chat template does not write the content of a message of role '{role}'",
                file=self.row.get("source"),
                field=field,
                mend="Give the reply the role that the template knows, mostly 'assistant'",
            )
        return (before[len(prompt) :] if before.startswith(prompt) else ""), after


def _content(row: Mapping[str, Any], field: str, reply: list[dict]) -> str:
    if len(reply) == 1 and isinstance(reply[0].get("content"), str):
        extra = [
            k for k, v in reply[0].items() if k not in ("role", "content") and v not in (None, "", [], {})
        ]
        if not extra:
            return reply[0]["content"]
    raise InputError(
        "the reply is not one message of role and text content alone",
        file=row.get("source"),
        field=field,
        mend="Put earlier messages into the prompt, and what other keys say into the content",
    )


def _tools(row: Mapping[str, Any]) -> list | None:
    if not row.get("tools"):
        return None
    try:
        return json.loads(row["tools"])
    except ValueError as error:
        raise InputError(
            f"not JSON: {error}",
            file=row.get("source"),
            field="tools",
            mend="Write the list of tool descriptions as JSON text",
        ) from error


def _join(prompt: str, before: str, content: str) -> str:
    """Content after what stands between it and the prompt, with its reasoning opened once only."""
    if THOUGHT in content and THOUGHT in before:
        before = ""
    opened = prompt + before
    if opened.rstrip().endswith(THINK) and content.lstrip().startswith(THINK):
        space = opened[len(opened.rstrip()) :]
        content = content.lstrip().removeprefix(THINK).removeprefix(space)
    return before + content


@lru_cache
def _first_token(text: str, tokens: frozenset[str]) -> str | None:
    """The first of the tokens in the text (the longest, where several begin there)."""
    found = [token for token in tokens if token in text]
    return min(found, key=lambda token: (text.index(token), -len(token)), default=None)


def _until_turn_end(text: str, after: str, end: str) -> str:
    """A reply's text before the token that ends its turn; what the template writes behind that is dropped."""
    if text.endswith(after):
        return text[: len(text) - len(after) + after.index(end)]
    return text[: text.rindex(end)] if end in text else text
