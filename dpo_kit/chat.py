"""One canonical row -> the text of its prompt and replies, messages written out by the chat template.

What a template would lose of a reply is refused, never dropped; what it loses of a row's other parts
`dropped_parts` tells. How texts become ids is in `encoding`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import kind_of_columns
from dpo_kit.pairs.leaves import THINK, THOUGHT, Mark, changed, holds, marked
from dpo_kit.pairs.messages import arguments_as_text, has_extras, readable
from dpo_kit.pairs.schema import BadRow, parsed_json
from dpo_kit.pairs.schema import template_kwargs as checked_template_kwargs

# Stands for a reply's content to see what the template writes around it; no template takes it apart.
SENTINEL = "DpoKitReplyContent"

_OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


@dataclass(frozen=True)
class RowText:
    """A row as text.

    `ends` are the tokens, as text, that close the replies; they are not part of the `replies`. `templated`:
    the special tokens that open a prompt are in its text already.
    """

    prompt: str
    replies: list[str]
    ends: list[str]
    templated: bool


def row_text(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    added_tokens: frozenset[str],
) -> RowText:
    """The row's texts. Over the `template_kwargs` go those of the row's own `chat_template_kwargs`.

    `added_tokens` are those that can end a turn. Raises `InputError`, naming row and field, for what is no
    row of a known kind, for messages without a chat template or that it refuses, and where it drops a tool
    call, a reasoning or another extra of a reply.
    """
    replies = _replies(row)
    if _is_text(row, replies):
        eos = str(tokenizer.eos_token)
        return RowText(row["prompt"], list(replies.values()), [eos] * len(replies), templated=False)
    return _render(_chat(row, tokenizer, template_kwargs), row["prompt"], replies, added_tokens)


def dropped_parts(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None
) -> list[str]:
    """The places in a canonical row that its text does not hold, such as `prompt[1].reasoning_content`,
    `chosen[0].tool_calls[0].function.name`, `tools[0].function.description`.

    Looked for are texts, and the names of arguments that are none; not ids. `prompt[1].content<think>` is the
    reasoning inside a content. Each text gets a mark of its own, and a part is dropped whose mark the
    rendered text has not: one rendering for the prompt, and one for each reply that has extras. The content
    of a reply without extras is never dropped. Of a row of texts, which no template writes, it is the tools
    that are. Raises `InputError` for a row or template that `row_text` refuses for another reason.
    """
    replies = _replies(row)
    marks: list[Mark] = []

    def mark(place: str, text: str) -> str:
        return marked(place, text, marks)

    def mark_tool(place: str, text: str) -> str:
        return mark(place, text) if place.endswith((".name", ".description")) else text

    if _is_text(row, replies):
        changed(_tools(row), "tools", mark_tool, frozenset())
        return [place for _, place, _ in marks]
    chat = _chat(row, tokenizer, template_kwargs)
    signing = replace(chat, tools=changed(chat.tools, "tools", mark_tool, frozenset()))
    prompt = readable(row["prompt"])
    plain, signed = [prompt], [changed(prompt, "prompt", mark)]
    for field, reply in replies.items():
        if has_extras(reply):
            plain.append([*prompt, *readable(reply)])
            signed.append([*signed[0], *changed(readable(reply), field, mark)])
    try:
        texts = [signing.render(each, add_generation_prompt=each is signed[0]) for each in signed]
        return [place for sign, place, _ in marks if not any(sign in text for text in texts)]
    except InputError:  # of the marks, or of the row itself: then it is raised again
        texts = [chat.render(each, add_generation_prompt=each is prompt) for each in plain]
    return [place for _, place, said in marks if not any(holds(text, said) for text in texts)]


def _replies(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's replies by their field."""
    kind = kind_of_columns(row)
    if kind is None:
        raise InputError(
            f"the row is of no known kind, it has only: {', '.join(row)}",
            file=row.get("source"),
            field="prompt",
        )
    return kind.parts(row)


def _is_text(row: Mapping[str, Any], replies: Mapping[str, Any]) -> bool:
    parts = (row["prompt"], *replies.values())
    if all(isinstance(part, str) for part in parts):
        return True
    if not all(isinstance(part, list) for part in parts):
        raise InputError(
            f"{', '.join(('prompt', *replies))} are not all text and not all lists of messages",
            file=row.get("source"),
            field="prompt",
            mend="Load the data with load_pairs, or write them alike",
        )
    return False


def _chat(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None
) -> _Chat:
    kwargs = dict(template_kwargs or {})
    if row.get("chat_template_kwargs"):
        try:
            kwargs |= checked_template_kwargs(row["chat_template_kwargs"])
        except BadRow as bad:
            raise InputError(bad.message, file=row.get("source"), field=bad.field, mend=bad.mend) from bad
    if tokenizer.chat_template is None and not kwargs.get("chat_template"):
        raise InputError(
            "the row holds messages, and the tokenizer has no chat template",
            file=row.get("source"),
            field="model.tokenizer",
            mend="Use the tokenizer of a chat model, or give prompt and replies as text",
        )
    return _Chat(row.get("source"), tokenizer, kwargs, _tools(row))


