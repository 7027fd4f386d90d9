"""Losses on pairs with a reference: worked values in fp64, gradients, limits, invariances, equalities."""

import dataclasses
import itertools
import math

import pytest
import torch
from loss_cases import f64, two_pairs, value

from dpo_kit.errors import InputError
from dpo_kit.losses import LogProbs, get_loss, loss_names, make_objective

FAMILIES = ("logistic", "surrogates", "regression", "anchored", "offsets", "divergences", "batchwise")
NAMES = [name for name in loss_names() if get_loss(name).family in FAMILIES]


def example(**changes):
    return two_pairs(**({"margins": f64(4, 0), "running": f64(0.5)[0]} | changes))


def swapped(given):
    return example(
        chosen=given.rejected,
        rejected=given.chosen,
        reference_chosen=given.reference_rejected,
        reference_rejected=given.reference_chosen,
    )


def random_example(pairs=5):
    draw = torch.Generator().manual_seed(5)
    logps = -9 * torch.rand(4, pairs, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, 6, (2, pairs), generator=draw)
    margins = torch.rand(pairs, generator=draw, dtype=torch.float64)
    return LogProbs.of_pairs(*logps, *lengths, margins=margins, running=f64(0.3)[0])


def nls(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def sig(x):
    return 1 / (1 + math.exp(-x))


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def js_slope(x):
    return math.log(2 * math.exp(x) / (1 + math.exp(x)))


# With beta 0.5 the rewards are 0.5 and 0 (chosen), -0.125 and 1 (rejected), their margins 0.625 and -1.
WORKED = [
    ("dpo", {"beta": 0.5}, {}, (nls(0.625), nls(-1))),
    (
        "cdpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        {},
        (0.8 * nls(0.625) + 0.2 * nls(-0.625), 0.8 * nls(-1) + 0.2 * nls(1)),
    ),
    (
        "robust_dpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        {},
        ((0.8 * nls(0.625) - 0.2 * nls(-0.625)) / 0.6, (0.8 * nls(-1) - 0.2 * nls(1)) / 0.6),
    ),
    # The scores' margins are 4 and 0, so that the labels are sigmoid(2) and 1/2.
    (
        "reward_aware_dpo",
        {"beta": 0.5, "scale": 0.5},
        {},
        (kl(sig(2), sig(0.625)), kl(0.5, sig(-1))),
    ),
    (
        "reward_aware_dpo",
        {"beta": 0.5, "scale": 0.5, "distance": "forward_kl"},
        {},
        (kl(sig(0.625), sig(2)), kl(sig(-1), 0.5)),
    ),
    ("reward_aware_dpo", {"beta": 0.5, "scale": 0.5, "distance": "squared"}, {}, (1.375**2, 1)),
    # Per token 0.5 and 0, -0.25 and 1.
    ("dpo_norm", {"beta": 2.0}, {}, (nls(1.5), nls(-2))),
    ("hinge", {"beta": 0.5}, {}, (0.375, 2)),
    ("hinge", {"beta": 2.0}, {}, (0, 5)),
    ("exo", {"beta": 0.5, "label_smoothing": 0.1}, {}, (kl(sig(0.625), 0.9), kl(sig(-1), 0.9))),
    (
        "discopop",
        {"beta": 0.5, "tau": 0.25},
        {},
        (
            (1 - sig(2.5)) * nls(0.625) + sig(2.5) * math.exp(-0.625),
            (1 - sig(-4)) * nls(-1) + sig(-4) * math.exp(1),
        ),
    ),
    ("ipo", {"beta": 0.25}, {}, (1.25**2, 9)),
    ("ipo_raw", {"beta": 0.25}, {}, (0.75**2, 16)),
    ("sppo", {"beta": 0.25}, {}, (1 + 1.75**2, 4 + 16)),
    ("cal_dpo", {"beta": 0.25}, {}, (1 + 1.75**2 + nls(1.25), 4 + 16 + nls(-2))),
    (
        "nca",
        {"beta": 0.5},
        {},
        (nls(0.5) + 0.5 * nls(-0.5) + 0.5 * nls(0.125), 1.5 * math.log(2) + 0.5 * nls(-1)),
    ),
    # Shifted by 0.5 nats: 0.5 and -0.5 (chosen), -0.75 and 1.5 (rejected).
    ("bco_pair", {"beta": 0.5}, {}, (nls(0.25) + nls(0.375), nls(-0.25) + nls(-0.75))),
    ("apo_zero", {"beta": 0.5}, {}, (sig(-0.125) - sig(0.5), sig(1) - 0.5)),
    ("apo_down", {"beta": 0.5}, {}, (sig(0.5) - sig(0.625), 0.5 - sig(-1))),
    ("r_dpo", {"beta": 0.5, "alpha": 0.1}, {}, (nls(0.725), nls(-1.1))),
    ("odpo", {"beta": 0.5, "alpha": 0.5}, {}, (nls(0.625 - math.log(2)), nls(-1))),
    (
        "odpo",
        {"beta": 0.5, "alpha": 0.25, "scaling": "identity"},
        {"margins": f64(4, -2)},
        (nls(-0.375), nls(-0.5)),
    ),
    # The second chosen reply is half a nat less likely than under the reference: margin -2.5 - 3 * 0.5.
    (
        "dpop",
        {"beta": 0.5, "penalty": 3.0},
        {"reference_chosen": f64(-4, -2.5)},
        (nls(0.625), nls(-2)),
    ),
    ("rpo", {"beta": 0.5, "alpha": 0.2}, {}, (nls(0.625) + 0.3, nls(-1) + 0.6)),
    ("f_dpo", {"beta": 0.5}, {}, (nls(0.625), nls(-1))),
    (
        "f_dpo",
        {"beta": 0.5, "divergence": "forward_kl"},
        {},
        (nls(0.5 * (math.exp(0.25) - math.exp(-1))), nls(0.5 * (math.exp(-2) - 1))),
    ),
    (
        "f_dpo",
        {"beta": 0.5, "divergence": "js"},
        {},
        (nls(0.5 * (js_slope(1) - js_slope(-0.25))), nls(0.5 * (js_slope(0) - js_slope(2)))),
    ),
    (
        "f_dpo",
        {"beta": 0.5, "divergence": "alpha", "alpha": 0.25},
        {},
        (nls(2 * (math.exp(0.0625) - math.exp(-0.25))), nls(2 * (math.exp(-0.5) - 1))),
    ),
    # Policy -2.5 < -1, reference -3.75 > -4: ranks meet crosswise.
    ("aot", {"beta": 0.5}, {"reference_chosen": f64(-4, -8)}, (nls(0.75), nls(1.375))),
    # Chosen 1 > 0, rejected -0.25 < 2: 1 meets 2, and 0 meets -0.25.
    ("aot_unpaired", {"beta": 0.5}, {}, (nls(-0.5), nls(0.125))),
    # The mean margin is -0.375, half a nat below 0.125: b = 0.5 (1 + 0.4 * 0.5 * -0.5) = 0.45.
    ("beta_dpo", {"beta": 0.5, "alpha": 0.4}, {"running": f64(0.125)[0]}, (nls(0.5625), nls(-0.9))),
    (
        "beta_dpo",
        {"beta": 0.5, "smallest_beta": 0.1},
        {"running": f64(100)[0]},
        (nls(0.125), nls(-0.2)),
    ),
]


@pytest.mark.parametrize(("name", "options", "changes", "expected"), WORKED)
def test_worked_values(name, options, changes, expected):
    torch.testing.assert_close(value(name, example(**changes), **options), f64(*expected))


def test_every_loss_is_worked():
    assert {name for name, *_ in WORKED} == set(NAMES)
    assert all(get_loss(name).title and get_loss(name).paper for name in NAMES)


# beta_dpo is looked at below: its beta moves with the log-probs, and carries no gradient.
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES if name not in ("beta_dpo", "f_dpo")]
    + [("f_dpo", {"divergence": divergence}) for divergence in ("reverse_kl", "forward_kl", "js", "alpha")]
    + [("f_dpo", {"divergence": "forward_kl", "largest_exponent": 1.0})],
)
def test_gradients_by_finite_differences(name, options):
    given = random_example()

    def loss(policy):
        return value(name, dataclasses.replace(given, policy=policy), **options)

    assert torch.autograd.gradcheck(loss, (given.policy.requires_grad_(),))


