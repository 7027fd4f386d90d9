"""Model + micro-batch -> log-probs of sequences: the one place where model, pack and head meet.

The trainer, the reference, `dpo-kit logps` and the evaluation all score through here.

The head is entered through the model's own forward: for one call the head's layer returns the
log-probs of the asked tokens in place of all logits. So the hooks of DDP, FSDP, PEFT, gradient
checkpointing and compilers fire as ever, and no N x V matrix of logits is made.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens, sequences_of
from dpo_kit.logprob import token_logprobs
from dpo_kit.models import Head, output_head, tree_attention, unwrap
from dpo_kit.packing import Layout, MicroBatch, pack_padded, pack_tree

# Two ways to compute attention in low precision differ by rounding alone up to this share of a log-prob.
_BACKENDS_DIFFER = 0.01

# A model of low precision up to this size is copied to fp32 for the start-up check.
_COPY_PARAMETERS = 10**9


@dataclass(frozen=True)
class SequenceLogProbs:
    """Log-probs of a micro-batch's sequences.

    Attributes:
        sequences: [S] summed log-prob of each completion given its prompt, nats, fp32 or fp64.
        entries: [M] log-prob of each completion token, ordered by sequence and place in it;
            `MicroBatch.entry_sequence` says whose it is.
    """

    sequences: Tensor
    entries: Tensor


def sequence_logprobs(model: nn.Module, batch: MicroBatch, *, impl: str = "auto") -> SequenceLogProbs:
    """Score the completions of a micro-batch under a causal LM.

    Args:
        model: a transformers causal LM, possibly wrapped (DDP, PEFT, compile). With gradient
            checkpointing the backward pass must run within `dpo_kit.models.tree_attention` too.
        batch: on the model's device.
        impl: see `dpo_kit.logprob.token_logprobs`.

    Returns:
        Sequence and token log-probs, with gradients where grad mode is on.
    """
    keywords = {} if batch.tree is None else {"tree": batch.tree}
    attention = contextlib.nullcontext() if batch.tree is None else tree_attention(model)
    head = output_head(model)
    with (
        attention,
        _sparse_embedding_gradient(model, head),
        _head_returns_logprobs(head, batch, impl) as scored,
    ):
        output = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **keywords
        )
    # What the family does to logits was done inside the head, so the log-probs are taken from before
    # it; the output joins the graph with factor zero for the wrappers whose hooks hang on it.
    predictions = scored[0] + 0.0 * output.logits.flatten()
    entries = predictions.index_select(0, batch.entry_prediction)
    sums = entries.new_zeros(batch.num_sequences).index_add(0, batch.entry_sequence, entries)
    return SequenceLogProbs(sums, entries)


@contextlib.contextmanager
def _head_returns_logprobs(head: Head, batch: MicroBatch, impl: str) -> Iterator[list[Tensor]]:
    """Within: the head returns [1, N, 1] log-probs, and also puts the [N] log-probs into the list."""
    module: Any = head.module
    scored: list[Tensor] = []
    own_forward = vars(module).get("forward")

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2).index_select(0, batch.prediction_rows)
        logps = token_logprobs(
            rows,
            module.weight,
            batch.prediction_targets,
            bias=getattr(module, "bias", None),
            softcap=head.softcap,
            scale=head.scale,
            impl=impl,
        )
        scored.append(logps)
        return logps.view(1, -1, 1)

    module.forward = forward
    try:
        yield scored
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


@contextlib.contextmanager
def _sparse_embedding_gradient(model: nn.Module, head: Head) -> Iterator[None]:
    """Within: an embedding that shares the head's matrix adds its few rows to the head's gradient.

    As a dense gradient they would be a second V x H matrix, filled with zeros and then added. The sum is
    dense either way. On a processor only: elsewhere filling is cheap.
    """
    embedding: Any = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    tied = type(embedding) is nn.Embedding and embedding.weight is head.module.weight
    if not tied or embedding.weight.device.type != "cpu" or embedding.sparse:
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False


@torch.no_grad()
def full_logit_logprobs(model: nn.Module, pairs: Sequence[PairTokens]) -> Tensor:
    """[M] log-probs of each completion token, by the plain definition.

    Every sequence alone and unpadded, with ordinary attention and the model's own full logits; the
    order is that of `SequenceLogProbs.entries`. Slow, and the truth that layouts are compared with.
    """
    device = next(model.parameters()).device
    entries = []
    for sequence, start in zip(*sequences_of(pairs), strict=True):
        ids = torch.from_numpy(sequence).to(device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        entries.append(logps.gather(1, ids[0, start:, None]).squeeze(1))
    return torch.cat(entries)


def choose_layout(
    model: nn.Module, pairs: Sequence[PairTokens], backend: str = "gathered"
) -> tuple[Layout, str]:
    """The layout that a model may be trusted with, and why, where it is not the tree.

    A model with recurrent state, or with attention of its own, gives wrong log-probs on tree rows and
    no error; so each layout is compared with the plain definition on some of the run's own pairs.
    Small models of low precision are compared in fp32, where a small error can be told from rounding.

    Args:
        model: a causal LM, not wrapped.
        pairs: what the run trains on; the longest and a few others are looked at.
        backend: of the tree's attention.

    Raises:
        InputError: even padded sequences do not give the model's own log-probs.
    """
    probe = _probe(pairs)
    low_precision = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if low_precision and sum(p.numel() for p in model.parameters()) <= _COPY_PARAMETERS:
        return choose_layout(copy.deepcopy(model).float(), probe, backend)
    tree = _difference(model, probe, pack_tree(probe, backend), low_precision)
    if not tree:
        return "tree", ""
    if padded := _difference(model, probe, pack_padded(probe), low_precision):
        raise InputError(
            f"{type(model).__name__} cannot be scored: on a token tree, {tree}; padded, {padded}",
            field="model.path",
            mend="Perhaps the family does something to its logits or positions that dpo_kit does not know.",
        )
    return "padded", f"{type(model).__name__} cannot be trusted with token trees: {tree}"


def backend_difference(model: nn.Module, pairs: Sequence[PairTokens], backend: str) -> str:
    """What is wrong with a CUDA backend of the tree's attention; empty where it gives what `gathered` gives.

    `choose_layout` looks at fp32, where these backends step aside; this is for the precision of the run.

    Args:
        model: trusted with the tree, under the autocast that it will be trained in.
        pairs: what the run trains on.
        backend: see `dpo_kit.attention`.
    """
    probe, device = _probe(pairs), next(model.parameters()).device
    try:
        with _evaluating(model):
            expected, found = (
                sequence_logprobs(model, pack_tree(probe, name).to(device)).entries
                for name in ("gathered", backend)
            )
    except (TypeError, ValueError, RuntimeError) as error:
        return _in_words(error)
    differs, size = float((found - expected).abs().mean()), float(expected.abs().mean())
    if differs <= _BACKENDS_DIFFER * size:
        return ""
    return f"token log-probs differ by {differs:.1e} on average, and are {size:.1e} in size"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within: eval mode, no gradients; after: the mode as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _probe(pairs: Sequence[PairTokens]) -> list[PairTokens]:
    """A few pairs, the longest (where sliding windows bite) among them."""
    longest = max(pairs, key=lambda p: len(p.prompt) + max(map(len, p.replies)))
    return [longest, *(p for p in pairs[:3] if p is not longest)]


def _difference(model: nn.Module, pairs: list[PairTokens], batch: MicroBatch, low_precision: bool) -> str:
    """What is wrong with how pairs are packed, for a model; empty where its log-probs are as defined."""
    tolerance = 0.2 if low_precision else 1e-4
    try:
        with _evaluating(model):
            expected = full_logit_logprobs(model, pairs)
            found = sequence_logprobs(model, batch.to(expected.device)).entries
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return _in_words(error)
    worst = float((found - expected).abs().max())
    return "" if worst <= tolerance else f"token log-probs differ by {worst:.1e} (allowed {tolerance:.0e})"
