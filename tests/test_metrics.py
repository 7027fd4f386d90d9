"""Metrics by hand, their means over any cut, and the warning of displacement on made-up curves."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_kit.losses import LogProbs
from dpo_kit.losses.inputs import concatenate
from dpo_kit.metrics import Counted, DisplacementWatch, WeightedMeans, pair_metrics


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def pairs(**others):
    """Three pairs whose log-ratios are (1, -1), (-2, -4) and (0.5, 0.5)."""
    return LogProbs.of_pairs(
        tensor(-9, -12, -5.5),
        tensor(-21, -24, -7.5),
        tensor(-10, -10, -6),
        tensor(-20, -20, -8),
        torch.tensor([4, 10, 3]),
        torch.tensor([8, 5, 3]),
        **others,
    )


LOSSES = tensor(0.3, 0.6, 0.9)
BETA = 0.5


def means(logps, losses=LOSSES, beta=BETA, weights=None):
    running = WeightedMeans()
    weights = torch.ones(logps.num_examples) if weights is None else weights
    running.add(pair_metrics(logps, losses, beta), weights)
    return running.means()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_pairs_with_a_reference_by_hand():
    expected = {
        "loss": 0.6,
        "logps/chosen": -26.5 / 3,
        "logps/rejected": -52.5 / 3,
        "logratios/chosen": (1 - 2 + 0.5) / 3,
        "logratios/rejected": (-1 - 4 + 0.5) / 3,
        "logratios/chosen_per_token": (1 - 2 + 0.5) / (4 + 10 + 3),
        "kl/implicit": (0 + 3 - 0.5) / 3,
        "rewards/chosen": 0.5 * (1 - 2 + 0.5) / 3,
        "rewards/rejected": 0.5 * (-1 - 4 + 0.5) / 3,
        # margins: 1, 1 and 0
        "rewards/margins": 2 / 3,
        "rewards/accuracies": (1 + 1 + 0.5) / 3,
        # The second pair's chosen reply has 10 tokens and its rejected one 5; the third pair's have 3.
        "rewards/margins_chosen_longer": 1.0,
        "rewards/accuracies_chosen_longer": 1.0,
        "rewards/margins_chosen_shorter": 1.0,
        "rewards/accuracies_chosen_shorter": 1.0,
        "gradient_weight": (2 * sigmoid(-1) + 0.5) / 3,
        "saturated": 0.0,
        "displaced": 1 / 3,
    }
    assert means(pairs()) == pytest.approx(expected, rel=1e-6)


def test_a_large_margin_is_saturated():
    # beta times a difference of 2: sigmoid(-4.5) is above one hundredth, sigmoid(-4.7) below.
    assert means(pairs(), beta=2.25)["saturated"] == 0
    assert means(pairs(), beta=2.35)["saturated"] == pytest.approx(2 / 3)


def test_pairs_without_a_reference_or_lengths():
    found = means(LogProbs.of_pairs(tensor(-1, -2), tensor(-3, -2)), tensor(0, 1), beta=2.0)
    expected = {
        "loss": 0.5,
        "logps/chosen": -1.5,
        "logps/rejected": -2.5,
        "rewards/chosen": -3.0,
        "rewards/rejected": -5.0,
        "rewards/margins": 2.0,
        "rewards/accuracies": 0.75,
    }
    assert found == pytest.approx(expected)


def test_rewards_of_a_loss_per_token_by_hand():
    found = pair_metrics(pairs(), LOSSES, BETA, per_token=True)
    # Log-ratios over tokens: (1/4, -1/8), (-2/10, -4/5) and (0.5/3, 0.5/3).
    assert found["rewards/margins"].tolist() == pytest.approx([0.5 * 3 / 8, 0.5 * 0.6, 0])
    assert found["rewards/chosen"].values.tolist() == pytest.approx([0.125, -0.1, 0.5 / 6])
    weights = [sigmoid(-0.5 * 3 / 8), sigmoid(-0.3), 0.5]
    assert found["gradient_weight"].tolist() == pytest.approx(weights)
    summed = pair_metrics(pairs(), LOSSES, BETA)
    assert torch.equal(found["logratios/chosen"].values, summed["logratios/chosen"].values)
    assert found["displaced"].tolist() == summed["displaced"].tolist() == [0, 1, 0]
    # Without a reference, SimPO's: -9/4 + 21/8, -12/10 + 24/5, -5.5/3 + 7.5/3.
    alone = pair_metrics(replace(pairs(), reference=None), LOSSES, 2.0, per_token=True)
    assert alone["rewards/margins"].tolist() == pytest.approx([0.75, 7.2, 4 / 3])


def test_what_rounding_makes_of_equal_log_probs_is_a_tie():
    # Margins of the size of rounding, and one five times as large: 1e-6 (100 + 50) = 1.5e-4.
    logps = LogProbs.of_pairs(
        tensor(-100.00009, -99.99991, -100.0005),
        tensor(-50, -50, -50.00125),
        tensor(-100, -100, -100),
        tensor(-50, -50, -50),
    )
    found = pair_metrics(logps, LOSSES, BETA)
    assert found["rewards/accuracies"].tolist() == [0.5, 0.5, 1]
    assert found["displaced"].tolist() == [0, 0, 1]
    # The same replies with labels: the desirable -100 +- 9e-5 may lie as far from the reference by rounding.
    unpaired = replace(logps, shape="unpaired", example=torch.arange(6), num_examples=6)
    accuracies = pair_metrics(unpaired, torch.zeros(6), BETA)["rewards/accuracies"].values
    assert accuracies.tolist() == [0.5, 0.5, 0, 0.5, 0.5, 1]
    # And as lists: the first two of equals.
    listed = pair_metrics(replace(logps, shape="lists"), LOSSES, BETA)
    assert listed["rewards/accuracies"].values.tolist() == [0.5, 0.5, 1]
    assert listed["rewards/top1"].values.tolist() == [0.5, 0.5, 1]
    # A reward model has no log-probs, and no rounding of that kind.
    model = replace(logps, policy=None, reference=None, rewards=tensor(1e-5, 0, 0, 0, 0, 1e-5))
    assert pair_metrics(model, LOSSES, BETA)["rewards/accuracies"].tolist() == [1, 0.5, 0]


def test_weights_count():
    weights = torch.tensor([1.0, 3.0, 0.0])
    found = means(pairs(), weights=weights)
    assert found["loss"] == pytest.approx((0.3 + 3 * 0.6) / 4)
    assert found["logratios/chosen_per_token"] == pytest.approx((1 - 3 * 2) / (4 + 3 * 10))
    assert found["displaced"] == pytest.approx(3 / 4)


def test_a_stratum_with_nobody_in_it_is_left_out():
    logps = replace(pairs(), lengths=torch.tensor([4, 10, 3, 8, 12, 3]))
    found = means(logps)
    assert not any(name.endswith("longer") for name in found)
    assert found["rewards/margins_chosen_shorter"] == pytest.approx(1.0)
    assert set(pair_metrics(logps, LOSSES, BETA)) == set(pair_metrics(pairs(), LOSSES, BETA))


def test_unpaired_replies_by_hand():
    # Desirable with log-ratios 2, -1 and 0, undesirable with -3 and 4.
    logps = LogProbs(
        policy=tensor(-8, -11, -10, -13, -6),
        reference=tensor(-10, -10, -10, -10, -10),
        example=torch.arange(5),
        num_examples=5,
        shape="unpaired",
        lengths=torch.tensor([2, 4, 6, 1, 1]),
        scores=tensor(1, 1, 1, 0, 0),
    )
    expected = {
        "loss": 3.0,
        "logps/chosen": -29 / 3,
        "logps/rejected": -9.5,
        "logratios/chosen": 1 / 3,
        "logratios/rejected": 0.5,
        "logratios/chosen_per_token": 1 / 12,
        "kl/implicit": -2 / 5,
        "rewards/chosen": 0.1 / 3,
        "rewards/rejected": 0.05,
        # right, wrong, neither, right, wrong
        "rewards/accuracies": 2.5 / 5,
    }
    assert means(logps, tensor(1, 2, 3, 4, 5), beta=0.1) == pytest.approx(expected, rel=1e-6)
    desirable = replace(logps, scores=tensor(1, 1, 1, 1, 1))
    assert not any("rejected" in name for name in means(desirable, tensor(1, 2, 3, 4, 5)))


def test_replies_alone_have_no_rewards():
    logps = LogProbs.of_pairs(tensor(-1, -2), chosen_lengths=torch.tensor([1, 2]))
    assert means(logps, tensor(1, 2)) == pytest.approx({"loss": 1.5, "logps/chosen": -1.5})


def lists(**others):
    """Three replies (scores 2, 1, 1; log-ratios 1, 3, -1) and four (0, 5, 5, 2; 1, 0, 4, 4), slot by slot."""
    fields = {
        "policy": tensor(1, 1, 3, 0, -1, 4, 4),
        "reference": tensor(0, 0, 0, 0, 0, 0, 0),
        "example": torch.tensor([0, 1, 0, 1, 0, 1, 1]),
        "num_examples": 2,
        "shape": "lists",
        "scores": tensor(2, 0, 1, 5, 1, 5, 2),
    }
    return LogProbs(**fields | others)


def test_ranked_lists_by_hand():
    found = means(lists(), tensor(1, 2), beta=1.0)
    expected = {
        "loss": 1.5,
        "logps/chosen": (1 + 2) / 2,
        "logps/rejected": (1 + 1) / 2,
        "logratios/chosen": (1 + 2) / 2,
        "logratios/rejected": (1 + 1) / 2,
        "kl/implicit": (-1 - 9 / 4) / 2,
        "rewards/chosen": (1 + 2) / 2,
        "rewards/rejected": (1 + 1) / 2,
        "rewards/margins": (0 + 1) / 2,
        # First list: 1 > 3 wrong, 1 > -1 right. Second: 0 > 1 wrong, 0 > 4 wrong, 4 > 1 right, 4 > 4 a tie,
        # and the reply of score 2 against that of score 0, 4 > 1, right.
        "rewards/accuracies": (1 / 2 + 2.5 / 5) / 2,
        # First list: 3 is highest and not the best. Second: two are highest, one of them is a best one.
        "rewards/top1": (0 + 0.5) / 2,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_list_of_equals_is_not_ranked():
    logps = lists(scores=tensor(2, 3, 1, 3, 1, 3, 3))
    found = means(logps, tensor(1, 2), beta=1.0)
    assert found["loss"] == 1.5
    assert found["rewards/accuracies"] == 0.5
    assert found["rewards/top1"] == 0
    assert found["logps/rejected"] == 1
    assert found["kl/implicit"] == pytest.approx((-1 - 9 / 4) / 2)


def test_two_ranked_replies_are_a_pair():
    as_pairs = pairs()
    as_lists = replace(as_pairs, shape="lists", scores=tensor(9, 3, 4, 8, 2, 1))
    paired, listed = means(as_pairs), means(as_lists)
    same = set(paired) & set(listed)
    assert {"rewards/margins", "rewards/accuracies", "logratios/rejected"} <= same
    assert {name: paired[name] for name in same} == pytest.approx({name: listed[name] for name in same})


def test_a_reward_model_by_hand():
    logps = LogProbs(
        policy=None,
        example=torch.tensor([0, 1, 0, 1]),
        num_examples=2,
        shape="pairs",
        lengths=torch.tensor([3, 3, 2, 4]),
        scores=tensor(1, 1, 0, 0),
        rewards=tensor(2, 1, -1, 1.5),
    )
    expected = {
        "loss": 1.5,
        "rewards/chosen": 1.5,
        "rewards/rejected": 0.25,
        "rewards/mean": 0.875,
        "rewards/margins": 1.25,
        "rewards/accuracies": 0.5,
        "rewards/margins_chosen_longer": 3.0,
        "rewards/accuracies_chosen_longer": 1.0,
        "rewards/margins_chosen_shorter": -0.5,
        "rewards/accuracies_chosen_shorter": 0.0,
        "gradient_weight": (sigmoid(-3) + sigmoid(0.5)) / 2,
        "saturated": 0.0,
    }
    # The rewards are the head's own: beta has no part in them.
    assert means(logps, tensor(1, 2), beta=0.1) == pytest.approx(expected, rel=1e-6)


def test_token_extras_are_means_over_tokens():
    logps = LogProbs.of_pairs(
        tensor(-1, -1),
        tensor(-1, -1),
        chosen_lengths=torch.tensor([1, 2]),
        rejected_lengths=torch.tensor([3, 1]),
        token_sequence=torch.tensor([0, 1, 1, 2, 2, 2, 3]),
        token_extras={
            "entropy": tensor(1, 2, 3, 4, 5, 6, 7),
            "top1": tensor(1, 0, 0, 1, 1, 1, 1),
            "reference_kl": tensor(0, 0, 0, 0, 0, 0, 7),
            "squared_probs": tensor(1, 1, 1, 1, 1, 1, 1),
        },
    )
    found = means(logps, tensor(0, 0), weights=torch.tensor([1.0, 2.0]))
    # The first pair's tokens are 1; 4, 5, 6 and the second's, with weight 2, are 2, 3; 7.
    assert found["entropy"] == pytest.approx((16 + 2 * 12) / (4 + 2 * 3))
    assert found["top1"] == pytest.approx((4 + 2 * 1) / 10)
    assert found["kl/reference"] == pytest.approx(1.4)
    assert "squared_probs" not in found


@pytest.mark.parametrize("shape", ["pairs", "unpaired", "lists"])
def test_means_do_not_depend_on_the_cut(shape):
    """Into micro-batches, and over ranks whose states are added up."""
    generator = torch.Generator().manual_seed(0)

    def part(examples):
        replies = {"pairs": 2, "unpaired": 1, "lists": 3}[shape]
        count = examples * replies
        lengths = torch.randint(1, 5, (count,), generator=generator)
        normal = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2)]
        scores = torch.randint(0, 2, (count,), generator=generator).double()
        return LogProbs(
            policy=normal[0],
            reference=normal[1],
            example=torch.arange(examples).repeat(replies),
            num_examples=examples,
            shape=shape,
            lengths=lengths,
            scores=scores,
            token_sequence=torch.arange(count).repeat_interleave(lengths),
            token_extras={"entropy": torch.rand(int(lengths.sum()), generator=generator).double()},
        )

    parts = [part(n) for n in (1, 4, 2, 1)]
    losses = [torch.rand(p.num_examples, generator=generator) for p in parts]
    weights = [torch.rand(p.num_examples, generator=generator) for p in parts]
    ranks = [WeightedMeans(), WeightedMeans()]
    for i, (logps, loss, weight) in enumerate(zip(parts, losses, weights, strict=True)):
        ranks[i % 2].add(pair_metrics(logps, loss, BETA), weight)
    whole = means(concatenate(parts), torch.cat(losses), weights=torch.cat(weights))
    merged = WeightedMeans.merged([*(rank.cpu() for rank in ranks), WeightedMeans()])
    assert merged.means() == pytest.approx(whole, rel=1e-6)


def test_what_does_not_count_may_be_anything_and_names_may_come_late():
    running = WeightedMeans()
    running.add({"a": Counted(tensor(1, math.nan), torch.tensor([2, 0]))}, tensor(1, 1))
    running.add({"a": tensor(4, math.inf), "b": tensor(1, 2)}, tensor(1, 0))
    assert running.means() == {"a": 2.0, "b": 1.0}
    running = WeightedMeans()
    running.add({"a": tensor(4)}, tensor(0))
    assert running.means() == WeightedMeans().means() == {}


def test_metrics_carry_no_gradient():
    logps = replace(pairs(), policy=pairs().policy.requires_grad_())
    for value in pair_metrics(logps, LOSSES.clone().requires_grad_(), BETA).values():
        assert not (value.values if isinstance(value, Counted) else value).requires_grad


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("given", [pairs, lists])
def test_the_device_is_not_waited_for(given):
    logps = given()
    logps = replace(logps, **{k: v.cuda() for k, v in vars(logps).items() if isinstance(v, torch.Tensor)})
    losses, weights = (torch.ones(logps.num_examples, device="cuda") for _ in range(2))
    running = WeightedMeans()
    torch.cuda.set_sync_debug_mode("error")
    try:
        running.add(pair_metrics(logps, losses, BETA), weights)
        running.add(pair_metrics(logps, losses, BETA), weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert running.means() == pytest.approx(means(given(), torch.ones(logps.num_examples)), rel=1e-5)


def said(*lines):
    """How often a run with these (chosen_per_token, margins) lines is warned, and after which line."""
    watch = DisplacementWatch()
    spoken = []
    for number, (per_token, margin) in enumerate(lines):
        logged = {
            "logratios/chosen": 80 * per_token,
            "logratios/chosen_per_token": per_token,
            "rewards/margins": margin,
        }
        if text := watch.advice(logged):
            spoken.append((number, text))
    return spoken


def test_displacement_is_said_once_with_its_numbers():
    curve = [(-0.01, 0.0), (-0.2, 0.5), (-1.1, 1.5), (-1.4, 2.5), (-1.8, 3.5), (-2.5, 4.5)]
    ((line, text),) = said(*curve)
    assert line == 3
    for part in ("112.0 nats a reply", "1.40 a token", "from 0 to 2.5", "dpop", "2410.08847"):
        assert part in text


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param([(0.0, 0.0), (-0.05, 0.4), (-0.2, 0.9), (-0.5, 1.9), (-0.6, 2.4)], id="falls a little"),
        pytest.param([(0.0, 0.0), (0.1, 0.4), (0.2, 0.9)], id="chosen rises"),
        pytest.param([(0.0, 0.0), (-1.2, 0.4), (-0.2, 0.9), (-1.3, 1.0), (-0.1, 1)], id="single odd lines"),
        pytest.param([(0.0, 0.1), (-1.2, 0.0), (-1.5, -0.3), (-3.0, -0.5)], id="margins fall too"),
        pytest.param([(-1.4, 1.0), (-1.3, 1.5), (-1.2, 2.0)], id="low from the start, and rising"),
    ],
)
def test_other_runs_are_not_warned(curve):
    assert said(*curve) == []


def test_a_run_without_a_reference_is_not_watched():
    watch = DisplacementWatch()
    for margin in range(5):
        assert watch.advice({"rewards/margins": margin, "logps/chosen": -100.0 * margin}) is None
