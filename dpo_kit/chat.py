"""One canonical row -> the text of its prompt and replies, messages written out by the chat template.

What a template would lose of a reply is refused, never dropped; what it loses of a row's other parts
`dropped_parts` tells. How texts become ids is in `encoding`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.pairs.kinds import kind_of_columns
from dpo_kit.pairs.leaves import THINK, THOUGHT, Mark, changed, holds, joined, marked, says
from dpo_kit.pairs.messages import arguments_as_text, has_extras, readable
from dpo_kit.pairs.schema import BadRow, checked_tools
from dpo_kit.pairs.schema import template_kwargs as checked_template_kwargs

# Stands for a reply's content to see what the template writes around it; no template takes it apart.
SENTINEL = "DpoKitReplyContent"

_OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_CLOSED_TWICE = (
    "the chat template's generation prompt closes the thought (<think></think>), and replies have another. "
    "Take the reasoning out of these replies, or set enable_thinking: true in chat_template_kwargs where the "
    "template knows it"
)
_NEVER_CLOSED = (
    "the chat template's generation prompt opens a thought (<think>), and the template does not say how a "
    "reply without reasoning closes it: such replies are trained as a thought. Put the reasoning, up to "
    "</think>, into them, or set enable_thinking: false in chat_template_kwargs where the template knows it"
)
# What a prompt says or calls, not its reasoning, which templates leave out of earlier turns on purpose.
_SAID = re.compile(r"tools\[.*|prompt\[\d+\]\.(content\Z|tool_calls|tool_responses).*")


@dataclass(frozen=True)
class RowText:
    """A row as text.

    `ends` are the tokens, as text, that close the replies; they are not part of the `replies`. `templated`:
    the special tokens that open a prompt are in its text already. `drops`: the template leaves tools, a tool
    call, a tool's result or the content of a message out of the prompt.
    """

    prompt: str
    replies: list[str]
    ends: list[str]
    templated: bool
    drops: bool = False


def row_text(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    added_tokens: frozenset[str],
) -> RowText:
    """The row's texts. Over the `template_kwargs` go those of the row's own `chat_template_kwargs`.

    White space at the edges of a message, and around the tags of its reasoning, is as the template writes it:
    many take it off. `added_tokens` are those that can end a turn.

    Raises `InputError`, naming row and field, for what is no row of a known kind, for messages without a chat
    template or that it refuses, and where it drops a tool call, a reasoning or another extra of a reply.
    Warns of a reply inside a thought that the generation prompt opens and nothing closes, and of one with a
    thought where the prompt has closed it.
    """
    replies = _replies(row)
    if _is_text(row, replies):
        eos, drops = str(tokenizer.eos_token), bool(_tools(row))
        return RowText(row["prompt"], list(replies.values()), [eos] * len(replies), False, drops)
    chat, messages = _chat(row, tokenizer, template_kwargs), readable(row["prompt"])
    text = _render(chat, messages, replies, added_tokens)
    return replace(text, drops=True) if _drops(chat, messages, text.prompt) else text


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
    if _is_text(row, replies):
        marks: list[Mark] = []
        changed(_tools(row), "tools", lambda place, text: _mark_tool(place, text, marks), frozenset())
        return [place for _, place, _ in marks]
    said = {field: readable(reply) for field, reply in replies.items() if has_extras(reply)}
    return _dropped(_chat(row, tokenizer, template_kwargs), readable(row["prompt"]), said)


def _dropped(chat: _Chat, prompt: list[dict], replies: Mapping[str, list[dict]]) -> list[str]:
    """`dropped_parts` of a prompt, its tools and these replies."""
    marks: list[Mark] = []

    def mark(place: str, text: str) -> str:
        return marked(place, text, marks)

    tools = changed(chat.tools, "tools", lambda place, text: _mark_tool(place, text, marks), frozenset())
    signing = replace(chat, tools=tools)
    plain, signed = [prompt], [changed(prompt, "prompt", mark)]
    for field, reply in replies.items():
        plain.append([*prompt, *reply])
        signed.append([*signed[0], *changed(reply, field, mark)])
    try:
        texts = [signing.render(each, add_generation_prompt=each is signed[0]) for each in signed]
        return [place for sign, place, _ in marks if not any(sign in text for text in texts)]
    except InputError:  # of the marks, or of the row itself: then it is raised again
        texts = [chat.render(each, add_generation_prompt=each is prompt) for each in plain]
    return [place for _, place, said in marks if not any(holds(text, said) for text in texts)]


def _mark_tool(place: str, text: str, marks: list[Mark]) -> str:
    return marked(place, text, marks) if place.endswith((".name", ".description")) else text


def _drops(chat: _Chat, messages: list[dict], prompt: str) -> bool:
    """`RowText.drops`. Rows of mere content are not rendered once more: only the system turn is looked for,
    which is what templates leave out of these."""
    if chat.tools or any(len(message) > 2 or message["role"] == "tool" for message in messages):
        return any(_SAID.match(place) for place in _dropped(chat, messages, {}))
    return any(message["role"] == "system" and not holds(prompt, message["content"]) for message in messages)


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
    chat: _Chat, messages: list[dict], replies: Mapping[str, list[dict]], added_tokens: frozenset[str]
) -> RowText:
    """A row of messages and its replies by field -> `RowText`, by the tokenizer's chat template.

    The prompt is the template's text of the prompt with the generation prompt. A reply is what the template
    writes after that, given the whole conversation, up to its end-of-turn token: see `_after_prompt`. Where
    that does not hold the reply's content (the template takes its reasoning out), a reply is its content with
    what the template writes around any reply. A template that ends a turn with ordinary text keeps that text,
    and the end is the tokenizer's EOS.
    """
    prompt = chat.render(messages, add_generation_prompt=True)
    any_reply = _any_reply(chat, messages, replies)
    around = _after_prompt(chat, messages, prompt, any_reply, any_reply)
    before = around.rpartition(SENTINEL)[0] if around is not None else ""
    after = any_reply.rpartition(SENTINEL)[2]
    end = _first_token(after, added_tokens)
    texts, ends = [], []
    for field, reply in replies.items():
        message = _one_message(chat, field, reply)
        own_end, whole = end, chat.render([*messages, message])
        written = _after_prompt(chat, messages, prompt, whole, any_reply)
        if has_extras(reply):
            text = _with_extras(chat, messages, field, message, written)
            own_end = _own_end(text, after, end, chat.tokenizer)
        elif written is not None and says(written, message["content"]):
            text = written
        else:
            text = joined(prompt, before, message["content"]) + after
        if own_end is not None:
            text = _until_turn_end(text, after if own_end == end else own_end, own_end)
        _warn_of_thought(prompt, text)
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


def _any_reply(chat: _Chat, messages: list[dict], replies: Mapping[str, list[dict]]) -> str:
    """The template's text of the conversation with `SENTINEL` for the reply."""
    field, first = next(iter(replies.items()))
    role = first[0]["role"] if first else "assistant"
    text = chat.render([*messages, {"role": role, "content": SENTINEL}])
    if SENTINEL not in text:
        raise InputError(
            f"the chat template does not write the content of a message of role '{role}'",
            file=chat.source,
            field=field,
            mend="Give the reply the role that the template knows, mostly 'assistant'",
        )
    return text


