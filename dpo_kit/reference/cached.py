"""A reference whose log-probs are computed once for each sequence, and read from disk ever after.

What is missing is computed by a model that is there for that time only (`origin`); how shards lie on disk is
`store`'s business.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpo_kit import ranks
from dpo_kit.errors import InputError, TrainingError
from dpo_kit.evaluation.pair_scores import score_batches
from dpo_kit.examples import Example, ScoredReplies, number_sequences, sequence_keys, sequences_of
from dpo_kit.logprob import HeadInputs
from dpo_kit.models import unwrap
from dpo_kit.packing import MicroBatch
from dpo_kit.quantised import count_parameters
from dpo_kit.reference.lookup import Lookup
from dpo_kit.reference.shards import Kind, Shard
from dpo_kit.reference.store import ModelStore
from dpo_kit.scoring import SequenceLogProbs

# device -> the reference model, for as long as the context lasts.
Source = Callable[[torch.device], AbstractContextManager[nn.Module]]
Plan = Callable[[list[Example]], list[MicroBatch]]

# Sequences that are planned together: many enough that like prompts meet, few enough to hold.
_TOGETHER = 512

# What is computed is written after so many sequences or token log-probs, and after so many seconds; or after
# this share of all the time so far, so that a long computation makes no thousands of files.
SHARD_SEQUENCES = 1 << 16
SHARD_NUMBERS = 1 << 24
SHARD_SECONDS = 30.0
SHARD_SHARE = 0.05


class CachedReference:
    """Log-probs of a frozen model, from disk; the model is in memory only while some are missing.

    Args:
        store: where they lie.
        source: gives the model, where some must be computed.
        is_policy: whether it has the weights that the policy starts from.
        tokens: whether the log-prob of each token is wanted too.
        autocast: what the model is run in; part of its key.
        dtype: of the log-probs that come out.
        name: where the model was loaded from, for `dpo-kit cache ls`.
    """

    needs_keys = True
    model: nn.Module | None = None

    def __init__(
        self,
        store: ModelStore,
        source: Source,
        *,
        is_policy: bool,
        tokens: bool = False,
        autocast: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "",
    ) -> None:
        self.store = store
        self.is_policy = is_policy
        self.tokens = tokens
        self._source = source
        self._autocast = autocast
        self._dtype = dtype
        self._name = name
        self._known = Lookup(Shard.joined([]))

    @property
    def kind(self) -> Kind:
        """Of the shards that are read."""
        return "tokens" if self.tokens else "sequences"

    def __len__(self) -> int:
        """Distinct sequences that were read."""
        return len(self._known)

    def reload(self) -> None:
        """Read the shards that are new since the last time; what was known before keeps its value."""
        self._known = self.store.known(self.kind)

    def missing(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """[S] whether the sequence of each of [S, 16] keys must be computed; of what was read so far."""
        return self._known.find(keys) < 0

    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """Of a micro-batch planned with its keys, on its device; no `entries` without `tokens`.

        What `fill` was not asked for, as in a training loop of one's own, is computed on the spot. That is
        slow: the model is looked for each time.

        Raises:
            InputError: a sequence was never computed, and the model cannot be had any more.
            TrainingError: another process removed what was computed.
        """
        keys = _keys_of(batch)
        places = self._known.find(keys)
        if (places < 0).any():
            with self._source(batch.lengths.device) as model:
                self._compute(model, [[batch]], batch.lengths.device)
            self.reload()
            places = self._known.find(keys)
        if (places < 0).any():
            raise TrainingError(f"log-probs of the reference were removed from {self.store.folder} meanwhile")
        device = batch.lengths.device
        sums = torch.from_numpy(self._known.sums(places)).to(self._dtype)
        entries = torch.from_numpy(self._known.entries(places)) if self.tokens else torch.empty(0)
        entries = entries.to(self._dtype)
        return SequenceLogProbs(sums.to(device, non_blocking=True), entries.to(device, non_blocking=True))

    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """Whole distributions are not kept."""
        raise TypeError("a cached reference has log-probs, and nothing that its head multiplies")

    def fill(
        self,
        groups: Iterable[Sequence[Example]],
        *,
        plan: Plan,
        device: torch.device,
        settle: Callable[[nn.Module, list[Example]], None] | None = None,
        progress: Callable[[int], None] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> int:
        """Compute what is missing, each distinct sequence once, and write it.

        Nothing is loaded where nothing is missing. On several ranks each takes a share of the prompts; when
        all have come back, each calls `reload` to see what the others wrote.

        Args:
            groups: examples by groups; those of a group are planned together, and share what they share.
            plan: examples -> micro-batches with their keys.
            device: to run it on.
            settle: called once with the model and the first examples, before `plan`.
            progress: called with the number of sequences done since the last call.
            rank: this process.
            ranks: how many there are.

        Returns:
            How many sequences this rank computed.

        Raises:
            InputError: the cache cannot be written, or the model cannot be had any more.
            TrainingError: a log-prob is not finite.
        """
        self.reload()
        wanted = self._wanted(groups, rank, ranks)
        first = next(wanted, None)
        if first is None:
            return 0
        lots = (plan(examples) for examples in chain([first], wanted))
        with self._source(device) as model:
            if settle is not None:
                settle(model, first)
            done = self._compute(model, lots, device, progress)
        self.reload()
        return done

    def fill_together(
        self,
        model: nn.Module,
        groups: Iterable[Sequence[Example]],
        *,
        plan: Plan,
        filler: MicroBatch,
        device: torch.device,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """As `fill`, by a model that is in shards over the ranks: each pass is one of all ranks.

        Args:
            model: the reference, in shards; on all ranks together.
            groups: as in `fill`.
            plan: likewise.
            filler: what a rank runs that has nothing left, while others have.
            device: of the model.
            progress: as in `fill`.
        """
        self.reload()
        wanted = self._wanted(groups, ranks.rank(), ranks.ranks())
        first = next(wanted, None)
        if not ranks.agree(first is not None):
            return 0
        ours = wanted if first is None else chain([first], wanted)
        lots = ((batch for batch in plan(examples) if ranks.agree(True)) for examples in ours)
        done = self._compute(model, lots, device, progress)
        others = itertools.takewhile(lambda _: ranks.agree(False), itertools.repeat(filler))
        for _ in score_batches(model, others, device, self._autocast):
            pass
        return done

    def _compute(
        self,
        model: nn.Module,
        lots: Iterable[Iterable[MicroBatch]],
        device: torch.device,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Score lots of micro-batches and write what comes out; how many sequences that were."""
        done = 0
        self.store.describe(
            name=self._name,
            dtype=str(next(model.parameters()).dtype),
            autocast=None if self._autocast is None else str(self._autocast),
            parameters=count_parameters(model),
            **{"class": type(unwrap(model)).__name__},
        )
        with _Writer(self.store, self.kind) as writer:
            for batches in lots:
                for batch, scored in score_batches(model, batches, device, self._autocast):
                    writer.add(_shard_of(batch, scored))
                    done += batch.num_sequences
                    if progress is not None:
                        progress(batch.num_sequences)
                writer.end_lot()
        return done

    def _wanted(self, groups: Iterable[Sequence[Example]], rank: int, ranks: int) -> Iterator[list[Example]]:
        """Missing sequences of this rank's prompts, as examples with one reply each, in handy lots."""
        seen: set[bytes] = set()
        waiting: list[Example] = []
        for group in groups:
            waiting += [e for e in self._missing_of(group, seen) if _rank_of(e, ranks) == rank]
            if len(waiting) >= _TOGETHER:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _missing_of(self, group: Sequence[Example], seen: set[bytes]) -> list[Example]:
        if not len(group):
            return []
        keys = sequence_keys(*sequences_of(group))
        slots = number_sequences(group)
        found: list[Example] = []
        for place in np.flatnonzero(self.missing(keys)).tolist():
            key, (slot, i) = keys[place].tobytes(), slots[place]
            if key not in seen:
                seen.add(key)
                example = group[i]
                found.append(
                    ScoredReplies(example.prompt, [example.replies[slot]], [1.0], source=example.source)
                )
        return found


