"""One canonical row -> the ids of its prompt and of its replies (a pair's are two), at full length.

A completion's ids are exactly what the model would have to generate after the prompt's ids, ended by one end
token. Texts are taken as they are; messages are written out by the tokenizer's own chat template. Knows no
length limit and no cache: those are `tokenization`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import kind_of_columns

Pair = tuple[list[int], list[int], list[int]]
# Of a prompt, and of each of its replies.
Ids = tuple[list[int], list[list[int]]]

# Put before a completion that cannot be encoded in its place, to keep off the space that some tokenizers
# add before a text's first word. The empty one, which nothing can merge with, is the last resort.
ANCHORS = ("\n", ".", ":", "a", "0", "")

# Stands for a reply's content to see what the template writes around it; no template takes it apart.
SENTINEL = "DpoKitReplyContent"

THINK, THOUGHT = "<think>", "</think>"


def encode_pair(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Pair:
    """One canonical pair -> (prompt ids, chosen ids, rejected ids).

    At full length, each completion closed by its end token (for an end cut off, see `LengthPolicy`). The
    prompt is empty where neither its text nor the tokenizer gives an id. Raises `InputError` where the
    tokenizer has no EOS, or no chat template for messages, and where the template refuses the row.
    """
    require_eos(tokenizer)
    return encode_rows([row], tokenizer, chat_template_kwargs)[0][0]


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> list[tuple[Pair, bool]]:
    """`encode_replies` of pairs, each as `encode_pair` gives it."""
    return [
        ((prompt, chosen, rejected), inexact)
        for (prompt, (chosen, rejected)), inexact in encode_replies(rows, tokenizer, template_kwargs)
    ]


def encode_replies(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> list[tuple[Ids, bool]]:
    """Canonical rows of one kind -> their ids at full length, and whether the ids of a reply do not give back
    its text (see `TokenizedPairs.counts`). All texts go through the tokenizer in a few batch calls."""
    added = [*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens]
    turn_ends = frozenset(token for token in added if token.strip())
    texts = [_row_text(row, tokenizer, template_kwargs, turn_ends) for row in rows]
    opening, bos_id = _opening(tokenizer), tokenizer.bos_token_id
    prompts = _ids([text.prompt for text in texts], tokenizer)
    replies = [_without_end(reply, text.end) for text in texts for reply in text.replies]
    heads = [(text.prompt, ids) for text, ids in zip(texts, prompts, strict=True) for _ in text.replies]
    completions = iter(_completions(heads, replies, tokenizer))
    encoded = []
    for text, ids in zip(texts, prompts, strict=True):
        # A text that begins with BOS brings its own opening.
        whole = ids if text.templated or (ids and ids[0] == bos_id) else [*opening, *ids]
        if not whole and bos_id is not None:
            whole = [bos_id]
        end: Any = tokenizer.convert_tokens_to_ids([text.end])
        own = list(islice(completions, len(text.replies)))
        encoded.append(((whole, [reply + end for reply, _ in own]), any(inexact for _, inexact in own)))
    return encoded


def _row_text(
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


def _completions(
    heads: list[tuple[str, list[int]]], replies: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], bool]]:
    """Each reply's ids after its prompt (text and ids), without end token; and whether they lose text.

    They are the rest of the ids of prompt and reply together. Where these do not begin with the prompt's
    ids (a token lies across the border), the reply is encoded behind an anchor, and the first anchor counts
    with which prompt and reply decode to the whole text again.
    """
    joint = _ids([prompt + reply for (prompt, _), reply in zip(heads, replies, strict=True)], tokenizer)
    found: list[tuple[list[int], bool] | None] = [
        (whole[len(ids) :], False) if whole[: len(ids)] == ids else None
        for whole, (_, ids) in zip(joint, heads, strict=True)
    ]
    crossing = [i for i, entry in enumerate(found) if entry is None]
    second_best: dict[int, list[int]] = {}
    for anchor in ANCHORS:
        if not crossing:
            break
        lead, *anchored = _ids([anchor, *(anchor + replies[i] for i in crossing)], tokenizer)
        for i, ids in zip(crossing, anchored, strict=True):
            if ids[: len(lead)] != lead:
                continue
            rest = ids[len(lead) :]
            prompt, prompt_ids = heads[i]
            # A tokenizer that normalises gives back no text as it was, but the same one for the same text.
            if _text([*prompt_ids, *rest], tokenizer) in (prompt + replies[i], _text(joint[i], tokenizer)):
                found[i] = (rest, False)
            second_best.setdefault(i, rest)
        crossing = [i for i in crossing if found[i] is None]
    return [(second_best[i], True) if entry is None else entry for i, entry in enumerate(found)]


def _without_end(text: str, end: str) -> str:
    """The text without end tokens that it brings itself, and white space behind them."""
    while (bare := text.rstrip()).endswith(end):
        text = bare[: -len(end)]
    return text


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer by itself puts before a text: BOS, or none."""
    probe = "a"
    if not _ids([probe], tokenizer)[0]:  # a vocabulary of whole words may not know it
        special = set(tokenizer.all_special_tokens)
        probe = next(word for word in tokenizer.get_vocab() if word not in special)
    plain = _ids([probe], tokenizer)[0]
    full = tokenizer(probe, padding=False, truncation=False)["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:start]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` for a tokenizer without an EOS token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so that no completion can end",
            field="model.tokenizer",
            mend="Set eos_token in its tokenizer_config.json, or use another tokenizer",
        )


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
