"""Objectives on ranked lists: all replies to a prompt, compared by their scores.

Lists may differ in length. Replies with equal scores are never compared with one another, so a list whose
scores are all equal teaches nothing (but RRHF's likelihood term). A pair is a list of two, with scores 1
and 0. Nothing here depends on the order in which a list's replies stand.

Shapes: P lists, K replies in the longest, S replies in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_at_least_zero, require_positive
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss

# LiPO: gains are 2^score; and which part of a log-prob the difference of equal ones may be.
_HIGHEST_SCORE = 60
_ROUNDING = 1e-5


class _Lists:
    """Where each reply stands in a table of one row per list, and who beats whom.

    Attributes:
        present_PK: whether there is a reply.
        scores_PK: at least of the policy's precision; 0 where there is no reply.
        better_PKK: whether the first reply's score is above the second's.
    """

    def __init__(self, logps: LogProbs):
        example = logps.example
        counts = example.bincount(minlength=logps.num_examples)
        order = example.argsort(stable=True)
        places = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[example[order]]
        self._slot = torch.empty_like(order).scatter_(0, order, places)
        self._example = example
        self._shape = (logps.num_examples, int(counts.max()))
        policy, scores = logps.need("policy"), logps.need("scores")
        self.scores_PK = self.table(scores.to(torch.promote_types(policy.dtype, scores.dtype)))
        self.present_PK = self.table(torch.ones_like(example, dtype=torch.bool))
        both = self.present_PK[:, :, None] & self.present_PK[:, None, :]
        self.better_PKK = both & (_differences(self.scores_PK) > 0)

    def table(self, values: Tensor) -> Tensor:
        """[S] values of replies -> [P, K], 0 where there is no reply."""
        return values.new_zeros(self._shape).index_put((self._example, self._slot), values)


def _differences(values_PK: Tensor) -> Tensor:
    """[P, K, K] value of the first reply minus that of the second."""
    return values_PK[:, :, None] - values_PK[:, None, :]


@register_loss(
    "plackett_luce",
    shape="lists",
    paper="arXiv 2305.18290, appendix A.3",
    title="DPO under the Plackett-Luce model",
)
def plackett_luce(logps: LogProbs, *, beta: float = 0.1) -> Tensor:
    """-sum_k log(exp(r_k) / sum of exp(r_j) over k and the replies worse than k), r = beta log-ratio.

    The likelihood of the whole ranking; on pairs it is DPO. Of replies with equal scores each competes
    with the worse ones only, not with the others of its score.

    Args:
        logps: needs scores and the reference.
        beta: strength of the KL constraint, positive.

    Returns:
        [P] loss per list, nats: the sum over its replies.
    """
    require_positive(beta=beta)
    lists = _Lists(logps)
    ahead = beta * _differences(lists.table(logps.logratios))
    itself = torch.eye(ahead.shape[-1], dtype=torch.bool, device=ahead.device)
    # From differences, so that a constant on all replies of a list cancels before it can cost precision.
    competing = (-ahead).masked_fill(~(lists.better_PKK | itself), -torch.inf)
    return competing.logsumexp(-1).sum(-1)


def _check_gains(scores: Sequence[float]) -> None:
    if max(scores) > _HIGHEST_SCORE:
        raise ValueError(
            f"lipo's gains are powers of 2: scale the scores, best to [0, 1]; one is {max(scores)}, above 60"
        )


@register_loss(
    "lipo",
    shape="lists",
    check_scores=_check_gains,
    paper="Liu et al. 2024, arXiv 2402.01878, section 3",
    title="LiPO-lambda",
)
def lipo(logps: LogProbs, *, beta: float = 0.05) -> Tensor:
    """-sum over pairs with y_i > y_j of w_ij log sigmoid(s_i - s_j), s = beta log-ratio, y the scores.

    w_ij = |2^y_i - 2^y_j| |1 / log(1 + t_i) - 1 / log(1 + t_j)|, t the place (from 1) of a reply in the
    policy's present ranking by s, without gradient. Replies with equal s, as all are in the first step, are
    placed by their scores; equal, for the ranking alone, are log-ratios that differ by no more than 1e-5 of
    the list's largest log-prob (nats), which is what rounding makes of equal ones.

    Args:
        logps: needs scores and the reference. The paper's scores lie in [0, 1]; as gains grow as 2^y, scores
            above 60 are refused. Differences between scores far below 0 have next to no weight.
        beta: strength of the KL constraint, positive.

    Returns:
        [P] loss per list, nats: the sum over its pairs.
    """
    require_positive(beta=beta)
    lists = _Lists(logps)
    _check_gains(lists.scores_PK.flatten().tolist())
    ahead = _differences(lists.table(logps.logratios))
    size_P11 = lists.table(logps.need("policy").detach()).abs().amax(1)[:, None, None]
    clearly_ahead = ahead.detach().masked_fill(ahead.abs() <= _ROUNDING * size_P11, 0)
    discounts = 1 / torch.log1p(_rank(lists, clearly_ahead))
    weights = _differences(torch.exp2(lists.scores_PK)).abs() * _differences(discounts).abs()
    losses = -weights * F.logsigmoid(beta * ahead)
    return losses.masked_fill(~lists.better_PKK, 0).sum((1, 2))


def _rank(lists: _Lists, ahead_PKK: Tensor) -> Tensor:
    """[P, K] place from 1 of each reply in its list, the furthest ahead first.

    Equals are placed by their scores, and those with equal scores by where they stand: they have one gain,
    so that which of them comes first changes nothing.
    """
    places = torch.arange(ahead_PKK.shape[-1], device=ahead_PKK.device)
    equal_scores = _differences(lists.scores_PK) == 0
    wins_tie = lists.better_PKK | (equal_scores & (places[:, None] < places))
    before = (ahead_PKK > 0) | ((ahead_PKK == 0) & wins_tie)
    before = before & lists.present_PK[:, :, None]
    return 1 + before.sum(1).to(lists.scores_PK.dtype)


@register_loss(
    "rrhf",
    shape="lists",
    reference=False,
    paper="Yuan et al. 2023, arXiv 2304.05302, section 3",
    title="RRHF",
    per_token=True,
)
def rrhf(logps: LogProbs, *, rank_weight: float = 1.0, per_token: bool = False) -> Tensor:
    """w sum over pairs with y_i > y_j of max(0, p_j - p_i) - log pi(best reply), p the log-prob per token.

    Of several best replies the mean of their log-probs counts.

    Args:
        logps: needs scores and lengths.
        rank_weight: w, at least 0; 1 in the paper, 100 in the authors' code.
        per_token: divide the best reply's log-prob by the number of its tokens, as the authors' code does up
            to its padding; the paper has the sum.

    Returns:
        [P] loss per list, nats: the sum over its pairs, and the likelihood term.
    """
    require_at_least_zero(rank_weight=rank_weight)
    lists = _Lists(logps)
    means = logps.need("policy") / logps.need("lengths")
    behind = F.relu(-_differences(lists.table(means))).masked_fill(~lists.better_PKK, 0)
    likelihoods = lists.table(means if per_token else logps.need("policy"))
    best = lists.present_PK & ~lists.better_PKK.any(1)
    likelihood = likelihoods.masked_fill(~best, 0).sum(-1) / best.sum(-1)
    return rank_weight * behind.sum((1, 2)) - likelihood
