"""Which prompts replies are sampled to: distinct ones, drawn by a seed; whole, or the beginnings of texts.

Distinct as `data split` has it (`pairs.splitting.normalised`): prompts that differ in case, white space and
Unicode form only are the same. One prefix may still be the beginning of another.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.pairs.splitting import normalised
from dpo_kit.texts import Prompt, identity, read_prompts

# Of a long text only the beginning goes through the tokenizer: so many characters for each token wanted.
_CHARACTERS_PER_TOKEN = 32
_TEXTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Prefixes:
    """Prompts that are the first tokens of texts.

    Attributes:
        tokenizer: whose tokens; a fast one, since these know where in the text a token ends.
        least, most: tokens of a prompt; how many is drawn uniformly for each text.
        seed: of that draw, together with the text.
    """

    tokenizer: PreTrainedTokenizerBase
    least: int
    most: int
    seed: int

    def of(self, texts: Sequence[str]) -> list[tuple[str | None, str]]:
        """Of each text its prefix, or None and why there is none: "too_short" or "no_border".

        A prefix is exactly the characters that the text begins with; encoded alone it gives the text's own
        first tokens, and it does not end inside a character that is several tokens. Where the number drawn
        would, another is drawn. A text must have more than `most` tokens, so that each number can be.
        """
        ids, spans = self._encoded(texts)
        found: list[tuple[str | None, str]] = [(None, "too_short")] * len(texts)
        lengths = {}
        for i, text in enumerate(texts):
            if len(ids[i]) > self.most:
                found[i] = (None, "no_border")
                drawn = random.Random(f"{self.seed} {text}").sample(
                    range(self.least, self.most + 1), self.most + 1 - self.least
                )
                lengths[i] = [k for k in drawn if spans[i][k - 1][1] <= spans[i][k][0]]
        while lengths := {i: left for i, left in lengths.items() if left}:
            tried = {i: left.pop(0) for i, left in lengths.items()}
            prefixes = {i: texts[i][: spans[i][k - 1][1]] for i, k in tried.items()}
            again = self.tokenizer(list(prefixes.values()), add_special_tokens=False)["input_ids"]
            for (i, prefix), alone in zip(prefixes.items(), again, strict=True):
                if alone == ids[i][: tried[i]] and prefix.strip():
                    found[i] = (prefix, "")
                    del lengths[i]
        return found

    def _encoded(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        heads = [text[: _CHARACTERS_PER_TOKEN * (self.most + 1)] for text in texts]
        ids, spans = self._tokens(heads)
        # What has too few tokens may have been cut within its last one.
        cut = [
            i for i, head in enumerate(heads) if len(head) < len(texts[i]) and len(ids[i]) <= self.most + 1
        ]
        for i, own_ids, own_spans in zip(cut, *self._tokens([texts[i] for i in cut]), strict=True):
            ids[i], spans[i] = own_ids, own_spans
        return ids, spans

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        if not texts:
            return [], []
        encoded: Any = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]


@dataclass
class Drawn:
    """Distinct prompts in their random order, and the account of the texts that they are from.

    `counts` has the texts read, and how many of them were too_short, had no_border, or were kept_out.
    """

    prompts: list[Prompt]
    counts: Counter[str] = field(default_factory=Counter)


def draw_prompts(
    sources: Sequence[str],
    count: int,
    *,
    seed: int,
    prefixes: Prefixes | None = None,
    without: Iterable[Prompt] = (),
    field: str = "candidates.source",
) -> Drawn:
    """Up to `count` distinct prompts: all texts are put in a random order, and each new prompt is taken.

    The sources are read once, as a stream, and about twice as many prompts held as are asked for. The order
    is that of a digest of seed and text, so that it depends on no text's neighbours; of prompts that are the
    same but for their writing, the first one is taken.

    Args:
        sources: as `read_prompts` takes them.
        count: prompts wanted; fewer come out where there are not so many.
        seed: of the order.
        prefixes: how prompts are made of texts; None: they are the prompts.
        without: prompts that must not be among them.
        field: names the sources in errors.

    Raises:
        InputError: as `read_prompts`; messages, or a tokenizer that is not a fast one, with `prefixes`.
    """
    if prefixes is not None and not prefixes.tokenizer.is_fast:
        raise InputError(
            "prefixes need a tokenizer that knows where in a text its tokens end",
            field="candidates.prefix_tokens",
            mend="Use a fast tokenizer (tokenizer.json), or name a source of whole prompts.",
        )
    kept_out = set(map(normalised, without))
    counts: Counter[str] = Counter(read=0, too_short=0, no_border=0, kept_out=0)
    smallest: dict[str, tuple[bytes, str]] = {}
    for text, prompt in _texts_and_prompts(sources, prefixes, counts, field):
        name, key = normalised(prompt), (_key(text, seed), identity(prompt))
        if name in kept_out:
            counts["kept_out"] += 1
        else:
            smallest[name] = min(key, smallest.get(name, key))
            if len(smallest) > 2 * count + 1000:
                smallest = _first(smallest, count)
    return Drawn([json.loads(prompt) for _, prompt in _first(smallest, count).values()], counts)


def _texts_and_prompts(
    sources: Sequence[str], prefixes: Prefixes | None, counts: Counter[str], field: str
) -> Iterator[tuple[Prompt, Prompt]]:
    texts = read_prompts(sources, field=field)
    while batch := list(islice(texts, _TEXTS_AT_ONCE)):
        counts["read"] += len(batch)
        if prefixes is None:
            yield from zip(batch, batch, strict=True)
            continue
        plain = [text for text in batch if isinstance(text, str)]
        if len(plain) < len(batch):
            raise InputError(
                "a list of messages has no first tokens",
                field="candidates.prefix_tokens",
                mend="Leave it out, or name a source of texts.",
            )
        for text, (prefix, problem) in zip(plain, prefixes.of(plain), strict=True):
            if prefix is None:
                counts[problem] += 1
            else:
                yield text, prefix


def _key(text: Prompt, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {identity(text)}".encode(), digest_size=16).digest()


def _first(keys: dict[str, tuple[bytes, str]], count: int) -> dict[str, tuple[bytes, str]]:
    return dict(sorted(keys.items(), key=lambda item: item[1])[:count])
