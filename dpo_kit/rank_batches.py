"""The rows of a step -> the rows of each rank, so that all ranks have equal work.

`RankBatches` is the dataloader's batch sampler: it takes the rows of a step in the order in which one process
would, and yields those that fall to this rank. Every rank does the same sums on the same integers, so none
has to tell another. Ranks may have different numbers of rows, or none: a step's loss is a mean over all of
them (`loop`). What a rank then does with its rows is planned in `packing`.

Work is counted in tokens of the body: a prompt once for all its rows that one rank has, and so each of the
replies to it; what the head does for replies; and attention. How much the last two are worth depends on the
model (`Costs`): attention is quadratic in a sequence, but its share of a token's work is only the number of
tokens it sees over six times the hidden size: 1% for 250 tokens and a hidden size of 4096, a third for 8192.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from dpo_kit.dealing import TokenRows
from dpo_kit.tree import IntArray

# Units of work per token: whole numbers, so that all ranks add them up alike.
_UNIT = 1024
# The longest rank over the least it could be, below which rows of one prompt are not parted any further.
_GOOD = 1.02
# A forward pass alone, to one with its backward pass.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Pieces:
    """What the rows of a step are made of; a piece that several rows of one unit have is computed once.

    Attributes:
        groups: [n] number of each row's prompt, from 0.
        rows: [k] the row that each piece belongs to.
        keys: [k] number of what it is: a prompt, a reply.
        work: [k] of it.
    """

    groups: IntArray
    rows: IntArray
    keys: IntArray
    work: IntArray

    def sizes(self, units: IntArray) -> IntArray:
        """[units] work of each, by the unit of each row."""
        owners = units[self.rows]
        _, first = np.unique(owners * (self.keys.max() + 1) + self.keys, return_index=True)
        sizes = np.zeros(int(units.max()) + 1, np.int64)
        np.add.at(sizes, owners[first], self.work[first])
        return sizes


@dataclass(frozen=True)
class Costs:
    """What a model does for a token beside its pass through the body's matrices, which counts as 1.

    Attributes:
        reply: of the head, for a reply's token.
        seen: of attention, for each earlier token that a token sees.
    """

    reply: float = 0.0
    seen: float = 0.0

    @classmethod
    def of(cls, config: Any, *, with_head: bool = True) -> Costs:
        """By a model's configuration; tokens alone count where it does not tell its sizes.

        A layer is taken to have 12 H^2 weights, as a GPT of hidden size H and a Llama nearly do. So the head
        (V H) costs V / (12 L H), and attention (2 H for each token seen, in each layer) 1 / (6 H).
        """
        text = config.get_text_config()
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        hidden, layers, vocabulary = (getattr(text, name, None) or 0 for name in names)
        if not hidden or not layers:
            return cls()
        return cls(vocabulary / (12 * layers * hidden) if with_head else 0.0, 1 / (6 * hidden))


class RowWork:
    """Estimated work of each row of a data set, from the lengths of its columns.

    Args:
        rows: of any kind; with `partners`, these cost a forward pass.
        costs: of the model.
        with_rejected: whether rejected replies are computed.

    Attributes:
        prompts: [N] work of each row's prompt, int64, in 1/1024 of a token's.
        replies: [N] work of all its replies.
    """

    def __init__(self, rows: TokenRows, costs: Costs, *, with_rejected: bool = True) -> None:
        self._rows, self._costs = rows, costs
        self._names = [name for name in rows.replies if with_rejected or name != "rejected_ids"]
        (self._tokens, squares), sums = rows.lengths(["prompt_ids"]), rows.lengths(self._names)
        prompts = self._tokens + costs.seen * squares / 2
        work = self._of_replies(self._tokens, *sums)
        if rows.partners is not None:
            work += _FORWARD * (prompts + work[rows.partners])
        self.prompts, self.replies = (np.rint(_UNIT * each).astype(np.int64) for each in (prompts, work))

    def _of_replies(self, prompts: Any, tokens: Any, squares: Any) -> Any:
        """By the tokens of the prompt and of the replies, and these squared."""
        return (1 + self._costs.reply) * tokens + self._costs.seen * (prompts * tokens + squares / 2)

    def pieces(self, rows: IntArray) -> Pieces:
        """What some rows are made of. Replies are told apart among those to one prompt alone."""
        groups = self._groups(rows)
        alone = np.bincount(groups)[groups] == 1
        found: list[tuple[int, Any, int]] = []
        for place, (row, group) in enumerate(zip(rows.tolist(), groups.tolist(), strict=True)):
            rest = int(self.replies[row])
            if not alone[place]:
                for reply in self._rows.ids(row, self._names):
                    work = self._of_replies(int(self._tokens[row]), len(reply), len(reply) ** 2)
                    found.append((place, (group, reply.tobytes()), round(_UNIT * work)))
                    rest -= found[-1][2]
                found.append((place, ("row", row), max(rest, 0)))
                rest = 0
            found.append((place, ("prompt", group), int(self.prompts[row]) + rest))
        owners, keys, works = zip(*found, strict=True)
        numbers: dict[Any, int] = {}
        each = [numbers.setdefault(key, len(numbers)) for key in keys]
        return Pieces(groups, np.array(owners), np.array(each), np.array(works))

    def _groups(self, rows: IntArray) -> IntArray:
        """[n] for each of some rows a number that those with the same prompt share."""
        lengths = self._tokens[rows].tolist()
        counts = Counter(lengths)
        numbers: dict[Any, int] = {}
        # A prompt is read only where another one is as long.
        keys = [
            self._rows.ids(row, ["prompt_ids"])[0].tobytes() if counts[length] > 1 else length
            for row, length in zip(rows.tolist(), lengths, strict=True)
        ]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


class RankBatches(BatchSampler):
    """For each step of an epoch, the rows that fall to this rank.

    Each of the sampler's rows is in a batch of one rank; a batch may be empty. The length is the number of
    steps, the same on all ranks.

    Args:
        sampler: gives the same rows on all ranks; its `set_epoch`, where it has one, is called by accelerate.
        batch_size: rows of a step, over all ranks.
        drop_last: leave out a last step that is not full.
        rank: of this process.
        ranks: processes that share a step.
        work: of the rows. None: neighbours are dealt, `batch_size / ranks` to each rank while there are any.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        *,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        work: RowWork | None = None,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._rank, self._ranks, self._work = rank, ranks, work

    def __iter__(self) -> Iterator[list[int]]:
        for rows in super().__iter__():
            yield rows if self._ranks == 1 else self._own(rows)

    def _own(self, rows: list[int]) -> list[int]:
        if self._work is None:
            share = self.batch_size // self._ranks
            return rows[self._rank * share : (self._rank + 1) * share]
        step = np.asarray(rows)
        ranks = deal_to_ranks(self._work.pieces(step), self._ranks)
        return step[ranks == self._rank].tolist()


