"""Where a text may be cut without a change of its tokens, for tokenizers that split text at spaces by rules.

The ids of `text[:cut]`, of `text[cut:]` and of what follows can then be found apart. What is not known to be
safe is not cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# How many spaces are looked at, from the end of a text, for one between letters.
TRIES = 64

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")

# What the splitting rules of GPT-2, Llama 3, Qwen, GPT-4o and their kin are made of. None of these goes on
# from a letter to a space, none looks back, and only `\s+(?!\S)` looks ahead, from white space to one
# character. So one word ends before " x" and another begins there, whatever stands before and after.
_MARKS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SAFE_ALTERNATIVES = frozenset(
    (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _MARKS),
        *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_MARKS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_MARKS}?",
        *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
    )
)
_AT_SPACES = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer"))


def safe_cut(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """-> a function from a text to a place p in it such that, whatever `more` is,

    ids(text + more) = ids(text[:p]) + ids(text[p:] + more)

    without special tokens. It is the last place before a space with ASCII letters on both sides; 0 where
    there is none, and for tokenizers of which it is not known to be right. These split a text at such
    places before they look at what the pieces are made of, change nothing across them, and have no added
    token that holds or swallows a space.
    """
    return _last_word if _splits_between_words(tokenizer) else lambda text: 0


def gives_back_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids stand for the bytes of a text and no more, so that each part decodes for itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or type(backend.decoder).__name__ != "ByteLevel":
        return False
    if any(backend.token_to_id(letter) is None for letter in ByteLevel.alphabet()):
        return False
    added = backend.get_added_tokens_decoder().items()
    known = [("a b\n", backend.encode("a b\n", add_special_tokens=False).ids)]
    known += [(token.content, [i]) for i, token in added]
    return all(backend.decode(ids, skip_special_tokens=False) == text for text, ids in known)


def is_plain_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call of the tokenizer is no more than one of its `tokenizers` backend."""
    own = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(own, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )


def _last_word(text: str) -> int:
    end = len(text)
    for _ in range(TRIES):
        end = text.rfind(" ", 1, end)
        if end < 0:
            return 0
        if text[end - 1] in _LETTERS and text[end + 1 : end + 2] in _LETTERS:
            return end
    return 0


def _splits_between_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return False
    if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
        return False
    model = backend.model
    # With dropout the ids are drawn anew for each text.
    if type(model).__name__ not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        return False
    if getattr(model, "dropout", None) or getattr(model, "alpha", None):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.rstrip or any(character.isspace() for character in token.content):
            return False
    return _splits(json.loads(backend.pre_tokenizer.__getstate__())) is True


def _splits(rule: dict[str, Any]) -> bool | None:
    """Whether the pre-tokenizer is one that splits between words; None where it only does no harm."""
    kind = rule["type"]
    if kind == "Sequence":
        parts = [_splits(part) for part in rule["pretokenizers"]]
        return False if False in parts else (True in parts or None)
    if kind == "ByteLevel":
        return True if rule["use_regex"] else None
    if kind == "Digits":
        return None
    if kind == "Metaspace":
        return bool(rule["split"])
    if kind == "Split":
        pattern = rule["pattern"].get("Regex")
        isolated = rule["behavior"] == "Isolated" and not rule["invert"]
        return isolated and pattern is not None and _alternatives(pattern) <= _SAFE_ALTERNATIVES
    return kind in _AT_SPACES


def _alternatives(pattern: str) -> set[str]:
    """What stands between the bars of a regular expression, brackets kept whole."""
    found, depth, start = set(), 0, 0
    for mark in re.finditer(r"\\.|[()\[\]|]", pattern):
        depth += (mark[0] in "([") - (mark[0] in ")]")
        if mark[0] == "|" and depth == 0:
            found.add(pattern[start : mark.start()])
            start = mark.end()
    return {*found, pattern[start:]}