def test_gradient_of_beta_dpo_is_that_of_dpo_with_the_steps_beta():
    given = random_example()
    margin = given.chosen_logratios - given.rejected_logratios
    dynamic = 0.1 * (1 + 0.6 * 0.1 * (float(margin.mean()) - 0.3))
    policy = given.policy.requires_grad_()
    ours = torch.autograd.grad(value("beta_dpo", given).sum(), policy)
    torch.testing.assert_close(ours, torch.autograd.grad(value("dpo", given, beta=dynamic).sum(), policy))


EXTREMES = (-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4)
VARIANTS = [(name, {}) for name in NAMES] + [
    ("f_dpo", {"divergence": "forward_kl"}),
    ("f_dpo", {"divergence": "forward_kl", "largest_exponent": 60.0}),
    ("f_dpo", {"divergence": "js"}),
    ("f_dpo", {"divergence": "alpha"}),
    ("f_dpo", {"divergence": "alpha", "alpha": 1e-6}),
    ("odpo", {"scaling": "identity"}),
    ("reward_aware_dpo", {"distance": "forward_kl"}),
    ("reward_aware_dpo", {"distance": "squared"}),
    ("discopop", {"tau": 1.0}),
    ("dpo", {"label_smoothing": 0.5}),
]


def with_logratios(chosen, rejected, dtype):
    """Single-token pairs of these log-ratios; all log-probs are at most 0."""
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    policy = torch.cat([chosen, rejected]).clamp(max=0).sub(1).to(dtype).requires_grad_()
    pairs = len(chosen)
    one = torch.ones(pairs, dtype=torch.long)
    reference = [(-logratio).clamp(max=0).sub(1).to(dtype) for logratio in (chosen, rejected)]
    return policy, LogProbs.of_pairs(
        policy[:pairs], policy[pairs:], *reference, one, one, margins=chosen - rejected
    )


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [1e-12, None, 10.0])
def test_limits_stay_finite(name, options, dtype, beta):
    if beta is not None:
        options = options | {"beta": beta} | ({"smallest_beta": beta} if name == "beta_dpo" else {})
    objective = make_objective({"name": name, **options})
    every = list(itertools.product(EXTREMES, EXTREMES))
    for batch in (every, *([pair] for pair in every)):
        policy, logps = with_logratios(*map(list, zip(*batch, strict=True)), dtype)
        loss = objective(logps)
        assert loss.shape == (len(batch),)
        assert torch.isfinite(loss).all()
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name",
    ["dpo", "cdpo", "robust_dpo", "hinge", "exo", "discopop", "ipo_raw", "r_dpo", "odpo", "reward_aware_dpo",
     "f_dpo", "aot", "aot_unpaired", "beta_dpo"],
)  # fmt: skip
def test_a_constant_on_both_replies_changes_nothing(name):
    given = example()
    moved = example(chosen=given.chosen + 7, rejected=given.rejected + 7)
    torch.testing.assert_close(value(name, moved), value(name, given))


