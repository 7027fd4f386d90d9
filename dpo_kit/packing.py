"""Pairs -> steps -> micro-batches: what one forward pass computes, and who owns its predictions.

A step is a list of pairs; it is cut into micro-batches under a token budget. The cut changes memory
and speed and nothing else: the loss weighs each pair by its share of the step.

A micro-batch is either one packed token tree (`pack_tree`) or separate padded sequences
(`pack_padded`, for models that the tree cannot serve). Both say in the same terms which hidden
states predict which tokens, so that nothing behind them knows the difference.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_kit.attention import TreeAttentionPlan, plan_tree_attention
from dpo_kit.attention.transport import SentAsArrays
from dpo_kit.examples import (
    Example,
    number_sequences,
    sequence_keys,
    sequences_of,
)
from dpo_kit.shapes import Shape
from dpo_kit.tree import IntArray, SortedSequences, build_tree, sort_sequences

Layout = Literal["tree", "padded"]

# Of a tree that is one of several alike: pairs are not cut, so that not all have the mean size.
_EVEN = 1.1


@dataclass
class MicroBatch(SentAsArrays):
    """What one forward pass computes, and how its predictions make up the sequences.

    Sequences are numbered by their place in the example first: of P pairs, the chosen reply of pair p is
    sequence p and its rejected reply P + p. A prediction may belong to several sequences, one entry for each.

    Attributes:
        input_ids: [rows, length] (a tree is one row).
        position_ids: [rows, length].
        tree: the attention plan of a tree; None for padded sequences.
        prediction_rows: [N] place, in the flattened rows x length, of the hidden state that predicts.
        prediction_targets: [N] the token it predicts.
        entry_prediction: [M] the prediction of each entry, ordered by sequence and place in it.
        entry_sequence: [M] the sequence that owns it.
        lengths: [S] number of entries of each sequence: the completion's tokens.
        last_rows: [S] place of each sequence's last token, as in `prediction_rows`.
        sequence_example: [S] the example that each sequence belongs to.
        scores: [S] how good the data says it is; see `dpo_kit.losses.LogProbs`.
        keys: [S, 16] what each sequence is known by in the reference cache, uint8; None where not asked for.
        shape: what the examples are.
        weights: [P] weight of each example (pair).
        margins: [P] the data's score difference of each pair, 0 where it has none.
        sources: P places in the data, for messages.
        num_tokens: tokens computed, without padding.
        num_separate_tokens: tokens of the same sequences kept apart.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree: TreeAttentionPlan | None
    prediction_rows: Tensor
    prediction_targets: Tensor
    entry_prediction: Tensor
    entry_sequence: Tensor
    lengths: Tensor
    last_rows: Tensor
    sequence_example: Tensor
    scores: Tensor
    keys: Tensor | None
    shape: Shape
    weights: Tensor
    margins: Tensor
    sources: list[str]
    num_tokens: int
    num_separate_tokens: int

    @property
    def num_pairs(self) -> int:
        return len(self.sources)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, **_: Any) -> MicroBatch:
        """The same micro-batch on another device; its keys stay, since they are looked up on the host."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "keys"
        }
        moved["tree"] = None if self.tree is None else self.tree.to(device)
        return replace(self, **moved)


def pack_tree(pairs: Sequence[Example], backend: str = "gathered", *, with_keys: bool = False) -> MicroBatch:
    """Put the sequences of examples into one token tree; `backend` computes its attention."""
    sequences, starts = sequences_of(pairs)
    keys = sequence_keys(sequences, starts) if with_keys else None
    return _pack_sorted(pairs, sort_sequences(sequences), starts, keys, backend)


def _pack_sorted(
    pairs: Sequence[Example],
    given: SortedSequences,
    starts: list[int],
    keys: npt.NDArray[np.uint8] | None,
    backend: str,
) -> MicroBatch:
    tree = build_tree(given)
    owned = [rows[start:] for rows, start in zip(tree.sequence_rows, starts, strict=True)]
    return _micro_batch(
        pairs,
        owned,
        keys,
        tokens=tree.tokens,
        parents=tree.parents,
        input_ids=torch.from_numpy(tree.tokens)[None],
        position_ids=torch.from_numpy(tree.positions)[None],
        tree=plan_tree_attention(tree, backend),
        num_tokens=len(tree),
        num_separate_tokens=len(given.tokens),
    )


def pack_padded(pairs: Sequence[Example], pad_token_id: int = 0, *, with_keys: bool = False) -> MicroBatch:
    """Lay the sequences of examples one under the other, padded on the right.

    There is no mask: a causal model's earlier tokens do not see the padding behind them.
    """
    sequences, starts = sequences_of(pairs)
    length = max(map(len, sequences))
    input_ids = np.full((len(sequences), length), pad_token_id, np.int64)
    owned = []
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[i, : len(sequence)] = sequence
        owned.append(np.arange(start, len(sequence)) + i * length)
    return _micro_batch(
        pairs,
        owned,
        sequence_keys(sequences, starts) if with_keys else None,
        tokens=input_ids.reshape(-1),
        parents=np.arange(input_ids.size) - 1,
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(length).expand(len(sequences), length),
        tree=None,
        num_tokens=sum(map(len, sequences)),
        num_separate_tokens=sum(map(len, sequences)),
    )


def _micro_batch(
    pairs: Sequence[Example],
    owned: list[IntArray],
    keys: npt.NDArray[np.uint8] | None,
    *,
    tokens: IntArray,
    parents: IntArray,
    **layout: Any,
) -> MicroBatch:
    """Predictions and their owners: `owned` holds, per sequence, the places of its completion's tokens."""
    entries = np.concatenate(owned)
    is_predicted = np.zeros(len(tokens), np.int64)
    is_predicted[entries] = 1
    predicted = np.flatnonzero(is_predicted)
    entry_prediction = (is_predicted.cumsum() - 1)[entries]
    lengths = np.array([len(rows) for rows in owned])
    slots = number_sequences(pairs)
    return MicroBatch(
        prediction_rows=torch.from_numpy(parents[predicted]),
        prediction_targets=torch.from_numpy(tokens[predicted]),
        entry_prediction=torch.from_numpy(entry_prediction),
        entry_sequence=torch.from_numpy(np.arange(len(owned)).repeat(lengths)),
        lengths=torch.from_numpy(lengths),
        last_rows=torch.tensor([rows[-1] for rows in owned]),
        sequence_example=torch.tensor([i for _, i in slots]),
        scores=torch.tensor([pairs[i].scores[slot] for slot, i in slots], dtype=torch.float32),
        keys=None if keys is None else torch.from_numpy(keys.copy()),
        shape=pairs[0].shape,
        weights=torch.tensor([p.weight for p in pairs], dtype=torch.float32),
        margins=torch.tensor([p.margin for p in pairs], dtype=torch.float32),
        sources=[p.source for p in pairs],
        **layout,
    )