def _one_message(chat: _Chat, field: str, reply: list[dict]) -> dict:
    if len(reply) == 1 and (has_extras(reply) or isinstance(reply[0].get("content"), str)):
        return readable(reply)[0]
    raise InputError(
        "the reply is not one message with content",
        file=chat.source,
        field=field,
        mend="Put earlier messages into the prompt",
    )


def _with_extras(chat: _Chat, messages: list[dict], field: str, message: dict, text: str | None) -> str:
    """What the template writes of a reply after the prompt, with all that the reply says in it."""
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


def _after_prompt(chat: _Chat, messages: list[dict], prompt: str, whole: str, any_reply: str) -> str | None:
    """What the template writes of a reply after the prompt; None where it writes another prompt.

    `whole` is its text of the conversation, `any_reply` that with `SENTINEL` for the reply.
    """
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    bare = _OPENED_THOUGHT.sub("", prompt)
    if whole.startswith(bare):  # the generation prompt opens a thought that the reply has not, or otherwise
        rest = whole[len(bare) :]
        thought_twice = THINK in rest and not prompt.rstrip().endswith(THINK)
        return None if thought_twice else joined(prompt, "", rest)
    # The reply changes how earlier turns are written (gpt-oss): it begins where the opening of a reply last
    # stands before the text parts from that of another reply.
    opening = prompt.removeprefix(chat.render(messages))
    if opening in ("", prompt):
        return None
    pairs = enumerate(zip(whole, any_reply, strict=False))
    alike = next((i for i, (a, b) in pairs if a != b), len(whole))
    at = whole.rfind(opening, 0, alike)
    return whole[at + len(opening) :] if at >= 0 else None


def _warn_of_thought(prompt: str, text: str) -> None:
    """Warns of a reply in a thought that nothing closes, or with a second one; in the same words for all
    rows, so that Python says it once."""
    opened = _OPENED_THOUGHT.search(prompt)
    if opened is not None and (THOUGHT in opened[0]) == (THOUGHT in text):
        said = _CLOSED_TWICE if THOUGHT in text else _NEVER_CLOSED
        warnings.warn(said, DpoKitWarning, stacklevel=2)


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
        return checked_tools(row["tools"])
    except BadRow as bad:
        raise InputError(
            bad.message,
            file=row.get("source"),
            field=bad.field,
            mend="Write the list of tool descriptions as JSON text",
        ) from bad


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
