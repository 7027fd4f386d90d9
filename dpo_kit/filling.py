"""Which sequences a run asks its cached reference for, and having them computed before they are wanted."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm

from dpo_kit import ranks
from dpo_kit.config import PreferenceConfig
from dpo_kit.dealing import PromptGroups
from dpo_kit.errors import DpoKitWarning
from dpo_kit.examples import Example
from dpo_kit.models import check_length
from dpo_kit.packing import Layout, MicroBatch
from dpo_kit.planning import Planner
from dpo_kit.reference import CachedReference
from dpo_kit.scoring import choose_layout

# Rows that are looked up together.
_ROWS = 256


@dataclass
class Filled:
    """What filling the cache has cost so far.

    Attributes:
        computed: sequences, by this rank.
        tokens: that these took, each shared one once.
        seconds: looking up what is there included.
    """

    computed: int = 0
    tokens: int = 0
    seconds: float = 0.0


def rows_ahead(dataset: Any, args: PreferenceConfig, order: Callable[[], Iterable[int]]) -> list[int] | None:
    """The rows that training comes to, where it ends before it has seen all of them; else None.

    Args:
        dataset: that is trained on.
        args: of the run.
        order: the sampler that training will have, the same on all ranks.
    """
    assert args.batch_size is not None
    count = args.max_steps * args.batch_size
    if dataset is None or not 0 < count < len(dataset):
        return None
    sampler = order()
    # Another sampler draws from the global generator, and not what it will draw then.
    if not isinstance(sampler, (SeedableRandomSampler, SequentialSampler, PromptGroups)):
        return None
    return list(islice(sampler, count))


def fill(
    reference: CachedReference,
    dataset: Any,
    places: Sequence[int] | None,
    planner: Planner,
    filled: Filled,
    together: nn.Module | None = None,
) -> None:
    """Have the reference compute what it lacks of some rows; on several ranks, a share on each.

    Args:
        reference: of the run.
        dataset: tokenised.
        places: which of its rows; None for all.
        planner: of the run.
        filled: is counted on.
        together: the reference itself where it lies in shards over the ranks.
    """
    started, args = time.perf_counter(), planner.args
    rows = planner.rows_of(dataset)
    wanted = range(len(rows)) if places is None else places
    layouts: list[Layout] = [] if together is None else [planner.layout]

    def groups() -> Iterator[list[Example]]:
        for start in range(0, len(wanted), _ROWS):
            yield from planner.scored(rows.__getitems__(wanted[start : start + _ROWS]))

    def settle(model: nn.Module, first: list[Example]) -> None:
        """A model that is not the policy may be less fit for trees."""
        layout, reason = planner.layout, ""
        if not reference.is_policy:
            check_length(model, args.max_length, max(len(e.prompt) + max(map(len, e.replies)) for e in first))
            if layout == "tree":
                layout, reason = choose_layout(model, first, args.backend)
        if reason:
            warnings.warn(f"the reference: {reason}; padded sequences are used", DpoKitWarning, stacklevel=2)
        layouts.append(layout)

    def plan(examples: list[Example]) -> list[MicroBatch]:
        batches = planner.plan(examples, layouts[0])
        filled.tokens += sum(batch.num_tokens for batch in batches)
        return batches

    bar = tqdm(desc="reference", unit=" sequences", disable=True if args.disable_tqdm else None)
    with contextlib.closing(bar):
        common: dict[str, Any] = {"plan": plan, "device": args.device, "progress": bar.update}
        if together is None:
            ours = {"rank": args.process_index, "ranks": args.world_size}
            # All wait, however long: one of them may have more that is missing.
            filled.computed += ranks.each(lambda: reference.fill(groups(), settle=settle, **common, **ours))
        else:
            assert planner.filler is not None
            filler = planner.whole([planner.filler])
            filled.computed += reference.fill_together(together, groups(), filler=filler, **common)
    if args.world_size > 1:
        ranks.wait()
        reference.reload()
    filled.seconds += time.perf_counter() - started
