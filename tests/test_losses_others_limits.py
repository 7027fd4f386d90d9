"""The same losses: gradients by finite differences, limits, and what must change nothing."""

import dataclasses
import math

import pytest
import torch
from loss_cases import value

from dpo_kit.losses import LogProbs, dpo, get_loss, make_objective
from dpo_kit.losses.inputs import concatenate

F64 = torch.float64
ON_PAIRS = ["simpo", "alphapo", "cpo", "orpo", "wpo", "ld_dpo", "tdpo1", "tdpo2", "bradley_terry"]
UNPAIRED = ["kto", "bco", "apo_zero_unpaired", "npo"]
ON_LISTS = ["plackett_luce", "lipo", "rrhf"]
# What each is probed with: its defaults, and what brings the rest of its code to run.
OPTIONS = {
    "alphapo": [{}, {"alpha": 0.0}, {"alpha": -0.5}],
    "cpo": [{}, {"per_token": True}],
    "npo": [{}, {"retain": 1.0}],
    "rrhf": [{}, {"per_token": True}],
    "bradley_terry": [{}, {"margin": True, "centring": 0.01}],
}


def made(shape, dtype=F64, scale=3.0, examples=4, labels=None, tokens=None, seed=5):
    """Random log-probs of a shape, everything a loss may look at among them, and the leaves of their graph.

    The leaves are independent of each other: of a sum and its tokens a loss may take either.
    """
    draw = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.rand(*size, generator=draw, dtype=F64).to(dtype)

    sizes = {"pairs": [2] * examples, "unpaired": [1] * examples, "lists": [4, 2, 3, 1, 5][:examples]}[shape]
    example = torch.tensor([e for slot in range(max(sizes)) for e, size in enumerate(sizes) if size > slot])
    replies = len(example)
    lengths = (
        torch.randint(1, 6, (replies,), generator=draw) if tokens is None else torch.full((replies,), tokens)
    )
    sequence = torch.arange(replies).repeat_interleave(lengths)
    scores = (
        torch.rand(replies, generator=draw)
        if shape == "lists"
        else torch.rand(replies, generator=draw).round()
    )
    if shape == "pairs":
        scores = torch.tensor([1.0, 0.0]).repeat_interleave(examples)
    if labels is not None:
        scores = torch.full_like(scores, float(labels))
    leaves = {
        "policy": -scale * random(replies),
        "token_logps": -scale * random(len(sequence)),
        "reference_kl": scale * random(len(sequence)),
        "rewards": scale * (random(replies) - 0.5),
    }
    logps = LogProbs(
        None,
        example,
        examples,
        shape,
        reference=-scale * random(replies),
        lengths=lengths,
        scores=scores,
        margins=scale * random(examples),
        token_sequence=sequence,
        reference_token_logps=-scale * random(len(sequence)),
        token_extras={"squared_probs": 1 - 0.9 * random(len(sequence))},
        mismatched=scale * (random(3) - 0.4),
        running=torch.tensor(0.1 * scale, dtype=F64),
    )
    return logps, {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def filled(logps, leaves):
    extras = {**logps.token_extras, "reference_kl": leaves["reference_kl"]}
    names = ("policy", "token_logps", "rewards")
    return dataclasses.replace(logps, token_extras=extras, **{name: leaves[name] for name in names})


def shapes(name):
    return {"pairs"} | {get_loss(name).shape}


CASES = [(n, s) for n in [*ON_PAIRS, *UNPAIRED, *ON_LISTS] for s in sorted(shapes(n))]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_gradients_by_finite_differences(name, shape):
    logps, leaves = made(shape)
    # What a loss stops the gradient of would differ: WPO's weights, the chosen side of TDPO2's divergence.
    held = {"wpo": "token_logps", "tdpo2": "reference_kl"}.get(name)
    moved = [key for key in leaves if key != held]
    for options in OPTIONS.get(name, [{}]):

        def loss(*values, options=options):
            return value(name, filled(logps, leaves | dict(zip(moved, values, strict=True))), **options)

        assert torch.autograd.gradcheck(loss, tuple(leaves[key] for key in moved))


def test_wpos_weights_have_no_gradient():
    logps, leaves = made("pairs")
    value("wpo", filled(logps, leaves)).sum().backward()
    assert leaves["token_logps"].grad is None
    assert leaves["policy"].grad.abs().sum() > 0


def test_ktos_estimate_has_no_gradient():
    logps, leaves = made("unpaired")
    mismatched = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    value("kto", dataclasses.replace(filled(logps, leaves), mismatched=mismatched)).sum().backward()
    assert mismatched.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_limits_stay_finite(name, shape, dtype):
    tiny = {"beta": 1e-8} if "beta" in get_loss(name).hyperparameters else {}
    kinds = [{}, {"examples": 1}, {"tokens": 1}, {"labels": 1}, {"labels": 0}, {"labels": 0, "examples": 1}]
    for scale in (0.0, 1e-6, 1.0, 1e4):
        for kind in kinds:
            for options in [tiny, *OPTIONS.get(name, [{}])]:
                logps, leaves = made(shape, dtype=dtype, scale=scale, **kind)
                loss = value(name, filled(logps, leaves), **options)
                assert loss.shape == ((len(logps.example),) if name in UNPAIRED else (logps.num_examples,))
                loss.sum().backward()
                assert torch.isfinite(loss).all(), (scale, kind, options)
                for key, leaf in leaves.items():
                    assert leaf.grad is None or torch.isfinite(leaf.grad).all(), (key, scale, kind, options)


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("labels", [0, 1])
def test_shift_of_a_step_with_one_label_is_finite(name, labels):
    logps, leaves = made("unpaired", examples=1, labels=labels)
    objective = make_objective(name)
    logps = filled(logps, leaves)
    assert torch.isfinite(objective(logps, objective.averaged(logps, ()))).all()


@pytest.mark.parametrize("name", ON_LISTS)
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_in_a_list_changes_nothing(name, ties):
    logps, leaves = made("lists", examples=5)
    logps = filled(logps, leaves)
    if ties:
        reference = (logps.policy - logps.policy.round()).detach()
        logps = dataclasses.replace(logps, scores=(logps.scores * 2).round(), reference=reference)
    # The same replies, each list's read from its end: lists of 4, 2, 3, 1 and 5 as above.
    replies = [(logps.example == e).nonzero().squeeze(1).flip(0) for e in range(5)]
    order = torch.stack([r[slot] for slot in range(5) for r in replies if len(r) > slot])
    fields = {n: getattr(logps, n)[order] for n in ("policy", "reference", "lengths", "scores", "example")}
    torch.testing.assert_close(value(name, dataclasses.replace(logps, **fields)), value(name, logps))


@pytest.mark.parametrize("name", ON_LISTS)
def test_a_list_is_worth_the_same_beside_longer_ones(name):
    logps, leaves = made("lists", examples=5)
    logps = filled(logps, leaves)
    together = value(name, logps)
    for example in range(5):
        own = logps.example == example
        fields = {n: getattr(logps, n)[own] for n in ("policy", "reference", "lengths", "scores")}
        alone = dataclasses.replace(logps, example=logps.example[own] * 0, num_examples=1, **fields)
        torch.testing.assert_close(value(name, alone), together[example : example + 1])


@pytest.mark.parametrize("name", ON_LISTS)
def test_lists_of_two_are_pairs(name):
    logps, leaves = made("pairs")
    logps = filled(logps, leaves)
    torch.testing.assert_close(value(name, dataclasses.replace(logps, shape="lists")), value(name, logps))
    if name == "plackett_luce":
        torch.testing.assert_close(value(name, logps, beta=0.3), dpo(logps, beta=0.3))
    if name == "lipo":
        weight = 1 / math.log(2) - 1 / math.log(3)
        torch.testing.assert_close(value(name, logps, beta=0.3), weight * dpo(logps, beta=0.3))


@pytest.mark.parametrize("name", ["plackett_luce", "lipo"])
def test_a_constant_on_a_lists_replies_changes_nothing(name):
    logps, leaves = made("lists")
    logps = filled(logps, leaves)
    moved = dataclasses.replace(logps, policy=logps.policy + 7 * logps.example)
    torch.testing.assert_close(value(name, moved), value(name, logps))


@pytest.mark.parametrize("name", ["simpo", "wpo", "ld_dpo", "tdpo1", "tdpo2", "bradley_terry"])
def test_a_constant_on_both_replies_changes_nothing(name):
    logps, leaves = made("pairs", tokens=3)
    logps = filled(logps, leaves)
    if name == "ld_dpo":
        moved = dataclasses.replace(logps, token_logps=logps.token_logps + 7)
    else:
        moved = dataclasses.replace(logps, policy=logps.policy + 7, rewards=logps.rewards + 7)
    torch.testing.assert_close(value(name, moved), value(name, logps))


@pytest.mark.parametrize(
    ("unpaired", "paired", "constant"), [("bco", "bco_pair", 0), ("apo_zero_unpaired", "apo_zero", 1)]
)
def test_on_pairs_they_are_half_of_their_paired_forms(unpaired, paired, constant):
    logps, leaves = made("pairs")
    logps = dataclasses.replace(filled(logps, leaves), running=None)
    objective = make_objective({"name": unpaired, "beta": 0.3})
    theirs = make_objective({"name": paired, "beta": 0.3})(logps)
    torch.testing.assert_close(2 * objective(logps), theirs + constant)


@pytest.mark.parametrize(("name", "shape"), [c for c in CASES if c[0] in UNPAIRED + ON_LISTS])
def test_how_a_step_is_cut_changes_nothing(name, shape):
    """Micro-batches of 1, 3 and 4 examples, put together, against their values one by one."""
    parts = []
    for count, seed in [(1, 1), (3, 2), (4, 3)]:
        logps, leaves = made(shape, examples=count, seed=seed)
        parts.append(dataclasses.replace(filled(logps, leaves), running=None))
    whole, objective = concatenate(parts), make_objective(name)
    means = objective.averaged(whole, ())
    # What KTO sees is the step's, whichever micro-batch it came with.
    shared = [dataclasses.replace(part, mismatched=whole.mismatched) for part in parts]
    apart = torch.cat([objective(part, means) for part in shared])
    torch.testing.assert_close(objective(whole, means), apart)
