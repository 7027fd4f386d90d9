"""Many rows -> ids in arrays: what `encoding` defines, at the pace of the tokenizer's own threads.

Each distinct text goes through the tokenizer once; a reply is encoded behind the last word of its prompt
only, where the prompt can be cut there (`borders`); ids go into one array and through no lists of lists. Rows
with a token across the border, and tokenizers that are more than a `tokenizers` backend, are left to
`encoding.encode_texts`: the definition, which all of this must equal.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_kit.borders import gives_back_bytes, is_plain_backend, safe_cut
from dpo_kit.chat import RowText
from dpo_kit.encoding import Ids, encode_texts, opening_of, texts_of, without_end

ROWS_AT_ONCE = 256


@dataclass
class Sequences:
    """N sequences of token ids, each made of K pieces of one array.

    flat: int32; starts, piece_lengths: int64, where in it a piece begins and how many ids it has.
    """

    flat: np.ndarray
    starts: np.ndarray
    piece_lengths: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Sequences:
        """Each sequence in one piece."""
        lengths_N = np.array([len(ids) for ids in lists], np.int64)
        flat = np.array([token for ids in lists for token in ids], np.int32)
        return cls(flat, (np.cumsum(lengths_N) - lengths_N)[:, None], lengths_N[:, None])

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each sequence."""
        return self.piece_lengths.sum(axis=1)

    def ids(self, row: int) -> list[int]:
        """The ids of one sequence."""
        pieces = zip(self.starts[row].tolist(), self.piece_lengths[row].tolist(), strict=True)
        return [token for start, length in pieces for token in self.flat[start : start + length].tolist()]

    def take(self, rows: np.ndarray) -> Sequences:
        """The sequences of these numbers, in their order."""
        return Sequences(self.flat, self.starts[rows], self.piece_lengths[rows])

    def replaced(self, ids_of: Mapping[int, Sequence[int]]) -> Sequences:
        """The same with other ids for some sequences."""
        if not ids_of:
            return self
        rows, new = list(ids_of), Sequences.of(list(ids_of.values()))
        starts, piece_lengths = self.starts.copy(), self.piece_lengths.copy()
        piece_lengths[rows] = 0
        starts[rows, 0] = len(self.flat) + new.starts[:, 0]
        piece_lengths[rows, 0] = new.piece_lengths[:, 0]
        return Sequences(np.concatenate([self.flat, new.flat]), starts, piece_lengths)

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after the other (int32), and [N+1] where in them each sequence begins (int32)."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return self.flat[_places(self.starts.ravel(), self.piece_lengths.ravel())], bounds


