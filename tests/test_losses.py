"""Losses: hand-worked values in fp64, gradients, limits, invariances, and the registry."""

import dataclasses
import math

import pytest
import torch
from datasets import Dataset
from loss_cases import f64, two_pairs

from dpo_kit.errors import InputError
from dpo_kit.losses import (
    LogProbs,
    Objective,
    dpo,
    get_loss,
    log_ratio,
    loss_names,
    make_objective,
    register_loss,
    registry,
    sft,
    unlikelihood,
)
from dpo_kit.losses.inputs import log1mexp

OURS = [name for name in loss_names() if get_loss(name).function.__module__.startswith("dpo_kit.")]


def example(**changes):
    # Pair 0: chosen of 2 tokens (-1, -2), rejected of 1 (-0.5). Pair 1: 1 token (-3) and 2 (-1, -1).
    tokens = {
        "token_logps": f64(-1, -2, -3, -0.5, -1, -1),
        "token_sequence": torch.tensor([0, 0, 1, 2, 3, 3]),
    }
    return two_pairs(**(tokens | changes))


def random_example(pairs=5, dtype=torch.float64, scale=5.0):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 6, (2 * pairs,), generator=generator)
    sequence = torch.repeat_interleave(torch.arange(2 * pairs), lengths)
    tokens = -scale * torch.rand(len(sequence), generator=generator, dtype=torch.float64).to(dtype)
    tokens.requires_grad_()
    sums = torch.zeros(2 * pairs, dtype=dtype).index_add(0, sequence, tokens)
    reference = -scale * 3 * torch.rand(2, pairs, generator=generator, dtype=torch.float64).to(dtype)
    return tokens, LogProbs.of_pairs(
        sums[:pairs], sums[pairs:], reference[0], reference[1], lengths[:pairs], lengths[pairs:],
        margins=torch.zeros(pairs), token_logps=tokens, token_sequence=sequence,
    )  # fmt: skip


def test_dpo_by_hand():
    # Log-ratios 1 and 0 for chosen, -0.25 and 2 for rejected; with beta 0.5 margins 0.625 and -1.
    expected = f64(math.log1p(math.exp(-0.625)), math.log1p(math.exp(1.0)))
    torch.testing.assert_close(dpo(example(), beta=0.5), expected)
    flipped = f64(math.log1p(math.exp(0.625)), math.log1p(math.exp(-1.0)))
    torch.testing.assert_close(dpo(example(), beta=0.5, label_smoothing=0.2), 0.8 * expected + 0.2 * flipped)


def test_dpo_at_the_reference_is_log_2():
    same = example(reference_chosen=f64(-3, -3), reference_rejected=f64(-0.5, -2))
    torch.testing.assert_close(dpo(same, beta=0.1), f64(math.log(2), math.log(2)))


def test_dpo_gradient_is_the_papers():
    """Equation after 7: -beta sigmoid(-margin) (grad log pi(chosen) - grad log pi(rejected))."""
    chosen, rejected = f64(-3, -3).requires_grad_(), f64(-0.5, -2).requires_grad_()
    dpo(example(chosen=chosen, rejected=rejected), beta=0.5).sum().backward()
    weight = torch.sigmoid(-f64(0.625, -1.0))
    torch.testing.assert_close(chosen.grad, -0.5 * weight)
    torch.testing.assert_close(rejected.grad, 0.5 * weight)


def test_dpo_with_smoothing_one_half_does_not_know_the_label():
    given = example()
    swapped = example(
        chosen=given.rejected,
        rejected=given.chosen,
        reference_chosen=given.reference_rejected,
        reference_rejected=given.reference_chosen,
    )
    torch.testing.assert_close(dpo(given, label_smoothing=0.5), dpo(swapped, label_smoothing=0.5))


def test_dpo_ignores_a_constant_on_both_replies():
    moved = example(chosen=example().chosen + 7, rejected=example().rejected + 7)
    torch.testing.assert_close(dpo(moved), dpo(example()))