@pytest.mark.parametrize("name", ["dpo", "cdpo", "exo"])
def test_smoothing_one_half_does_not_know_the_label(name):
    given = random_example()
    torch.testing.assert_close(
        value(name, swapped(given), label_smoothing=0.5), value(name, given, label_smoothing=0.5)
    )


def test_robust_dpo_is_without_bias():
    """Its mean over labels flipped with probability e is the loss on the true labels."""
    given = random_example()
    options = {"beta": 0.3, "label_smoothing": 0.2}
    mean = 0.8 * value("robust_dpo", given, **options) + 0.2 * value("robust_dpo", swapped(given), **options)
    torch.testing.assert_close(mean, value("dpo", given, beta=0.3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0}),
        ("robust_dpo", {"label_smoothing": 0}),
        ("f_dpo", {}),
        ("r_dpo", {"alpha": 0}),
        ("odpo", {"alpha": 0}),
        ("dpop", {"penalty": 0}),
        ("rpo", {"alpha": 0}),
        ("beta_dpo", {"alpha": 0}),
    ],
)
def test_without_its_term_it_is_dpo(name, options):
    given = random_example()
    torch.testing.assert_close(value(name, given, beta=0.2, **options), value("dpo", given, beta=0.2))


def test_lengths_of_one_change_nothing():
    one = torch.ones(2, dtype=torch.long)
    given = example(chosen_lengths=one, rejected_lengths=one)
    torch.testing.assert_close(value("dpo_norm", given, beta=0.2), value("dpo", given, beta=0.2))
    torch.testing.assert_close(value("ipo", given), value("ipo_raw", given))
    torch.testing.assert_close(value("r_dpo", given), value("dpo", given))


def test_alpha_divergence_lies_between_the_two_kls():
    given = example()
    for alpha, limit in ((1e-9, "reverse_kl"), (1 - 1e-9, "forward_kl")):
        near = value("f_dpo", given, divergence="alpha", alpha=alpha)
        torch.testing.assert_close(near, value("f_dpo", given, divergence=limit), rtol=1e-7, atol=0)