def _render(
    chat: _Chat, prompt_messages: list[dict], replies: Mapping[str, list[dict]], added_tokens: frozenset[str]
) -> RowText:
    """A row of messages and its replies by field -> `RowText`, by the tokenizer's chat template.

    The prompt is the template's text of the prompt with the generation prompt. A reply is what the template
    writes after that, given the whole conversation, up to its end-of-turn token. Where the conversation's
    text does not go on from the prompt's or does not hold the reply's content as it is (the template takes
    the reasoning out, or its generation prompt opens what its history has not), a reply is its content with
    what the template writes around any reply. A template that ends a turn with ordinary text keeps that text,
    and the end is the tokenizer's EOS.
    """
    messages = readable(prompt_messages)
    prompt = chat.render(messages, add_generation_prompt=True)
    before, after = chat.around_reply(messages, prompt, replies)
    end = _first_token(after, added_tokens)
    texts, ends = [], []
    for field, reply in replies.items():
        message = _one_message(chat, field, reply)
        own_end = end
        if has_extras(reply):
            text = _with_extras(chat, messages, prompt, field, message)
            own_end = _own_end(text, after, end, chat.tokenizer)
        elif (whole := chat.render([*messages, message])).startswith(prompt) and message[
            "content"
        ].strip() in whole[len(prompt) :]:
            text = whole[len(prompt) :]
        else:
            text = _join(prompt, before, message["content"]) + after
        if own_end is not None:
            text = _until_turn_end(text, after if own_end == end else own_end, own_end)
        texts.append(text)
        ends.append(own_end or str(chat.tokenizer.eos_token))
    return RowText(prompt, texts, ends, templated=True)


@dataclass(frozen=True)
class _Chat:
    """What one row's conversation is rendered with, and where the row is from."""

    source: str | None
    tokenizer: PreTrainedTokenizerBase
    kwargs: dict[str, Any]
    tools: list | None

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template(messages, add_generation_prompt)
        except Exception as error:  # a template is somebody's program: it may raise anything
            as_text = [arguments_as_text(message) for message in messages]
            if as_text != messages:
                with suppress(Exception):
                    return self._template(as_text, add_generation_prompt)
            raise InputError(
                f"the chat template refuses the conversation: {error}",
                file=self.source,
                field="prompt",
                mend="Change the messages to what this model's template accepts, or use another template",
            ) from error

    def _template(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        )

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
                file=self.source,
                field=field,
                mend="Give the reply the role that the template knows, mostly 'assistant'",
            )
        return (before[len(prompt) :] if before.startswith(prompt) else ""), after


def _one_message(chat: _Chat, field: str, reply: list[dict]) -> dict:
    if len(reply) == 1 and (has_extras(reply) or isinstance(reply[0].get("content"), str)):
        return readable(reply)[0]
    raise InputError(
        "the reply is not one message with content",
        file=chat.source,
        field=field,
        mend="Put earlier messages into the prompt",
    )


def _with_extras(chat: _Chat, messages: list[dict], prompt: str, field: str, message: dict) -> str:
    """What the template writes of a reply after the prompt, with all that the reply says in it."""
    text = _after_prompt(chat, messages, prompt, message)
    if text is None:
        raise InputError(
            "the chat template's text of the conversation does not go on from that of its prompt",
            file=chat.source,
            field=field,
            mend="Where the prompt closes the reasoning (enable_thinking), take the reply's out; "
            "or use another template",
        )
    for place in _lost(chat, messages, field, message, text):
        raise InputError(
            "the chat template drops this part of the reply",
            file=chat.source,
            field=place,
            mend="Use a tokenizer whose template writes it, or write what it says into the content",
        )
    return text


def _lost(chat: _Chat, messages: list[dict], field: str, message: dict, text: str) -> list[str]:
    """The places in a reply whose text is not in the reply's; a mark finds out a short one, such as "2"."""
    said: list[Mark] = []
    signed = changed([message], field, lambda place, leaf: marked(place, leaf, said))
    whole = None
    with suppress(InputError):  # of the marks: without them the template took the reply
        whole = chat.render([*messages, *signed])
    return [
        place
        for sign, place, leaf in said
        if not holds(text, leaf) or (whole is not None and sign not in whole)
    ]


def _after_prompt(chat: _Chat, messages: list[dict], prompt: str, message: dict) -> str | None:
    """What the template writes of a reply after the prompt; None where it writes another prompt."""
    whole = chat.render([*messages, message])
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    bare = _OPENED_THOUGHT.sub("", prompt)
    if whole.startswith(bare):  # the generation prompt opens a thought that the reply has not, or otherwise
        rest = whole[len(bare) :]
        thought_twice = THINK in rest and not prompt.rstrip().endswith(THINK)
        return None if thought_twice else _join(prompt, "", rest)
    # The reply changes how earlier turns are written (gpt-oss): it begins where the opening of a reply last
    # stands before the text parts from that of another reply.
    history = chat.render(messages)
    opening = prompt.removeprefix(history)
    other = chat.render([*messages, {"role": message["role"], "content": SENTINEL}])
    alike = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), len(whole))
    at = whole.rfind(opening, 0, alike)
    return whole[at + len(opening) :] if at >= 0 and opening not in ("", prompt) else None


def _own_end(text: str, after: str, end: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that closes this reply, where it may be another than that of mere content (`<|call|>`)."""
    if end is not None and text.endswith(after):
        return end
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    closing = [token for token in special if token.strip() and text.rstrip().endswith(token)]
    return max(closing, key=len, default=end)


def _tools(row: Mapping[str, Any]) -> list | None:
    if not row.get("tools"):
        return None
    try:
        return parsed_json(row["tools"], "tools")
    except BadRow as bad:
        raise InputError(
            bad.message,
            file=row.get("source"),
            field="tools",
            mend="Write the list of tool descriptions as JSON text",
        ) from bad


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