def cut_step(pairs: Sequence[Example], token_budget: int, layout: Layout = "tree") -> list[list[int]]:
    """Cut a step into micro-batches of at most `token_budget` tokens, as indices into `pairs`.

    Pairs that begin alike are put side by side, so that they meet in one tree. A pair that is larger
    than the budget has a micro-batch of its own. The budget counts the tree's tokens, or the padded area.
    """
    if layout == "tree":
        return _cut_sorted(sort_sequences(sequences_of(pairs)[0]), _numbers(pairs), token_budget)
    return _cut_padded(pairs, token_budget)


def _numbers(pairs: Sequence[Example]) -> list[list[int]]:
    """The numbers of each example's sequences."""
    found: list[list[int]] = [[] for _ in pairs]
    for number, (_, i) in enumerate(number_sequences(pairs)):
        found[i].append(number)
    return found


def _cut_sorted(given: SortedSequences, numbers: list[list[int]], token_budget: int) -> list[list[int]]:
    """Examples in the order of their first sequences, as few trees as fit, and these about alike in size."""
    _check_budget(token_budget)
    if given.num_prefixes <= token_budget:
        return [list(range(len(numbers)))]
    cuts = _fill_trees(given, numbers, token_budget)
    # The largest micro-batch decides the memory, and small ones multiply slowly.
    even = math.ceil(_EVEN * given.num_prefixes / len(cuts))
    if even < token_budget and len(evenly := _fill_trees(given, numbers, even)) == len(cuts):
        return evenly
    return cuts