def test_f_dpo_goes_on_along_the_tangent():
    """With largest_exponent 2, -1 / u is -e^2 (1 + 3) at log u = -5, and -1 at log u = 0."""
    given = example(
        chosen=f64(-1, -6), reference_chosen=f64(-1, -1), rejected=f64(-6, -1), reference_rejected=f64(-1, -1)
    )
    loss = value("f_dpo", given, beta=0.1, divergence="forward_kl", largest_exponent=2.0)
    margin = 0.1 * (4 * math.exp(2) - 1)
    torch.testing.assert_close(loss, f64(nls(margin), nls(-margin)))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo"])
def test_a_batch_of_one_is_dpo(name):
    given = random_example(pairs=1)
    torch.testing.assert_close(make_objective(name)(given), make_objective("dpo")(given))


def test_bco_of_one_pair_halves_the_margin():
    """The shift lies in the middle of the two rewards, so that both are half their margin off it."""
    given = random_example(pairs=1)
    torch.testing.assert_close(make_objective("bco_pair")(given), 2 * value("dpo", given, beta=0.005))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_follows_a_permutation_of_the_pairs(name):
    given = random_example()
    order = torch.tensor([3, 0, 4, 1, 2])
    both = torch.cat([order, order + 5])
    moved = dataclasses.replace(given, policy=given.policy[both], reference=given.reference[both])
    torch.testing.assert_close(value(name, moved), value(name, given)[order])


def test_unpaired_aot_does_not_know_who_belongs_to_whom():
    given = random_example()
    both = torch.cat([torch.arange(5), torch.tensor([8, 5, 9, 6, 7])])
    moved = dataclasses.replace(given, policy=given.policy[both], reference=given.reference[both])
    torch.testing.assert_close(value("aot_unpaired", moved), value("aot_unpaired", given))


@pytest.mark.parametrize(
    ("name", "first", "second"), [("bco_pair", 0.6875, 4.6875), ("beta_dpo", -0.375, -0.375)]
)
def test_running_means(name, first, second):
    """Mean log-ratio (1 + 0 - 0.25 + 2) / 4, mean margin (1.25 - 2) / 2; then with 4 nats on both replies."""
    given = example()
    later = example(chosen=given.chosen + 4, rejected=given.rejected + 4)
    objective = make_objective({"name": name, "momentum": 0.75})
    assert objective.couples_examples
    before = objective.averaged(given, ())
    assert before == [pytest.approx(first)]
    assert objective.averaged(later, before) == [pytest.approx(0.75 * first + 0.25 * second)]


@pytest.mark.parametrize(
    ("loss", "message"),
    [(name, "beta must be positive, got 0") for name in NAMES]
    + [
        ({"name": "cdpo", "label_smoothing": 0.6}, "label_smoothing must lie in [0, 0.5]"),
        ({"name": "robust_dpo", "label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5)"),
        ({"name": "exo", "label_smoothing": 0}, "label_smoothing must lie in (0, 0.5]"),
        ({"name": "discopop", "tau": 1.5}, "tau must lie in (0, 1]"),
        ({"name": "bco_pair", "momentum": 1}, "momentum must lie in [0, 1)"),
        ({"name": "r_dpo", "alpha": -1}, "alpha must not be negative"),
        ({"name": "odpo", "scaling": "sqrt"}, "scaling must be 'log' or 'identity'"),
        ({"name": "reward_aware_dpo", "scale": 0}, "scale must be positive"),
        ({"name": "reward_aware_dpo", "distance": "l1"}, "distance must be 'backward_kl', 'forward_kl'"),
        ({"name": "dpop", "penalty": -1}, "penalty must not be negative"),
        ({"name": "rpo", "alpha": -0.1}, "alpha must not be negative"),
        ({"name": "f_dpo", "divergence": "hellinger"}, "divergence must be one of reverse_kl, forward_kl"),
        ({"name": "f_dpo", "divergence": "alpha", "alpha": 1}, "alpha must lie in (0, 1)"),
        ({"name": "f_dpo", "largest_exponent": 100}, "largest_exponent must lie in (0, 60]"),
        ({"name": "beta_dpo", "momentum": -0.1}, "momentum must lie in [0, 1)"),
        ({"name": "beta_dpo", "smallest_beta": 0.2}, "smallest_beta must lie in (0, beta]"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(loss, message):
    with pytest.raises(InputError) as caught:
        make_objective({"name": loss, "beta": 0} if isinstance(loss, str) else loss)
    assert message in str(caught.value)