def _rank_of(example: Example, ranks: int) -> int:
    """Replies to one prompt stay together, and it does not matter what each rank has found on disk so far."""
    return crc32(example.prompt.astype(np.int64).tobytes()) % ranks


def _keys_of(batch: MicroBatch) -> npt.NDArray[np.uint8]:
    if batch.keys is None:
        raise ValueError("a cached reference needs micro-batches with keys: plan_step(..., with_keys=True)")
    return batch.keys.numpy()


def _shard_of(batch: MicroBatch, scored: SequenceLogProbs) -> Shard:
    """What was computed for a micro-batch; sums are taken in fp64.

    Raises:
        TrainingError: a log-prob is not finite; it would stay in the cache for ever.
    """
    entries = scored.entries.detach().cpu()
    owners, lengths = batch.entry_sequence.cpu(), batch.lengths.cpu()
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owners, entries.double())
    if not bool(torch.isfinite(sums).all()):
        bad = batch.sequence_example.cpu()[~torch.isfinite(sums)].tolist()
        named = ", ".join(dict.fromkeys(batch.sources[i] or f"example {i}" for i in bad[:5]))
        raise TrainingError(f"the reference's log-prob is not finite on {named}, and is not kept")
    return Shard(_keys_of(batch), sums.numpy(), lengths.numpy(), entries.float().numpy())


class _Writer:
    """Collects what is computed and writes it now and then, and what is left when the context ends.

    Lots are written whole: what is missing after a process died is then cut into the same micro-batches as it
    would have been, and comes out the same to the last bit, which sums in other shapes need not.
    """

    def __init__(self, store: ModelStore, kind: Kind) -> None:
        self._store, self._kind = store, kind
        self._lot: list[Shard] = []
        self._waiting: list[Shard] = []
        self._began = self._wrote = time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        # What could not be written a moment ago cannot be written now.
        if not isinstance(error, InputError):
            self._write()

    def add(self, shard: Shard) -> None:
        """Take a part of a lot in."""
        self._lot.append(shard.of_kind(self._kind))

    def end_lot(self) -> None:
        """Write where it is time."""
        self._waiting, self._lot = self._waiting + self._lot, []
        sequences = sum(map(len, self._waiting))
        numbers = sum(0 if shard.logprobs is None else len(shard.logprobs) for shard in self._waiting)
        now = time.monotonic()
        patience = max(SHARD_SECONDS, SHARD_SHARE * (now - self._began))
        if sequences >= SHARD_SEQUENCES or numbers >= SHARD_NUMBERS or now - self._wrote >= patience:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._store.add(Shard.joined(self._waiting), self._kind)
        self._waiting, self._wrote = [], time.monotonic()
