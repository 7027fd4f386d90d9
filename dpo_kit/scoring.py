"""Model + micro-batch -> log-probs or rewards of sequences: the one place where model, pack and head meet.

The trainer, the reference, `dpo-kit logps` and the evaluation all score through here.

The head is entered through the model's own forward: for one call the head's layer returns the
log-probs of the asked tokens in place of all logits. So the hooks of DDP, FSDP, PEFT, gradient
checkpointing and compilers fire as ever, and no N x V matrix of logits is made. Of a reward model the
value head is computed where sequences end, in fp32 whatever the model's precision.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.errors import InputError
from dpo_kit.examples import Example, sequences_of
from dpo_kit.logprob import HeadInputs, token_logprobs, token_logprobs_and_kl
from dpo_kit.models import Head, is_reward_model, output_head, tree_attention, unwrap, value_head
from dpo_kit.packing import Layout, MicroBatch, pack_padded, pack_tree
from dpo_kit.padding import no_padding_token
from dpo_kit.quantised import computing_in_fp32, quantised_bits

# Two ways to compute attention in low precision differ by rounding alone up to this share of a log-prob.
_BACKENDS_DIFFER = 0.01

# A model of low precision up to this size is copied to fp32 for the start-up check.
_COPY_PARAMETERS = 10**9


@dataclass(frozen=True)
class SequenceLogProbs:
    """Log-probs of a micro-batch's sequences, nats, fp32 or fp64.

    Attributes:
        sequences: [S] summed log-prob of each completion given its prompt.
        entries: [M] log-prob of each completion token, ordered by sequence and place in it;
            `MicroBatch.entry_sequence` says whose it is.
        extras: [M] by name, what was asked for. "reference_kl", KL(reference || policy) of a token's
            distribution in nats, carries gradients; the others don't.
        reference_sequences: [S] under the reference, without gradient, where its head's inputs were given.
        reference_entries: [M] likewise.
    """

    sequences: Tensor
    entries: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    reference_sequences: Tensor | None = None
    reference_entries: Tensor | None = None


def sequence_logprobs(
    model: nn.Module,
    batch: MicroBatch,
    *,
    impl: str = "auto",
    extras: Sequence[str] = (),
    reference: HeadInputs | None = None,
) -> SequenceLogProbs:
    """Score the completions of a micro-batch under a causal LM.

    Args:
        model: a transformers causal LM, possibly wrapped (DDP, PEFT, compile). With gradient
            checkpointing the backward pass must run within `dpo_kit.models.tree_attention` too.
        batch: on the model's device.
        impl: see `dpo_kit.logprob.token_logprobs`; without meaning where `reference` is given.
        extras: statistics of the distributions, from the same pass; see `dpo_kit.logprob.token_logprobs`.
        reference: what `head_inputs` gave for the same micro-batch. The reference's log-probs and the extra
            "reference_kl" come with it.

    Returns:
        Sequence and token log-probs, with gradients where grad mode is on.
    """
    results: dict[str, Tensor] = {}
    head = output_head(model)

    def score(hidden: Tensor) -> Tensor:
        policy = _inputs(head, hidden, batch)
        results.update(_score(policy, batch.prediction_targets, impl, extras, reference))
        # A copy: FSDP hangs its hooks on what a layer returns, and does not trust views.
        return results["logps"].view(1, -1, 1).clone()

    with _sparse_embedding_gradient(model, head), _forward_is(head.module, score):
        output = _forward(model, batch)
    # What the family does to logits was done inside the head, so the log-probs are taken from before
    # it; the output joins the graph with factor zero for the wrappers whose hooks hang on it.
    joined = 0.0 * output.logits.flatten()
    for name in {"logps", "reference_kl"} & results.keys():
        results[name] = results[name] + joined
    entries = {name: value.index_select(0, batch.entry_prediction) for name, value in results.items()}
    logps, reference_logps = entries.pop("logps"), entries.pop("reference_logps", None)
    return SequenceLogProbs(
        sequences=_sums(logps, batch),
        entries=logps,
        extras=entries,
        reference_sequences=None if reference_logps is None else _sums(reference_logps, batch),
        reference_entries=reference_logps,
    )


def _score(
    policy: HeadInputs, targets: Tensor, impl: str, extras: Sequence[str], reference: HeadInputs | None
) -> dict[str, Tensor]:
    """[N] by name: logps, the extras and, with a reference, reference_logps and reference_kl."""
    if reference is not None:
        logps, reference_logps, kl, found = token_logprobs_and_kl(policy, reference, targets, extras=extras)
        return {"logps": logps, "reference_logps": reference_logps, "reference_kl": kl, **found}
    scored = token_logprobs(
        policy.hidden,
        policy.weight,
        targets,
        bias=policy.bias,
        softcap=policy.softcap,
        scale=policy.scale,
        extras=extras,
        impl=impl,
    )
    return {"logps": scored[0], **scored[1]} if extras else {"logps": scored}


def _sums(entries: Tensor, batch: MicroBatch) -> Tensor:
    return entries.new_zeros(batch.num_sequences).index_add(0, batch.entry_sequence, entries)


@torch.no_grad()
def head_inputs(model: nn.Module, batch: MicroBatch) -> HeadInputs:
    """What the head of a causal LM is about to score for a micro-batch's predictions, and does not.

    For the reference of `sequence_logprobs`. It holds [N, H] hidden states, and the head's matrix itself:
    score with it before that changes, and where the matrix is whole (not sharded).
    """
    found: list[HeadInputs] = []
    head = output_head(model)

    def keep(hidden: Tensor) -> Tensor:
        found.append(_inputs(head, hidden, batch))
        return hidden.new_zeros(1, 1, 1)

    with _forward_is(head.module, keep):
        _forward(model, batch)
    return found[0]


def sequence_rewards(model: nn.Module, batch: MicroBatch) -> Tensor:
    """What a reward model says of each sequence of a micro-batch, at the sequence's last token.

    Args:
        model: a reward model (`models.load_reward_model`), possibly wrapped, as for `sequence_logprobs`.
        batch: on the model's device.

    Returns:
        [S] rewards, with gradients where grad mode is on; fp32 or fp64, and the value head is computed so,
        outside of autocast: of two rewards of 8 bits the difference would have few.

    Raises:
        InputError: the model has no value head, or one with several labels.
    """
    rewards: list[Tensor] = []

    def score(linear: nn.Linear, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2).index_select(0, batch.last_rows)
        parts = [p if p is None else _full_precision(p) for p in (rows, linear.weight, linear.bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            rewards.append(nn.functional.linear(*parts).squeeze(-1))
        everywhere = rewards[0].new_zeros(hidden.shape[:-1].numel())
        return everywhere.index_copy(0, batch.last_rows, rewards[0]).view(*hidden.shape[:-1], 1)

    with no_padding_token(model), contextlib.ExitStack() as stack:
        # A head that peft trains holds the layer before and the one that is trained; one of them runs.
        for part in value_head(model).modules():
            if isinstance(part, nn.Linear) and part.out_features == 1:
                stack.enter_context(_forward_is(part, partial(score, part)))
        output = _forward(model, batch)
    # The model's own choice of rows is another; it joins for the wrappers whose hooks hang on it.
    return rewards[0] + 0.0 * output.logits.sum()


def what_is_trained(model: nn.Module, batch: MicroBatch) -> Tensor:
    """What a loss looks at: [S] rewards of a reward model, [M] token log-probs of a causal LM."""
    if is_reward_model(model):
        return sequence_rewards(model, batch)
    return sequence_logprobs(model, batch).entries


@contextlib.contextmanager
def _value_head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within: each call of the value head puts its hidden states into the list."""
    found: list[Tensor] = []
    handle = value_head(model).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _forward(model: nn.Module, batch: MicroBatch) -> Any:
    """The model's own forward over a micro-batch, of either layout."""
    keywords = {} if batch.tree is None else {"tree": batch.tree}
    with contextlib.nullcontext() if batch.tree is None else tree_attention(model):
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **keywords)


