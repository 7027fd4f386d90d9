"""Losses beside paired ones with a reference: values worked by hand from their papers' equations."""

import dataclasses
import math

import pytest
import torch
from loss_cases import f64, two_pairs, value

from dpo_kit.errors import InputError
from dpo_kit.losses import LogProbs, dpo, make_objective
from dpo_kit.losses.unpaired import reward_shift

F64 = torch.float64


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(**changes):
    # Pair 0: chosen of 2 tokens (-1, -2), rejected of 1 (-0.5). Pair 1: 1 token (-3) and 2 (-1, -1.25).
    fields = {
        "rejected": f64(-0.5, -2.25),
        "reference_chosen": f64(-4, -3.5),
        "reference_rejected": f64(-0.25, -4.25),
        "token_logps": f64(-1, -2, -3, -0.5, -1, -1.25),
        "token_sequence": torch.tensor([0, 0, 1, 2, 3, 3]),
    }
    return two_pairs(**(fields | changes))


def one_list(policy, scores, reference=None, lengths=None):
    count = len(policy)
    return LogProbs(
        f64(*policy),
        torch.zeros(count, dtype=torch.long),
        1,
        "lists",
        reference=f64(*(reference or [0.0] * count)),
        lengths=torch.tensor(lengths or [1] * count),
        scores=f64(*scores),
    )


def test_simpo_by_hand():
    # Per token -1.5 against -0.5, and -3 against -1.125.
    expected = f64(softplus(2 * 1 + 0.5), softplus(2 * 1.875 + 0.5))
    torch.testing.assert_close(value("simpo", pairs(), beta=2.0, gamma=0.5), expected)


def test_alphapo_by_hand_and_at_alpha_0():
    def reward(mean):
        return 2 * (1 - math.exp(mean) ** -0.5) / 0.5

    expected = f64(*(softplus(0.1 + reward(r) - reward(c)) for c, r in [(-1.5, -0.5), (-3, -1.125)]))
    torch.testing.assert_close(value("alphapo", pairs(), beta=2.0, gamma=0.1, alpha=0.5), expected)
    at_0 = value("alphapo", pairs(), beta=2.0, gamma=0.5, alpha=0.0)
    torch.testing.assert_close(at_0, value("simpo", pairs(), beta=2.0, gamma=0.5))
    torch.testing.assert_close(value("alphapo", pairs(), beta=2.0, gamma=0.5, alpha=1e-9), at_0)


def test_cpo_by_hand():
    preference = f64(softplus(0.5 * 2.5), softplus(0.5 * 0.75))
    torch.testing.assert_close(value("cpo", pairs(), beta=0.5), preference + f64(3, 3))
    per_token = value("cpo", pairs(), beta=0.5, likelihood_weight=2.0, per_token=True)
    torch.testing.assert_close(per_token, preference + 2 * f64(1.5, 3))


def test_orpo_by_hand():
    def odds(mean):
        return math.exp(mean) / (1 - math.exp(mean))

    ratios = [odds(-1.5) / odds(-0.5), odds(-3) / odds(-1.125)]
    expected = f64(*(nll - 0.2 * math.log(r / (1 + r)) for nll, r in zip((1.5, 3), ratios, strict=True)))
    torch.testing.assert_close(value("orpo", pairs(), odds_weight=0.2), expected)


