"""The objectives of a reward model: what its value head says of each reply, no log-probs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kit.losses.common import require_at_least_zero
from dpo_kit.losses.inputs import LogProbs
from dpo_kit.losses.registry import register_loss


@register_loss(
    "bradley_terry",
    reference=False,
    rewards=True,
    paper="Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: arXiv 2307.09288, equation 2",
    title="Bradley-Terry reward model",
    margins="margin",
    incumbents=("TRL RewardTrainer", "OpenRLHF train_rm", "LLaMA-Factory stage rm"),
)
def bradley_terry(logps: LogProbs, *, margin: bool = False, centring: float = 0.0) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected) - margin) + c (r(chosen) + r(rejected))^2.

    Args:
        logps: needs the rewards of both replies; with `margin` the data's margins as well.
        margin: ask for the data's score difference (Llama 2, arXiv 2307.09288, equation 2; its values are 0
            to 3, or 0 to 1). TRL does so wherever the data have a margin.
        centring: c, at least 0, which fixes the rewards' free constant (Eisenstein et al. 2023,
            arXiv 2312.09244, with c = 0.01).

    Returns:
        [P] loss per pair, nats.
    """
    require_at_least_zero(centring=centring)
    chosen, rejected = logps.halves(logps.need("rewards"))
    difference = chosen - rejected
    if margin:
        difference = difference - logps.need("margins")
    loss = -F.logsigmoid(difference)
    return loss + centring * (chosen + rejected) ** 2 if centring else loss


_TARGETS = ("quantiles", "scores")


@register_loss(
    "rank_scores",
    shape="lists",
    reference=False,
    rewards=True,
    paper="normal scores of ranks: Blom 1958; rank first, then score: HuggingFace, Illustrating RLHF, 2022",
    title="Regression on ranks made scores",
)
def rank_scores(logps: LogProbs, *, targets: str = "quantiles") -> Tensor:
    """mean over a list's replies of (r - mean(r) - (t - mean(t)))^2, t the target score of each reply.

    The ranking comes first and is made into scores, t = Phi^-1((rank - 3/8) / (K + 1/4)) of K replies, the
    worst having rank 1: about the expected order statistics of K standard normal draws (Blom). Replies with
    equal scores have the mean of their ranks. Where Bradley-Terry learns which of two replies is better, this
    learns how far apart they stand in their list, and pulls no reward towards infinity. A constant on all
    rewards of a list is free. A list of one teaches nothing; one whose scores are all equal, that their
    rewards are.

    Args:
        logps: needs rewards and scores.
        targets: "quantiles" as above, or "scores", the data's scores as they are.

    Returns:
        [P] loss per list, squared units of the reward.
    """
    if targets not in _TARGETS:
        raise ValueError(f"targets must be one of {', '.join(_TARGETS)}, got {targets!r}")
    rewards = logps.need("rewards")
    scores = logps.need("scores").to(rewards.dtype)
    wanted = scores if targets == "scores" else _normal_scores(logps)
    distance = rewards - wanted
    return logps.mean_per_example((distance - logps.mean_per_example(distance)[logps.example]) ** 2)


def _normal_scores(logps: LogProbs) -> Tensor:
    """[S] quantile of each reply's mid-rank in its list."""
    rewards, scores = logps.need("rewards"), logps.need("scores")
    order = scores.argsort(stable=True)
    order = order[logps.example[order].argsort(stable=True)]
    example, sorted_scores = logps.example[order], scores[order]
    counts = logps.example.bincount(minlength=logps.num_examples)
    places = torch.arange(len(order), device=order.device)
    rank = (places - (counts.cumsum(0) - counts)[example] + 1).to(rewards.dtype)
    is_new = (example.diff(prepend=example[:1]) != 0) | (sorted_scores.diff(prepend=sorted_scores[:1]) != 0)
    tied = is_new.cumsum(0)
    ties = tied.bincount()
    middle = rank.new_zeros(len(ties)).index_add(0, tied, rank) / ties
    share = (middle[tied] - 3 / 8) / (counts[example] + 1 / 4)
    return torch.empty_like(share).index_copy(0, order, torch.special.ndtri(share))
