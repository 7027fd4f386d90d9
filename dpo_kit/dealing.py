"""Tokenised data set -> rows without Python lists, and the order in which they are dealt to steps.

`TokenRows` is what a dataloader reads examples of any kind from: `datasets` itself turns every token into a
Python object first, which takes longer than all of the planning. `PromptGroups` is a sampler that keeps the
rows of one prompt together, so that they meet in one token tree. `mismatched_partners` gives every row
another one that answers another prompt. Plans nothing (`packing`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import KINDS_OF_ROWS
from dpo_kit.tree import IntArray

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

REPLIES = tuple(name for kind in KINDS_OF_ROWS for name in kind.ids)
# What `examples.example_of` takes.
READ = ("prompt_ids", *REPLIES, "label", "scores", "weight", "margin", "source")

# Groups among which one is looked for that fits what is left of a step.
_WINDOW = 64
_ROWS_AT_ONCE = 10_000


class TokenRows(Dataset):
    """The rows of a tokenised data set of any kind, token ids as views of its Arrow buffers.

    Nothing is copied: where the data set is mapped from a file, rows are read when they are asked for.
    A row is a dict of those of `READ` that the data set has: ids as arrays (`completions_ids` as a list of
    arrays), `scores` as an array, `label` a bool, the others as they are.

    Args:
        dataset: with `prompt_ids` and `chosen_ids`, or any of `READ`; its other columns are left out.
        partners: [N] for each row the number of another one; each row then has `partner` too, the list of
            that other row's replies as arrays of ids. See `mismatched_partners`.
    """

    def __init__(self, dataset: datasets.Dataset, partners: IntArray | None = None) -> None:
        if partners is not None and len(partners) != len(dataset):
            raise ValueError(f"{len(partners)} partners for {len(dataset)} rows")
        self._dataset, self.partners = dataset, partners
        self._names = [name for name in READ if name in dataset.column_names]
        batches = dataset.data.table.select(self._names).to_batches()
        self._parts = [dict(zip(self._names, map(_reader, batch.columns), strict=True)) for batch in batches]
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        # A selection or a shuffle of a data set is its table and the rows that are meant.
        chosen = dataset._indices
        self._chosen = None if chosen is None else chosen.column(0).to_numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not forked opens the file; the views would be sent as what they show.
        return TokenRows, (self._dataset, self.partners)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as torch's dataloader asks for them."""
        rows = self._read(indices, self._names)
        if self.partners is not None:
            partners = self._read(self.partners[np.asarray(indices, np.int64)], self.replies)
            for row, partner in zip(rows, partners, strict=True):
                row["partner"] = _replies(partner)
        return rows

    @property
    def replies(self) -> list[str]:
        """Names of the columns that hold replies."""
        return [name for name in REPLIES if name in self._names]

    def ids(self, index: int, names: Sequence[str]) -> list[IntArray]:
        """All lists of ids that a row has in some columns."""
        return _replies(self._read([index], list(names))[0])

    def lengths(self, names: Sequence[str]) -> tuple[IntArray, IntArray]:
        """([N], [N]) the lengths, and their squares, of all lists of ids that each row has in some columns,
        added up. No token is read, and no row becomes a Python object.
        """
        columns = [self._dataset.data.table.column(name) for name in names]
        summed = [np.concatenate([_lengths(c) for c in column.chunks], axis=1) for column in columns]
        tokens, squares = np.sum(summed, axis=0)
        return (tokens, squares) if self._chosen is None else (tokens[self._chosen], squares[self._chosen])

    def _read(self, indices: Sequence[int] | IntArray, names: list[str]) -> list[dict[str, Any]]:
        rows = np.asarray(indices if self._chosen is None else self._chosen[indices], np.int64)
        parts = self._firsts.searchsorted(rows, side="right") - 1
        places = (rows - self._firsts[parts]).tolist()
        return [
            {name: self._parts[part][name](place) for name in names}
            for part, place in zip(parts.tolist(), places, strict=True)
        ]


def _replies(row: dict[str, Any]) -> list[IntArray]:
    """All arrays of a row that has nothing but replies."""
    return [ids for value in row.values() for ids in (value if isinstance(value, list) else [value])]


def _reader(column: pa.Array) -> Callable[[int], Any]:
    """Row number -> value; a list as a view of its elements, a list of lists as a list of such views."""
    if not hasattr(column, "offsets"):
        return lambda row: _as_array(column[row].as_py())
    bounds = column.offsets.to_numpy()
    if not hasattr(column.values, "offsets"):
        values = column.values.to_numpy()
        return lambda row: values[bounds[row] : bounds[row + 1]]
    inner = _reader(column.values)
    return lambda row: [inner(place) for place in range(bounds[row], bounds[row + 1])]


def _lengths(column: pa.Array) -> IntArray:
    """[2, N] sum of the lengths, and of their squares, of each row's list, or of the lists in it."""
    bounds = column.offsets.to_numpy()
    if not hasattr(column.values, "offsets"):
        lengths = np.diff(bounds).astype(np.int64)
        return np.stack([lengths, lengths**2])
    inner = _lengths(column.values)
    summed = np.concatenate([np.zeros((2, 1), np.int64), inner.cumsum(axis=1)], axis=1)
    return summed[:, bounds[1:]] - summed[:, bounds[:-1]]