def agreed_sampler(sampler: Any, seed: int, ranks: int, *, seedable: bool) -> Any:
    """A sampler whose order is the same on all ranks, whatever each has drawn from its generator.

    Args:
        sampler: of transformers, or one's own.
        seed: of the data; a random order is drawn from it and the epoch.
        ranks: how many. One alone may draw from the global generator.
        seedable: whether it is not to do so where accelerate knows how.
    """
    if isinstance(sampler, RandomSampler) and (seedable or ranks > 1):
        kept = {"replacement": sampler.replacement, "num_samples": sampler._num_samples}
        return SeedableRandomSampler(sampler.data_source, **kept, generator=sampler.generator, data_seed=seed)
    if ranks > 1 and getattr(sampler, "generator", 0) is None:
        sampler.generator = torch.Generator().manual_seed(seed)
    return sampler


def step_loader(
    rows: Dataset, batches: RankBatches, collate: Any, args: TrainingArguments, accelerator: Accelerator
) -> DataLoader:
    """The dataloader of some batches with a trainer's settings; accelerate does not deal them once more."""
    workers = int(args.dataloader_num_workers or 0)
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        # As far as accelerate is to know.
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def deal_to_ranks(pieces: Pieces, ranks: int) -> IntArray:
    """[n] the rank of each row of a step, such that the longest rank is short.

    The longest unit goes to the rank with the least work, then the next one (LPT: Graham, 1969, SIAM J. Appl.
    Math. 17). A unit is at first all rows of one prompt. Where that leaves the ranks uneven, large units are
    cut in more and more parts, each of which computes what they share again; the cut whose longest rank is
    the shortest is taken.
    """
    even = pieces.sizes(pieces.groups).sum() / ranks
    good = _GOOD * max(even, pieces.sizes(np.arange(len(pieces.groups))).max())
    best, shortest, largest = pieces.groups, math.inf, math.inf
    while True:
        units = _units(pieces, largest)
        sizes = pieces.sizes(units)
        owners = _longest_first(sizes.tolist(), ranks)
        longest = pieces.sizes(owners[units]).max()
        if longest < shortest:
            best, shortest = owners[units], longest
        if shortest <= good or len(sizes) == len(units):
            return best
        largest = min(even, largest / 2)


def _units(pieces: Pieces, largest: float) -> IntArray:
    """[n] number of each row's unit: a group, or one of as many equal parts as bring it below a size."""
    groups = pieces.groups
    counts = np.bincount(groups)
    parts = np.minimum(np.ceil(pieces.sizes(groups) / largest).clip(1), counts).astype(np.int64)
    order = groups.argsort(kind="stable")
    within = np.empty_like(groups)
    within[order] = np.arange(len(groups)) - (counts.cumsum() - counts)[groups[order]]
    return (parts.cumsum() - parts)[groups] + within * parts[groups] // counts[groups]


def _longest_first(sizes: list[int], ranks: int) -> IntArray:
    """The rank of each unit; of equal ones the first has its turn first."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = np.empty(len(sizes), np.int64)
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        load, rank = loads[0]
        owners[unit] = rank
        heapq.heapreplace(loads, (load + sizes[unit], rank))
    return owners