def _places(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each piece, one after the other."""
    before_N = np.cumsum(lengths_N) - lengths_N
    return np.arange(lengths_N.sum()) + np.repeat(starts_N - before_N, lengths_N)


@dataclass
class EncodedRows:
    """Rows at full length: [N] prompts; the replies of all rows one after the other; how many each row has
    [N]; whether ids of a row's replies lose text [N], and whether its template drops a part of its prompt
    [N], see `TokenizedPairs.counts`."""

    prompts: Sequences
    replies: Sequences
    counts: np.ndarray
    inexact: np.ndarray
    drops: np.ndarray


def encode_groups(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> Iterator[EncodedRows]:
    """What `encoding.encode_replies` gives for these rows, in arrays, `ROWS_AT_ONCE` after the other.

    While the caller is at one group, the tokenizer's threads are at the next.
    """
    texts = texts_of(rows, tokenizer, template_kwargs)
    if not is_plain_backend(tokenizer):
        while some := list(islice(texts, ROWS_AT_ONCE)):
            yield _of_lists(encode_texts(some, tokenizer), some)
        return
    # The call by which it finds them leaves the backend without padding and truncation, as needed here.
    opening, cut = opening_of(tokenizer), safe_cut(tokenizer)
    waiting: deque[_Group] = deque()
    # Two calls at a time, since a call's own beginning and end use one core only.
    with ThreadPoolExecutor(2) as threads:
        while some := list(islice(texts, ROWS_AT_ONCE)):
            waiting.append(_Group(some, tokenizer, opening, cut, threads))
            if len(waiting) > 2:
                yield waiting.popleft().put_together()
        while waiting:
            yield waiting.popleft().put_together()


def _of_lists(encoded: list[tuple[Ids, bool]], texts: list[RowText]) -> EncodedRows:
    return EncodedRows(
        Sequences.of([prompt for (prompt, _), _ in encoded]),
        Sequences.of([reply for (_, replies), _ in encoded for reply in replies]),
        np.array([len(replies) for (_, replies), _ in encoded]),
        np.array([inexact for _, inexact in encoded]),
        np.array([text.drops for text in texts]),
    )


class _Group:
    """Has the distinct texts of some rows encoded, then makes the rows of their ids."""

    def __init__(
        self,
        texts: list[RowText],
        tokenizer: PreTrainedTokenizerBase,
        opening: list[int],
        cut: Callable[[str], int],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._texts, self._tokenizer, self._opening, self._cut = texts, tokenizer, opening, cut
        self._heads: list[int] = []  # for each row the number of the text of its prompt up to the cut,
        self._tails: list[int] = []  # and from there,
        self._joint: list[int] = []  # and for each reply of that with the reply
        self._flat, self._bounds = array("i"), array("q", [0])
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        self._encoded = threads.submit(encode, self._distinct(), add_special_tokens=False)

    def _distinct(self) -> list[str]:
        number: dict[str, int] = {}
        for text in self._texts:
            at = self._cut(text.prompt)
            tail = text.prompt[at:]
            self._heads.append(number.setdefault(text.prompt[:at], len(number)))
            self._tails.append(number.setdefault(tail, len(number)))
            for reply, end in zip(text.replies, text.ends, strict=True):
                joint = tail + without_end(reply, end)
                self._joint.append(number.setdefault(joint, len(number)))
        return list(number)

    def _append(self, ids: list[int]) -> int:
        self._flat.fromlist(ids)
        self._bounds.append(len(self._flat))
        return len(self._bounds) - 2

    def put_together(self) -> EncodedRows:
        """The rows; those with a token across the border are encoded plainly."""
        for encoding in self._encoded.result():
            self._append(encoding.ids)
        bos_id = self._tokenizer.bos_token_id
        nothing, opening = self._append([]), self._append(self._opening)
        bos = nothing if bos_id is None else self._append([bos_id])
        end_M = self._ends()
        # Pieces are numbers so far: each is `flat[start[number] :][: length[number]]`.
        flat, bounds = np.frombuffer(self._flat, np.int32), np.frombuffer(self._bounds, np.int64)
        start, length = bounds[:-1], np.diff(bounds)
        head_N, tail_N, joint_M = map(np.array, (self._heads, self._tails, self._joint))
        replies_N = np.array([len(text.replies) for text in self._texts])
        row_M = np.repeat(np.arange(len(replies_N)), replies_N)

        filled_N = length[head_N] + length[tail_N] > 0
        first_N = flat[np.where(length[head_N] > 0, start[head_N], start[tail_N]).clip(max=len(flat) - 1)]
        opened_N = filled_N & (first_N == (-1 if bos_id is None else bos_id))
        opened_N |= np.array([text.templated for text in self._texts])
        lead_N = np.where(opened_N, nothing, opening)
        lead_N[~filled_N & (length[lead_N] == 0)] = bos
        prompts_NK = np.stack([lead_N, head_N, tail_N], axis=1)
        prompts = Sequences(flat, start[prompts_NK], length[prompts_NK])

        tail_M = tail_N[row_M]
        replies = Sequences(
            flat,
            np.stack([start[joint_M] + length[tail_M], start[end_M]], axis=1),
            np.stack([length[joint_M] - length[tail_M], length[end_M]], axis=1),
        )
        crossed_M = _differ(flat, start[tail_M], start[joint_M], length[tail_M], length[joint_M])
        drops_N = np.array([text.drops for text in self._texts])
        encoded = EncodedRows(prompts, replies, replies_N, np.zeros(len(self._texts), bool), drops_N)
        return self._mended(encoded, np.unique(row_M[crossed_M]).tolist())

    def _ends(self) -> np.ndarray:
        """[M] the number of the piece that ends each reply."""
        ends = [end for text in self._texts for end in text.ends]
        ids: Any = self._tokenizer.convert_tokens_to_ids(list(distinct := dict.fromkeys(ends)))
        number = {end: self._append([token]) for end, token in zip(distinct, ids, strict=True)}
        return np.array([number[end] for end in ends])

    def _mended(self, encoded: EncodedRows, rows: list[int]) -> EncodedRows:
        """These rows as `encode_texts` gives them."""
        if not rows:
            return encoded
        first = np.cumsum(encoded.counts) - encoded.counts
        # The definition asks what the ids decode to. Where that is bytes, the head of a prompt has no say.
        short = gives_back_bytes(self._tokenizer)
        texts = [self._texts[row] for row in rows]
        if short:
            texts = [replace(text, prompt=text.prompt[self._cut(text.prompt) :]) for text in texts]
        prompts: dict[int, list[int]] = {}
        replies: dict[int, list[int]] = {}
        for row, ((prompt, own), inexact) in zip(rows, encode_texts(texts, self._tokenizer), strict=True):
            prompts[row] = prompt
            replies.update(enumerate(own, int(first[row])))
            encoded.inexact[row] = inexact
        return replace(
            encoded,
            prompts=encoded.prompts if short else encoded.prompts.replaced(prompts),
            replies=encoded.replies.replaced(replies),
        )


def _differ(
    flat: np.ndarray, one_M: np.ndarray, other_M: np.ndarray, length_M: np.ndarray, room_M: np.ndarray
) -> np.ndarray:
    """[M] whether the `length` ids from `one` are not those from `other`, where there is `room` ids."""
    common_M = np.minimum(length_M, room_M)
    unequal = flat[_places(one_M, common_M)] != flat[_places(other_M, common_M)]
    owner = np.repeat(np.arange(len(common_M)), common_M)
    return (np.bincount(owner[unequal], minlength=len(common_M)) > 0) | (room_M < length_M)