def test_sft_by_hand():
    torch.testing.assert_close(sft(example()), f64(1.5, 3))
    torch.testing.assert_close(sft(example(), per_token=False), f64(3, 3))


def test_log_ratio_by_hand():
    torch.testing.assert_close(log_ratio(example(), alpha=0.5), f64(3 - 0.25, 3 - 1))


def test_unlikelihood_by_hand():
    # -log(1 - exp(-0.5)) = 0.932752..., -log(1 - exp(-1)) = 0.458675...
    first, second = -math.log(1 - math.exp(-0.5)), -2 * math.log(1 - math.exp(-1))
    torch.testing.assert_close(unlikelihood(example(), alpha=0.25), f64(3 + 0.25 * first, 3 + 0.25 * second))
    torch.testing.assert_close(unlikelihood(example(), alpha=0.0), f64(3, 3))


def test_log1mexp_is_exact_at_both_ends():
    x = f64(-1e-12, -0.5, -0.69, -0.70, -3, -50)
    expected = f64(*(math.log(-math.expm1(v)) for v in x[:3].tolist()),
                   *(math.log1p(-math.exp(v)) for v in x[3:].tolist()))  # fmt: skip
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(log1mexp, f64(-1e-3, -0.5, -2, -9).requires_grad_())


@pytest.mark.parametrize("name", ["dpo", "sft", "unlikelihood", "log_ratio"])
def test_gradients_by_finite_differences(name):
    tokens, _ = random_example()

    def value(tokens):
        _, logps = random_example()
        sums = torch.zeros(10, dtype=torch.float64).index_add(0, logps.token_sequence, tokens)
        return get_loss(name).function(dataclasses.replace(logps, policy=sums, token_logps=tokens))

    assert torch.autograd.gradcheck(value, (tokens,))


