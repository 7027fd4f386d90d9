"""Which sequences a run asks its cached reference for, and having them computed before they are wanted."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm

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


def rows_ahead(
    dataset: Any, args: PreferenceConfig, order: Callable[[], Iterable[Sequence[int]]]
) -> list[int] | None:
    """The rows that training comes to, where it ends before it has seen all of them; else None.

    Args:
        dataset: that is trained on.
        args: of the run.
        order: the batch sampler that this rank's dataloader will have.
    """
    if dataset is None or not 0 < args.max_steps * args.train_batch_size < len(dataset):
        return None
    batches = order()
    # Another sampler draws from the global generator, and not what it will draw then.
    sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
    if not isinstance(sampler, (SeedableRandomSampler, SequentialSampler, PromptGroups)):
        return None
    with torch.random.fork_rng():
        own = [row for batch in islice(batches, args.max_steps) for row in batch]
    # All ranks are to know what each is dealt, to share it out.
    found: list[int] = gather_object(own)
    return found


def fill(
    reference: CachedReference,
    dataset: Any,
    places: Sequence[int] | None,
    planner: Planner,
    accelerator: Accelerator,
    filled: Filled,
) -> None:
    """Have the reference compute what it lacks of some rows; on several ranks, a share on each.

    Args:
        reference: of the run.
        dataset: tokenised.
        places: which of its rows; None for all.
        planner: of the run.
        accelerator: of the trainer.
        filled: is counted on.
    """
    started, args = time.perf_counter(), planner.args
    rows = planner.rows_of(dataset)
    wanted = range(len(rows)) if places is None else places
    layouts: list[Layout] = []

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
        filled.computed += reference.fill(
            groups(),
            plan=plan,
            device=args.device,
            settle=settle,
            progress=bar.update,
            rank=args.process_index,
            ranks=args.world_size,
        )
    if args.world_size > 1:
        accelerator.wait_for_everyone()
        reference.reload()
    filled.seconds += time.perf_counter() - started