def test_kto_by_hand():
    logps = dataclasses.replace(pairs(), mismatched=f64(0.5, -0.1, 0.8))  # mean 0.4
    rewards = [0.5 * (r - 0.4) for r in (1, 0.5, -0.25, 2)]
    expected = f64(
        *(2 * (1 - sigmoid(r)) for r in rewards[:2]), *(3 * (1 - sigmoid(-r)) for r in rewards[2:])
    )
    got = value("kto", logps, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(got, expected)
    negative = dataclasses.replace(logps, mismatched=f64(0.5, -2.0))
    torch.testing.assert_close(value("kto", negative), value("apo_zero_unpaired", logps))
    none = dataclasses.replace(logps, mismatched=f64())
    torch.testing.assert_close(value("kto", none), value("apo_zero_unpaired", logps))


def test_apo_zero_unpaired_is_the_papers_up_to_a_constant():
    chosen, rejected = value("apo_zero_unpaired", pairs(), beta=0.5).chunk(2)
    expected = [1 - sigmoid(0.5 * win) + sigmoid(0.5 * lose) for win, lose in [(1, -0.25), (0.5, 2)]]
    torch.testing.assert_close(chosen + rejected, f64(*expected))


def test_bco_by_hand():
    # Rewards 0.5 and 0.25 for the chosen, -0.125 and 1 for the rejected.
    shift = ((0.5 + 0.25) / 2 + (-0.125 + 1) / 2) / 2
    torch.testing.assert_close(reward_shift(pairs(), beta=0.5), torch.tensor(shift, dtype=F64))
    logps = dataclasses.replace(pairs(), running=torch.tensor(0.3, dtype=F64))
    expected = f64(*(softplus(0.3 - r) for r in (0.5, 0.25)), *(softplus(r - 0.3) for r in (-0.125, 1)))
    torch.testing.assert_close(value("bco", logps, beta=0.5), expected)


def test_bcos_shift_is_a_moving_average():
    objective = make_objective({"name": "bco", "beta": 0.5, "momentum": 0.75})
    first = objective.averaged(pairs(), ())
    assert first == [pytest.approx(0.40625)]
    assert objective.averaged(pairs(chosen=f64(1, 1)), first) == [
        pytest.approx(0.75 * 0.40625 + 0.25 * 1.40625)
    ]
    one_sided = LogProbs.of_pairs(f64(-1.0, -2), reference_chosen=f64(-2.0, -2))
    assert float(reward_shift(one_sided, beta=0.5)) == 0.25


def test_npo_by_hand():
    expected = [2 / 0.5 * math.log(1 + (math.exp(r)) ** 0.5) for r in (-0.25, 2)]
    torch.testing.assert_close(value("npo", pairs(), beta=0.5), f64(0, 0, *expected))
    torch.testing.assert_close(value("npo", pairs(), beta=0.5, retain=2.0), f64(6, 6, *expected))


def test_plackett_luce_by_hand():
    # Log-ratios 1, -1, 2, 0 of the replies ranked second, last, first, third.
    r = [0.5, -0.5, 1.0, 0.0]
    exp = [math.exp(v) for v in r]
    likelihood = exp[2] / sum(exp) * exp[0] / (exp[0] + exp[1] + exp[3]) * exp[3] / (exp[3] + exp[1])
    logps = one_list([-1, -3, -2, -4], [7, -2, 9, 3], [-2, -2, -4, -4])
    torch.testing.assert_close(value("plackett_luce", logps, beta=0.5), f64(-math.log(likelihood)))


def test_plackett_luce_does_not_compare_equals():
    logps = one_list([1, 2, 3], [5, 5, 0])
    expected = math.log1p(math.exp(3 - 1)) + math.log1p(math.exp(3 - 2))
    torch.testing.assert_close(value("plackett_luce", logps, beta=1.0), f64(expected))


def test_lipo_by_hand():
    # Ranked by s: reply 1 first (2), then 0 (1), then 2 (-1).
    logps = one_list([1, 2, -1], [1.0, 0.5, 0.0])
    gain = [2**1.0, 2**0.5, 2**0.0]
    discount = [1 / math.log(1 + 2), 1 / math.log(1 + 1), 1 / math.log(1 + 3)]

    def term(i, j, difference):
        return abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * softplus(-0.5 * difference)

    expected = term(0, 1, -1) + term(0, 2, 2) + term(1, 2, 3)
    torch.testing.assert_close(value("lipo", logps, beta=0.5), f64(expected))


def test_lipo_learns_from_the_first_step_on():
    """All log-ratios are 0 there; places are the labels', so weights and gradients are not all 0."""
    policy = f64(0, 0, 0).requires_grad_()
    logps = dataclasses.replace(one_list([0, 0, 0], [0.0, 1.0, 0.5]), policy=policy)
    value("lipo", logps).sum().backward()
    assert policy.grad[1] < 0 < policy.grad[0]
    with pytest.raises(ValueError, match="scale the scores"):
        value("lipo", one_list([0, 0], [1, 61]))


def test_lipos_ranking_does_not_depend_on_rounding():
    """Log-ratios that should be 0 are ranked as equals, by their scores, whatever is left of them."""
    reference, scores = [-100.0, -80.0, -120.0], [3.0, 1.0, 2.0]

    def moved_by(scale):
        return [r + scale * n for r, n in zip(reference, (-4e-4, 3e-4, 2e-4), strict=True)]

    exact = value("lipo", one_list(reference, scores, reference))
    rounded = value("lipo", one_list(moved_by(1), scores, reference))
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    # What is no rounding counts: 0.02 of 120 nats.
    moved = value("lipo", one_list(moved_by(50), scores, reference))
    assert abs(moved - exact) / exact > 0.05


def test_rrhf_by_hand():
    # Per token -1, -2, -0.5; the order of the scores is 1 > 0 > 2. Violated: 0 and 1, 0 and 2, 1 and 2.
    logps = one_list([-2, -6, -0.5], [2, 3, 1], lengths=[2, 3, 1])
    torch.testing.assert_close(value("rrhf", logps), f64((2 - 1) + (1 - 0.5) + (2 - 0.5) + 6))
    torch.testing.assert_close(value("rrhf", logps, rank_weight=10.0, per_token=True), f64(10 * 3 + 2))
    torch.testing.assert_close(value("rrhf", one_list([-2, -4], [1, 1])), f64(3))


def test_wpo_by_hand():
    extras = {"squared_probs": torch.tensor([0.5, 0.25, 0.8, 0.9, 0.5, 0.75], dtype=F64)}
    logps = dataclasses.replace(pairs(), token_extras=extras)
    chosen = [math.sqrt(math.exp(-1) / 0.5 * math.exp(-2) / 0.25), math.exp(-3) / 0.8]
    rejected = [math.exp(-0.5) / 0.9, math.sqrt(math.exp(-1) / 0.5 * math.exp(-1.25) / 0.75)]
    margins = [1 + 0.25, 0.5 - 2]
    expected = [c * r * softplus(-0.5 * m) for c, r, m in zip(chosen, rejected, margins, strict=True)]
    torch.testing.assert_close(value("wpo", logps, beta=0.5), f64(*expected))
    flat = dataclasses.replace(logps, token_extras={"squared_probs": torch.full((6,), 1e-3, dtype=F64)})
    torch.testing.assert_close(value("wpo", flat, beta=0.5), dpo(logps, beta=0.5))


def test_ld_dpo_by_hand():
    logps = dataclasses.replace(pairs(), reference_token_logps=f64(-3, -1, -3.5, -0.25, -2, -2.25))
    # Token log-ratios: 2, -1 | 0.5 || -0.25 | 1, 1. Second tokens are surplus.
    margins = [2 - 0.3 + 0.25, 0.5 - 1 - 0.3]
    torch.testing.assert_close(
        value("ld_dpo", logps, beta=0.5, alpha=0.3), f64(*(softplus(-0.5 * m) for m in margins))
    )
    torch.testing.assert_close(value("ld_dpo", logps, beta=0.5, alpha=1.0), dpo(logps, beta=0.5))


def test_tdpo_by_hand():
    kl = f64(0.1, 0.2, 0.4, 0.8, 1.6, 3.2).requires_grad_()
    logps = dataclasses.replace(pairs(), token_extras={"reference_kl": kl})
    margins = f64(1.25, -1.5)
    excess = f64(0.8 - 0.3, 4.8 - 0.4)
    expected = torch.log1p(torch.exp(-0.5 * (margins - excess)))
    torch.testing.assert_close(value("tdpo1", logps, beta=0.5), expected)
    second = value("tdpo2", logps, beta=0.5, alpha=0.3)
    torch.testing.assert_close(second, torch.log1p(torch.exp(-0.5 * (margins - 0.3 * excess))))
    second.sum().backward()
    slope = 0.3 * 0.5 * torch.sigmoid(-0.5 * (margins - 0.3 * excess))
    torch.testing.assert_close(kl.grad, torch.cat([f64(0, 0, 0), slope[:1], slope[1:], slope[1:]]).detach())
    torch.testing.assert_close(value("tdpo2", logps, beta=0.5, alpha=0.0), dpo(logps, beta=0.5))


def test_bradley_terry_by_hand():
    logps = dataclasses.replace(pairs(), policy=None, rewards=f64(2, -1, 0.5, 1), margins=f64(1, 3))
    torch.testing.assert_close(value("bradley_terry", logps), f64(softplus(-1.5), softplus(2)))
    both = value("bradley_terry", logps, margin=True, centring=0.1)
    torch.testing.assert_close(both, f64(softplus(-0.5) + 0.1 * 2.5**2, softplus(5)))


def test_kto_of_one_reply_and_of_three():
    """No reply is paired with another of its batch, so none of these sizes is special."""
    one = LogProbs.of_pairs(f64(-1), reference_chosen=f64(-3), mismatched=f64(0.5))
    torch.testing.assert_close(value("kto", one, beta=0.1), f64(sigmoid(-0.15)))
    three = LogProbs.of_pairs(f64(-1, -2, -3), reference_chosen=f64(-3, -2, -1), mismatched=f64(0.5, 1, 0))
    expected = f64(*(sigmoid(-0.1 * (r - 0.5)) for r in (2, 0, -2)))
    torch.testing.assert_close(value("kto", three, beta=0.1), expected)


@pytest.mark.parametrize(
    ("name", "option", "bad"),
    [
        *((n, "beta", 0.0) for n in ("simpo", "alphapo", "cpo", "wpo", "ld_dpo", "tdpo1", "tdpo2")),
        *((n, "beta", 0.0) for n in ("kto", "bco", "apo_zero_unpaired", "npo", "plackett_luce", "lipo")),
        *((n, "gamma", -0.1) for n in ("simpo", "alphapo")),
        *(
            (n, o, -1.0)
            for n in ("kto", "apo_zero_unpaired")
            for o in ("desirable_weight", "undesirable_weight")
        ),
        ("alphapo", "largest", 100.0),
        ("cpo", "likelihood_weight", -1.0),
        ("orpo", "odds_weight", -1.0),
        ("orpo", "smallest", 0.0),
        ("bco", "momentum", 1.0),
        ("npo", "retain", -1.0),
        ("rrhf", "rank_weight", -1.0),
        ("ld_dpo", "alpha", 1.5),
        ("tdpo2", "alpha", -0.5),
        ("bradley_terry", "centring", -1.0),
    ],
)
def test_what_is_out_of_range_is_refused(name, option, bad):
    with pytest.raises(InputError, match=option):
        make_objective({"name": name, option: bad})