@pytest.mark.parametrize("name", ["dpo", "sft", "unlikelihood", "log_ratio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_limits_stay_finite(name, dtype, scale):
    tokens, logps = random_example(dtype=dtype, scale=scale)
    loss = get_loss(name).function(logps)
    assert loss.shape == (5,)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(tokens.grad).all()


def test_objective_is_a_weighted_sum():
    objective = make_objective([{"name": "dpo", "beta": 0.5}, {"name": "sft", "weight": 0.2}])
    torch.testing.assert_close(objective(example()), dpo(example(), beta=0.5) + 0.2 * sft(example()))
    assert objective.needs_reference
    assert objective.needs_rejected
    assert objective.beta == 0.5
    alone = make_objective("sft")
    assert not alone.needs_reference
    assert not alone.needs_rejected


def test_a_weight_of_0_is_one():
    objective = make_objective([{"name": "dpo"}, {"name": "sft", "weight": 0}])
    torch.testing.assert_close(objective(example()), dpo(example()))


def test_the_first_terms_beta_says_whether_rewards_are_per_token():
    per_token = {name for name in OURS if make_objective(name).per_token}
    assert {"simpo", "alphapo", "ipo", "dpo_norm", "orpo", "rrhf"} <= per_token
    assert not {"dpo", "cpo", "ipo_raw", "sft", "kto", "bradley_terry"} & per_token
    assert make_objective([{"name": "sft"}, {"name": "simpo"}]).per_token
    assert not make_objective([{"name": "dpo"}, {"name": "simpo"}]).per_token
    assert make_objective([{"name": "sft"}, {"name": "orpo"}]).per_token


def test_which_losses_need_margins():
    assert {name for name in OURS if make_objective(name).needs_margins} == {"odpo", "reward_aware_dpo"}
    assert make_objective({"name": "bradley_terry", "margin": True}).needs_margins
    assert make_objective([{"name": "dpo"}, {"name": "odpo"}]).needs_margins


def rows(**columns):
    return Dataset.from_dict({"prompt": ["a", "b"], "source": ["f:1", "f:2"], **columns})


@pytest.mark.parametrize("columns", [{}, {"margin": [None, None]}])
def test_data_without_margins_are_refused_where_a_loss_needs_them(columns):
    make_objective("dpo").check_data(rows(**columns))
    make_objective("bradley_terry").check_data(rows(**columns))
    with pytest.raises(InputError, match=r"field 'data\.train': 'odpo' needs margins, and no row has one"):
        make_objective([{"name": "dpo"}, {"name": "odpo"}]).check_data(rows(**columns))
    with pytest.raises(InputError, match=r"or set loss\.margin to false"):
        make_objective({"name": "bradley_terry", "margin": True}).check_data(rows(**columns))


def test_a_margin_must_be_finite():
    make_objective("odpo").check_data(rows(margin=[None, 1.0]))
    with pytest.raises(InputError, match=r"f:2: field 'margin': a margin must be a finite number, got nan"):
        make_objective("odpo").check_data(rows(margin=[1.0, float("nan")]))
    with pytest.raises(InputError, match=r"f:1: field 'margin': .* got 'much'"):
        make_objective("odpo").check_data(rows(margin=["much", "more"]))


def test_scores_that_lipo_cannot_take_are_refused_before_training():
    make_objective("plackett_luce").check_data(rows(scores=[[1.0, 0.0], [1.0, 61.0]]))
    with pytest.raises(InputError, match=r"f:2: field 'scores': .*one is 61\.0, above 60"):
        make_objective("lipo").check_data(rows(scores=[[60.0, 0.0], [1.0, 61.0]]))


def test_terms_do_not_see_each_others_running_means():
    seen = []

    def looks(logps):
        seen.append(logps.running)
        return logps.chosen

    bco = make_objective("bco_pair")
    objective = Objective((*bco.terms, (dataclasses.replace(get_loss("sft"), function=looks), 1.0, {})))
    objective(example(), [0.5, None])
    assert seen == [None]


def test_a_loss_of_ones_own(monkeypatch):
    # Other tests know the package's own.
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    name = "test_margin"

    @register_loss(name)
    def margin(logps, *, beta=2.0):
        return beta * (logps.rejected_logratios - logps.chosen_logratios)

    torch.testing.assert_close(make_objective({"name": name, "beta": 3})(example()), f64(-3.75, 6))
    with pytest.raises(ValueError, match="registered already"):
        register_loss("dpo")(lambda logps: logps.chosen)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "dpoo"}, "unknown loss 'dpoo'. Did you mean 'dpo'?"),
        ({"name": "dpo", "bta": 1}, "'dpo' has no such hyper-parameter. Did you mean 'beta'?"),
        ({"name": "dpo", "beta": -1}, "beta must be positive, got -1"),
        ({"name": "dpo", "beta": "1e-5"}, "expected a number, got '1e-5'"),
        ({"name": "dpo", "label_smoothing": 0.7}, "label_smoothing must lie in"),
        ({"name": "unlikelihood", "alpha": 2}, "alpha must lie in"),
        ({"name": "f_dpo", "divergence": 1}, "expected a word such as 'reverse_kl', got 1"),
        ({"name": "f_dpo", "divergence": "kl"}, "divergence must be one of reverse_kl"),
        ({"name": "rrhf", "per_token": "no"}, "field 'loss.per_token': expected true or false, got 'no'"),
        ({"name": "bradley_terry", "margin": 1}, "expected true or false, got 1"),
        ({"name": "dpo", "beta": True}, "expected a number, got True"),
        ({"name": "dpo", "weight": -1}, "field 'loss.weight': a weight must be 0 or more, got -1"),
        ({"name": "dpo", "weight": float("inf")}, "expected a number, got inf"),
        (
            [{"name": "dpo"}, {"name": "bradley_terry"}],
            "field 'loss': 'bradley_terry' trains a reward model, and 'dpo' the log-probs of a causal LM",
        ),
        ({"beta": 1}, "a loss needs a name"),
        ([], "no loss is given"),
    ],
)
def test_a_wrong_loss_is_named(loss, message):
    with pytest.raises(InputError, match=r".") as caught:
        make_objective(loss)
    assert message in str(caught.value)


def test_a_loss_without_its_input_says_which():
    with pytest.raises(ValueError, match="reference"):
        dpo(LogProbs.of_pairs(f64(-1), f64(-2)))