def _inputs(head: Head, hidden: Tensor, batch: MicroBatch) -> HeadInputs:
    rows = hidden.flatten(0, -2).index_select(0, batch.prediction_rows)
    bias = getattr(head.module, "bias", None)
    return HeadInputs(rows, head.module.weight, bias, head.softcap, head.scale)


@contextlib.contextmanager
def _forward_is(module: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within: a layer computes something else, between the hooks that it has."""
    own_forward = vars(module).get("forward")
    module.forward = function
    try:
        yield
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
def full_logit_logprobs(model: nn.Module, pairs: Sequence[Example]) -> Tensor:
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


@torch.no_grad()
def full_rewards(model: nn.Module, pairs: Sequence[Example]) -> Tensor:
    """[S] rewards by the plain definition: every sequence alone and unpadded, the model's own result.

    No token is taken for padding: where a reply ends with the model's `pad_token_id`, transformers by itself
    would read the token before it. The truth for `sequence_rewards`.
    """
    device = next(model.parameters()).device
    inputs = (torch.from_numpy(sequence).to(device)[None] for sequence in sequences_of(pairs)[0])
    with no_padding_token(model):
        rewards = [model(input_ids=ids, use_cache=False).logits[0, 0] for ids in inputs]
    return _full_precision(torch.stack(rewards))


def choose_layout(
    model: nn.Module, pairs: Sequence[Example], backend: str = "gathered"
) -> tuple[Layout, str]:
    """The layout that a model may be trusted with, and why, where it is not the tree.

    A model with recurrent state, or with attention of its own, gives wrong log-probs (or rewards) on tree
    rows and no error; so each layout is compared with the plain definition on some of the run's own pairs.
    Small models of low precision are compared in fp32, where a small error can be told from rounding.

    Args:
        model: a causal LM or a reward model, not wrapped.
        pairs: what the run trains on; the longest and a few others are looked at.
        backend: of the tree's attention.

    Raises:
        InputError: even padded sequences do not give the model's own log-probs or rewards.
    """
    probe = _probe(pairs)
    low_precision = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    # What is quantised cannot be copied to fp32, and is rounded once and for all.
    copied = low_precision and not quantised_bits(model)
    if copied and sum(p.numel() for p in model.parameters()) <= _COPY_PARAMETERS:
        return choose_layout(copy.deepcopy(model).float(), probe, backend)
    tree = _difference(model, probe, pack_tree(probe, backend), low_precision)
    if not tree:
        return "tree", ""
    if padded := _difference(model, probe, pack_padded(probe), low_precision):
        raise InputError(
            f"{type(model).__name__} cannot be scored: on a token tree, {tree}; padded, {padded}",
            field="model.path",
            mend="Perhaps the family does something to its logits or positions that dpo_kit does not know, "
            "or its tokens see what comes after them.",
        )
    return "padded", f"{type(model).__name__} cannot be trusted with token trees: {tree}"


def backend_difference(model: nn.Module, pairs: Sequence[Example], backend: str) -> str:
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
                what_is_trained(model, pack_tree(probe, name).to(device)) for name in ("gathered", backend)
            )
    except (TypeError, ValueError, RuntimeError) as error:
        return _in_words(error)
    differs, size = float((found - expected).abs().mean()), float(expected.abs().mean())
    if differs <= _BACKENDS_DIFFER * size:
        return ""
    what = "rewards" if is_reward_model(model) else "token log-probs"
    return f"{what} differ by {differs:.1e} on average, and are {size:.1e} in size"


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


def _probe(pairs: Sequence[Example]) -> list[Example]:
    """A few pairs, the longest (where sliding windows bite) among them."""
    longest = max(pairs, key=lambda p: len(p.prompt) + max(map(len, p.replies)))
    return [longest, *(p for p in pairs[:3] if p is not longest)]


def _difference(model: nn.Module, pairs: list[Example], batch: MicroBatch, low_precision: bool) -> str:
    """What is wrong with how pairs are packed, for a model; empty where its results are as defined."""
    tolerance = 0.2 if low_precision else 1e-4
    compare = _compare_rewards if is_reward_model(model) else _compare_logprobs
    try:
        with _evaluating(model), computing_in_fp32(model):
            what, worst = compare(model, pairs, batch.to(next(model.parameters()).device))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return _in_words(error)
    return "" if worst <= tolerance else f"{what} differ by {worst:.1e} (allowed {tolerance:.0e})"


def _compare_logprobs(model: nn.Module, pairs: list[Example], batch: MicroBatch) -> tuple[str, float]:
    difference = sequence_logprobs(model, batch).entries - full_logit_logprobs(model, pairs)
    return "token log-probs", float(difference.abs().max())


def _compare_rewards(model: nn.Module, pairs: list[Example], batch: MicroBatch) -> tuple[str, float]:
    """Hidden states too, against their size: a new value head may say nearly the same of everything."""
    with _value_head_inputs(model) as alone:
        expected = full_rewards(model, pairs)
    with _value_head_inputs(model) as packed:
        found = sequence_rewards(model, batch)
    hidden = torch.cat([states[0, -1:] for states in alone]).float()
    rows = packed[0].flatten(0, -2).index_select(0, batch.last_rows).float()
    worst = max(
        float((found - expected).abs().max() / expected.abs().max().clamp(min=1)),
        float((rows - hidden).abs().max() / hidden.abs().max()),
    )
    return "rewards, or the hidden states that they are read from,", worst
