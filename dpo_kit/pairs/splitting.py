"""A train and a held-out part of preference data, with no prompt on both sides.

The side is drawn from the prompt and a seed alone, so that the same prompt falls on the same side in
whatever file and order it stands, and more data later moves no earlier row. Prompts that merely resemble
each other are taken for different ones: that is for the audit to find.
"""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from dpo_kit.errors import InputError
from dpo_kit.pairs.loading import Sources, stream_rows, usable_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.tally import PairsReport
from dpo_kit.pairs.writing import RowWriter, require_not_source

_END = 2**64


@dataclass(frozen=True, slots=True)
class Split:
    """What was written: rows and distinct prompts of each side, and the account of the loading."""

    train_rows: int
    train_prompts: int
    held_out_rows: int
    held_out_prompts: int
    report: PairsReport


def split_pairs(
    sources: Sources,
    train: str | Path,
    held_out: str | Path,
    *,
    share: float = 0.05,
    prompts: int | None = None,
    options: LoadOptions = LoadOptions(),  # noqa: B008
) -> Split:
    """Write what `load_pairs` would load to two files, each prompt with all its rows to one of them.

    Prompts are the same where `normalised` gives the same text. Rows are not held, the digests of prompts
    are; with `prompts` the sources are read twice.

    Parameters
    ----------
    train, held_out: files that `RowWriter` can write.
    share: of the prompts that are held out, about; each falls by itself.
    prompts: hold out exactly so many prompts, in place of a share. With more data later, an earlier prompt
        can then go from the held-out side to the other, to make place.
    options: how rows are loaded; its `seed` is that of the draw too.

    Raises `InputError` as `load_pairs` does, where a side would have no row, and for files that cannot be
    written or are among the sources; both files are then as they were.
    """
    if not 0 < share < 1:
        raise InputError(f"expected a share between 0 and 1, found {share}", field="--eval-share")
    if prompts is not None and prompts < 1:
        raise InputError(f"expected 1 or more prompts, found {prompts}", field="--eval-prompts")
    require_not_source(sources, train, held_out)
    seed = options.seed
    below = int(share * _END) if prompts is None else _threshold(sources, prompts, options)
    report = PairsReport()
    seen: tuple[set[int], set[int]] = set(), set()
    with RowWriter(train) as train_file, RowWriter(held_out) as held_out_file:
        for row in usable_rows(sources, options, report):
            place = prompt_place(row["prompt"], seed)
            side = place < below
            seen[side].add(place)
            (held_out_file if side else train_file).write(row)
        _require_both(train_file.rows, held_out_file.rows, len(seen[0]) + len(seen[1]))
    return Split(train_file.rows, len(seen[0]), held_out_file.rows, len(seen[1]), report)


def normalised(prompt: str | list[dict]) -> str:
    """What two prompts are compared by: Unicode NFKC, case folded, every run of white space one space.

    Of messages the contents alone, one after the other.
    """
    return " ".join(unicodedata.normalize("NFKC", plain_text(prompt)).casefold().split())


def prompt_place(prompt: str | list[dict], seed: int) -> int:
    """Where on the line from 0 to 2**64 the prompt falls."""
    key = f"{seed}\n{normalised(prompt)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _threshold(sources: Sources, prompts: int, options: LoadOptions) -> int:
    """Below it lie exactly so many of the data's prompts."""
    places = {
        prompt_place(row["prompt"], options.seed) for row in stream_rows(sources, options, PairsReport())
    }
    if len(places) <= prompts:
        raise InputError(
            f"the data has {len(places)} prompts, which leaves none to train on", field="--eval-prompts",
            mend=f"Give less than {len(places)}",
        )  # fmt: skip
    return heapq.nsmallest(prompts + 1, places)[-1]


def _require_both(train_rows: int, held_out_rows: int, prompts: int) -> None:
    if train_rows and held_out_rows:
        return
    side = "to train on" if not train_rows else "on the held-out side"
    raise InputError(
        f"of {prompts} prompts none falls {side}",
        field="--eval-share",
        mend="Give --eval-prompts N to hold out exactly so many",
    )
