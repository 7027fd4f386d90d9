"""One canonical row -> the ids of its prompt and of its replies (a pair's are two), at full length.

A completion's ids are exactly what the model would have to generate after the prompt's ids, ended by one end
token. This is the definition, for every tokenizer; `batch_encoding` does the same faster for most of them.
The texts of prompt and replies come from `chat`. Knows no length limit and no cache: those are
`tokenization`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.chat import RowText, row_text
from dpo_kit.errors import InputError

Pair = tuple[list[int], list[int], list[int]]
# Of a prompt, and of each of its replies.
Ids = tuple[list[int], list[list[int]]]

# Put before a completion that cannot be encoded in its place, to keep off the space that some tokenizers
# add before a text's first word. The empty one, which nothing can merge with, is the last resort.
ANCHORS = ("\n", ".", ":", "a", "0", "")


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
    return encode_texts(list(texts_of(rows, tokenizer, template_kwargs)), tokenizer)


def texts_of(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> Iterator[RowText]:
    """The text of each row, as `chat.row_text` gives it."""
    added = [*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens]
    turn_ends = frozenset(token for token in added if token.strip())
    return (row_text(row, tokenizer, template_kwargs, turn_ends) for row in rows)


def encode_texts(texts: Sequence[RowText], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Ids, bool]]:
    """`encode_replies` of rows that are text already."""
    opening, bos_id = opening_of(tokenizer), tokenizer.bos_token_id
    prompts = _ids([text.prompt for text in texts], tokenizer)
    replies = [
        without_end(reply, end) for text in texts for reply, end in zip(text.replies, text.ends, strict=True)
    ]
    heads = [(text.prompt, ids) for text, ids in zip(texts, prompts, strict=True) for _ in text.replies]
    completions = iter(_completions(heads, replies, tokenizer))
    encoded = []
    for text, ids in zip(texts, prompts, strict=True):
        # A text that begins with BOS brings its own opening.
        whole = ids if text.templated or (ids and ids[0] == bos_id) else [*opening, *ids]
        if not whole and bos_id is not None:
            whole = [bos_id]
        ends: Any = tokenizer.convert_tokens_to_ids(text.ends)
        own = list(islice(completions, len(text.replies)))
        closed = [[*reply, end] for (reply, _), end in zip(own, ends, strict=True)]
        encoded.append(((whole, closed), any(inexact for _, inexact in own)))
    return encoded


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


def without_end(text: str, end: str) -> str:
    """The text without end tokens that it brings itself, and white space behind them."""
    while (bare := text.rstrip()).endswith(end):
        text = bare[: -len(end)]
    return text


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
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
