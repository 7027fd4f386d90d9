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

# So many characters, from the end of a text, are searched for a cut.
REACH = 256
# The end of a word before white space.
_AT_SPACE = re.compile(r".*[A-Za-z.,:;?!](?= )", re.DOTALL)
_AT_SPACE_OR_LINE = re.compile(r".*(?:[A-Za-z.,:;?!](?= )|[A-Za-z](?=\n))", re.DOTALL)

# What the splitting rules of GPT-2, Llama 3, Qwen, GPT-4o and their kin are made of. None of these goes on
# from a letter or mark to a space, or from a letter to the end of a line; none looks back; and only
# `\s+(?!\S)` looks ahead, from white space on. So a piece ends and another begins at such a place, whatever
# stands around it.
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

    without special tokens. It is the last place behind a word and before a space (for tokenizers of bytes, or
    the end of a line), out of the last `REACH` characters; 0 where there is none, and for tokenizers of which
    it is not known to be right. These split a text at such places before they look at what the pieces are
    made of, change nothing across them, and have no added token that holds or swallows white space.
    """
    places = _places(tokenizer)

    def cut(text: str) -> int:
        found = places and places.match(text, max(0, len(text) - REACH))
        return found.end() if found else 0

    return cut


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


def _places(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """What matches a text up to the last place at which it may be cut; None where it never may."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return None
    if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
        return None
    model = backend.model
    # With dropout the ids are drawn anew for each text.
    if type(model).__name__ not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        return None
    if getattr(model, "dropout", None) or getattr(model, "alpha", None):
        return None
    for token in backend.get_added_tokens_decoder().values():
        if token.rstrip or any(character.isspace() for character in token.content):
            return None
    rule = json.loads(backend.pre_tokenizer.__getstate__())
    if not _splits(rule):
        return None
    return _AT_SPACE_OR_LINE if _keeps_lines(rule) else _AT_SPACE


def _keeps_lines(rule: dict[str, Any]) -> bool:
    """Whether a text that begins with the end of a line is split as it is where it follows another."""
    if rule["type"] == "Sequence":
        return all(_keeps_lines(part) for part in rule["pretokenizers"])
    if rule["type"] == "ByteLevel":
        return not rule["add_prefix_space"]
    return rule["type"] in ("Split", "Digits")


def _splits(rule: dict[str, Any]) -> bool | None:
    """Whether the pre-tokenizer splits behind words; None where it does not, but does no harm."""
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