def _as_array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else value


class PromptGroups(Sampler[int]):
    """A random order of rows in which those of one prompt stand together; see `deal`.

    It is the same on all ranks, and on any number of them.

    Rows of one prompt are not independent: a step's gradient is an average over fewer prompts than with a
    plain shuffle, and so is noisier. What is trained on in an epoch stays the same, its order does not.

    Args:
        dataset: tokenised, of any kind.
        batch_size: rows of a step, over all ranks.
        seed: with the epoch, decides the order.
    """

    def __init__(self, dataset: datasets.Dataset, batch_size: int, seed: int) -> None:
        self._groups = prompt_groups(dataset)
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        return iter(deal(self._groups, self._batch_size, self._seed, self._epoch).tolist())


def prompt_groups(dataset: datasets.Dataset) -> IntArray:
    """[N] number of each row's prompt; rows of equal `prompt_ids` have the same one.

    Prompts are told apart by a digest of 128 bits, so that they need not be kept.
    """
    numbers: dict[bytes, int] = {}
    rows = TokenRows(dataset.select_columns(["prompt_ids"]))
    digests = (
        blake2b(row["prompt_ids"].tobytes(), digest_size=16).digest()
        for first in range(0, len(rows), _ROWS_AT_ONCE)
        for row in rows.__getitems__(range(first, min(first + _ROWS_AT_ONCE, len(rows))))
    )
    return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int64)


def mismatched_partners(dataset: datasets.Dataset) -> IntArray:
    """[N] for each row of a tokenised data set, one that has another prompt.

    Row i takes the i-th (cyclically) of the rows with other prompts than its own. Rows of one prompt that
    stand together thus take the first, second, ... row behind them, and no two rows of a prompt the same
    where there are as many others. It depends on the order of the data set and on nothing else: neither on
    batches nor on their size, so that a batch of one has its partner too.

    Raises:
        InputError: all rows have the same prompt.
    """
    groups = prompt_groups(dataset)
    sizes = np.bincount(groups)
    if len(sizes) == 1:
        raise InputError(
            f"all {len(groups)} rows have the same prompt, and the loss needs replies to other prompts too",
            field="data.train",
            mend="Add rows with other prompts, or take a loss that needs no estimate of the KL divergence",
        )
    count, firsts = len(groups), sizes.cumsum() - sizes
    wanted = np.arange(count) % (count - sizes[groups])
    # The m-th of the others stands m + the number of own rows before it from the beginning. Ascending within
    # each group, and by `count` per group over all of them: how many of the others stand before an own row.
    by_group = groups.argsort(kind="stable")
    group = groups[by_group]
    others_before = by_group - (np.arange(count) - firsts[group])
    places = (group * count + others_before).searchsorted(groups * count + wanted, side="right")
    return wanted + places - firsts[groups]


def deal(groups: IntArray, batch_size: int, seed: int, epoch: int) -> IntArray:
    """A random order of rows whose batches cut few groups in two.

    A group that is larger than a batch is cut into whole batches and a rest. Groups are drawn at random;
    where the next one is larger than what is left of a batch, one of the next 64 that does fit goes
    first, and where none does, the next one is cut, because a batch has exactly `batch_size` rows.

    Args:
        groups: [N] number of each row's group, from 0.
        batch_size: rows of each batch; the last one may have fewer.
        seed: with `epoch` decides the order.

    Returns:
        [N] every row once.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(groups))
    rows = rows[groups[rows].argsort(kind="stable")]
    begins, ends = _stretches(groups, batch_size)
    drawn = random.permutation(len(begins))
    upcoming = zip(begins[drawn].tolist(), ends[drawn].tolist(), strict=True)

    dealt: list[tuple[int, int]] = []
    window = list(itertools.islice(upcoming, _WINDOW))
    room = batch_size
    while window:
        place = next((i for i, (begin, end) in enumerate(window) if end - begin <= room), 0)
        begin, end = window.pop(place)
        if end - begin > room:
            window.insert(0, (begin + room, end))
            end = begin + room
        else:
            window.extend(itertools.islice(upcoming, 1))
        dealt.append((begin, end))
        room = room - (end - begin) or batch_size
    begins, ends = np.array(dealt, np.int64).reshape(-1, 2).T
    lengths = ends - begins
    return rows[np.arange(len(rows)) + (begins - lengths.cumsum() + lengths).repeat(lengths)]


def _stretches(groups: IntArray, batch_size: int) -> tuple[IntArray, IntArray]:
    """Where parts of at most `batch_size` rows begin and end among the rows sorted by group."""
    sizes = np.bincount(groups)
    parts = -(-sizes // batch_size)
    within = np.arange(parts.sum()) - (parts.cumsum() - parts).repeat(parts)
    begins = (sizes.cumsum() - sizes).repeat(parts) + within * batch_size
    return begins, np.append(begins[1:], len(groups))