def _fill_trees(given: SortedSequences, numbers: list[list[int]], token_budget: int) -> list[list[int]]:
    """As many examples to a tree as fit."""
    lengths, shared, places = given.lengths.tolist(), given.shared.tolist(), given.places.tolist()

    def add(place: int) -> int:
        """Put a sequence among those of the tree; returns the tokens that it adds."""
        at = bisect_left(tree, place)
        common = min(shared[tree[at - 1] + 1 : place + 1]) if at else 0
        if at < len(tree):
            common = max(common, min(shared[place + 1 : tree[at] + 1]))
        tree.insert(at, place)
        return lengths[place] - common

    tree: list[int] = []
    cuts: list[list[int]] = []
    used = 0
    for pair in sorted(range(len(numbers)), key=places.__getitem__):
        sequences = [places[number] for number in numbers[pair]]
        used += sum(map(add, sequences))
        if cuts and used <= token_budget:
            cuts[-1].append(pair)
        else:
            cuts.append([pair])
            tree.clear()
            used = sum(map(add, sequences))
    return cuts


def _cut_padded(pairs: Sequence[Example], token_budget: int) -> list[list[int]]:
    """Pairs by length, as many to a rectangle as fit."""
    _check_budget(token_budget)
    widths = [len(p.prompt) + max(map(len, p.replies)) for p in pairs]
    cuts: list[list[int]] = []
    for pair in sorted(range(len(pairs)), key=widths.__getitem__):
        # The newest pair sets the padded width.
        count = len(cuts[-1]) + 1 if cuts else 1
        if cuts and count * len(pairs[pair].replies) * widths[pair] <= token_budget:
            cuts[-1].append(pair)
        else:
            cuts.append([pair])
    return cuts


def _check_budget(token_budget: int) -> None:
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")


def plan_step(
    pairs: Sequence[Example],
    token_budget: int,
    layout: Layout = "tree",
    backend: str = "gathered",
    pad_token_id: int = 0,
    *,
    with_keys: bool = False,
) -> list[MicroBatch]:
    """A step's examples as micro-batches; every example is in exactly one.

    Args:
        pairs: pairs, unpaired replies or lists, all alike.
        token_budget: tokens of a micro-batch; see `cut_step`.
        layout: "tree" or "padded".
        backend: of a tree's attention; see `dpo_kit.attention`.
        pad_token_id: fills padded rows.
        with_keys: whether the micro-batches have their `keys`.
    """
    if layout == "padded":
        cuts = _cut_padded(pairs, token_budget)
        return [pack_padded([pairs[i] for i in cut], pad_token_id, with_keys=with_keys) for cut in cuts]
    sequences, starts = sequences_of(pairs)
    keys = sequence_keys(sequences, starts) if with_keys else None
    given, numbers = sort_sequences(sequences), _numbers(pairs)
    cuts = _cut_sorted(given, numbers, token_budget)
    if len(cuts) == 1:
        return [_pack_sorted(pairs, given, starts, keys, backend)]
    batches = []
    for cut in cuts:
        part = [pairs[i] for i in cut]
        chosen = [numbers[cut[i]][slot] for slot, i in number_sequences(part)]
        part_keys = None if keys is None else keys[chosen]
        part_starts = [starts[number] for number in chosen]
        batches.append(_pack_sorted(part, given.select(chosen), part_starts, part_keys, backend))
    return batches
