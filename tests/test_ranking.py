"""Bradley-Terry strengths fitted to comparisons."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from dpo_kit.errors import DpoKitWarning
from dpo_kit.evaluation.ranking import bradley_terry_strengths, judged_scores


def test_two_replies_by_hand():
    """n wins to m, a more each way: the odds are (n + a) / (m + a), log-strengths half of their log."""
    found = bradley_terry_strengths(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=0.5)
    assert found == pytest.approx([math.log(3.5 / 1.5) / 2, -math.log(3.5 / 1.5) / 2])
    unbeaten = bradley_terry_strengths(np.array([[0.0, 1.0], [0.0, 0.0]]), prior=0.1)
    assert unbeaten == pytest.approx([math.log(11) / 2, -math.log(11) / 2])


def test_wins_in_proportion_to_strengths_give_those_strengths():
    """Where the shares of wins are those of strengths 4 : 2 : 1, and the prior's too, nothing else fits."""
    strengths = np.array([4.0, 2.0, 1.0])
    share = strengths[:, None] / (strengths[:, None] + strengths[None, :])
    found = bradley_terry_strengths(1e6 * share, prior=1e-3)
    assert found == pytest.approx(np.log(strengths) - np.log(strengths).mean(), abs=1e-6)


def test_a_circle_is_a_tie():
    circle = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert bradley_terry_strengths(circle) == pytest.approx([0, 0, 0], abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_likelihood_is_at_its_top(seed):
    """Its gradient is 0: each reply's wins are those that its strength makes expected."""
    rng = np.random.default_rng(seed)
    wins, prior = rng.random((6, 6)).round(1), 0.1
    np.fill_diagonal(wins, 0)
    s = bradley_terry_strengths(wins, prior)
    games = wins + wins.T + 2 * prior * (1 - np.eye(6))
    expected = (games / (1 + np.exp(s[None, :] - s[:, None]))).sum(1)
    assert (wins + prior * (1 - np.eye(6))).sum(1) == pytest.approx(expected, abs=1e-7)


def test_replies_are_compared_once_each_and_equal_ones_score_alike():
    asked = []

    def longer_wins(prompts, firsts, seconds):
        asked.extend(zip(prompts, firsts, seconds, strict=True))
        return [
            0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(firsts, seconds, strict=True)
        ]

    scores = judged_scores(["p", "q"], [["a", "bbb", "cc", "bbb"], ["a", "b"]], longer_wins)
    assert asked == [("p", "a", "bbb"), ("p", "a", "cc"), ("p", "bbb", "cc"), ("q", "a", "b")]
    assert scores[0][1] == scores[0][3] > scores[0][2] > scores[0][0]
    assert scores[0][2] == pytest.approx(0, abs=1e-8)
    assert scores[1] == pytest.approx([0, 0])


def test_what_the_judge_says_nothing_about_does_not_count():
    with pytest.warns(DpoKitWarning, match="came to nothing about 1 of 3"):
        (scores,) = judged_scores(["p"], [["a", "b", "c"]], lambda *_: [1.0, None, 1.0])
    assert scores[0] > scores[1] > scores[2]
    with pytest.raises(ValueError, match=r"1\.5"):
        judged_scores(["p"], [["a", "b"]], lambda *_: [1.5])


def test_of_all_tournaments_of_four_only_different_strengths_differ():
    """Where all have met, the fit goes by the number of wins alone: equal numbers are equal strengths."""
    pairs = list(combinations(range(4), 2))
    for outcome in product([0.0, 0.5, 1.0], repeat=6):
        wins = np.zeros((4, 4))
        for (a, b), won in zip(pairs, outcome, strict=True):
            wins[a, b], wins[b, a] = won, 1 - won
        found, total = bradley_terry_strengths(wins), wins.sum(1)
        for a, b in pairs:
            assert np.sign(found[a] - found[b]) == np.sign(total[a] - total[b]), outcome
