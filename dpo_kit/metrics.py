"""What training is watched by, from log-probs (or a reward model's rewards) alone: no extra forward pass.

Values are per example; averages are weighted sums over examples, so that they do not depend on how a step
was cut into micro-batches or dealt to ranks. What an example has no part in (a stratum of lengths that it
is not of, the undesirable reply of a desirable one) does not count in the mean, and a mean over nothing is
left out. Nothing here waits for the device before the means are read.

Leaves out what needs samples of the policy (KL(policy || reference), win rates): that is evaluation/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kit.losses import LogProbs
from dpo_kit.thresholds import DISPLACED_PER_TOKEN, SATURATED

# What rounding in fp32 makes of equal log-probs, that of policy and reference: this part of their size.
_ROUNDING = 1e-6

# What the metrics of token extras are called.
_TOKEN_METRICS = {"entropy": "entropy", "top1": "top1", "reference_kl": "kl/reference"}


class Counted(NamedTuple):
    """A metric that examples have in different numbers.

    Attributes:
        values: [P]; where the count is 0 the value is of no matter, be it NaN.
        counts: [P] how often each example counts, beside its weight: 0 or 1, or its number of tokens.
    """

    values: Tensor
    counts: Tensor


@torch.no_grad()
def pair_metrics(
    logps: LogProbs, losses: Tensor, beta: float, *, per_token: bool = False
) -> dict[str, Tensor | Counted]:
    """Metrics of each example. The names depend on the shape and on which fields are there, on nothing else.

    "chosen" is the better reply of a pair, the desirable replies of unpaired data, and the replies with the
    highest score of a list; "rejected" the worse, the undesirable and those with the lowest score. A list of
    replies that are all as good has neither.

    Always:
        loss
    Of a causal LM:
        logps/chosen, logps/rejected: log-prob of a reply, nats.

    With a reference:
        logratios/chosen, logratios/rejected: log pi - log pi_ref of a reply, nats.
        logratios/chosen_per_token: the same per token of the chosen replies.
        kl/implicit: mean of log pi_ref - log pi over an example's replies, nats per reply. Where the replies
            are samples of the reference this is an unbiased estimate of KL(reference || policy). Of other
            replies it is no KL, and may be negative; and it never estimates KL(policy || reference), which
            DPO's objective penalises. (r - 1) - log r, with r = pi / pi_ref, would have the same mean and be
            positive, but r of a whole reply overflows.

    With rewards, that is of a reward model, with a reference (beta times the log-ratio: arXiv 2305.18290,
    equation 5 without the partition function), or of pairs and lists without (beta times log pi). Of a loss
    that compares replies per token (SimPO, IPO, ...; `LossSpec.per_token`) the log-ratio or log pi is, as in
    the loss, the mean over the reply's tokens and not the sum, in all that follows:
        rewards/chosen, rewards/rejected
        rewards/margins: chosen minus rejected; not of unpaired data.
        rewards/accuracies: of pairs whether the margin is positive; of unpaired data whether the reward's
            sign is the label's; of a list the share of its pairs with different scores that are ranked
            right. A tie counts one half: a coin would be right as often. With a reference, log-ratios that
            differ by no more than 1e-6 of the log-probs' size (of both replies together) are a tie, for so
            much may rounding make of policy and reference being the same, as they are before training.
        rewards/top1: of a list, whether the reply with the highest reward is one of the best.
        rewards/mean: of a reward model, over an example's replies; what centring keeps near 0.

    Of pairs with a reference, and of a reward model's:
        gradient_weight: sigmoid(-margin), the weight of a pair in DPO's gradient (equation 7 there) and in
            Bradley-Terry's: 1/2 at the start, 0 when there is nothing left to learn from it. Of another
            loss it is not the weight in that loss's own gradient.
        saturated: the share of pairs whose gradient weight is below SATURATED.
    Of pairs with a reference:
        displaced: the share of pairs whose chosen reply became less likely while their margin is positive,
            both by more than rounding.
    Of pairs with rewards and lengths:
        rewards/margins_chosen_longer, rewards/accuracies_chosen_longer: of pairs whose chosen reply has more
            tokens than the rejected one; and ..._chosen_shorter: fewer. Equal lengths are in neither.

    With the token extras of that name, means over the tokens of all replies:
        entropy: of the policy's distribution, nats.
        top1: share of tokens that no other token is likelier than.
        kl/reference: KL(reference || policy) of the distributions at the replies' tokens, nats; exact.

    Args:
        logps: of P examples.
        losses: [P] loss of each.
        beta: factor of the implicit reward.
        per_token: whether the implicit reward is per token of a reply; this needs `lengths`.

    Returns:
        name -> [P] fp32 values, or these with how often each counts; what `WeightedMeans.add` takes.
    """
    chosen, rejected = _sides(logps)
    everything = torch.ones_like(chosen)
    found: dict[str, Tensor | Counted] = {"loss": losses}
    if logps.policy is not None:
        found["logps/chosen"] = _mean_of(logps, logps.policy, chosen)
        found["logps/rejected"] = _mean_of(logps, logps.policy, rejected)
        if logps.reference is not None:
            ratios = logps.logratios
            found["logratios/chosen"] = _mean_of(logps, ratios, chosen)
            found["logratios/rejected"] = _mean_of(logps, ratios, rejected)
            found["kl/implicit"] = _mean_of(logps, -ratios, everything)
            if logps.lengths is not None:
                found["logratios/chosen_per_token"] = _per_token(logps, ratios, chosen)
    found |= _reward_metrics(logps, beta, per_token, chosen, rejected)
    for extra, name in _TOKEN_METRICS.items():
        if extra in logps.token_extras:
            sums = logps.sum_per_reply(logps.token_extras[extra])
            found[name] = _per_token(logps, sums, everything)
    return {
        name: value.float() if isinstance(value, Tensor) else Counted(value.values.float(), value.counts)
        for name, value in found.items()
    }


def _sides(logps: LogProbs) -> tuple[Tensor, Tensor]:
    """[S] which replies are chosen and which rejected."""
    example = logps.example
    if logps.shape == "pairs":
        chosen = torch.arange(len(example), device=example.device) < logps.num_examples
        return chosen, ~chosen
    if logps.shape == "unpaired":
        return logps.labels, ~logps.labels
    scores = logps.need("scores")
    best, worst = (_extreme(logps, scores, which) for which in ("amax", "amin"))
    return (scores == best) & (best > worst), (scores == worst) & (best > worst)


def _extreme(logps: LogProbs, values: Tensor, which: str) -> Tensor:
    """[S] the largest ("amax") or smallest ("amin") value of each reply's example."""
    of_example = values.new_zeros(logps.num_examples)
    return of_example.scatter_reduce(0, logps.example, values, which, include_self=False)[logps.example]


def _sum_per_example(logps: LogProbs, values: Tensor) -> Tensor:
    return values.new_zeros(logps.num_examples).index_add(0, logps.example, values)


def _mean_of(logps: LogProbs, values: Tensor, which: Tensor) -> Counted:
    """Mean of an example's replies of one side, where it has some."""
    counts = _sum_per_example(logps, which.long())
    sums = _sum_per_example(logps, torch.where(which, values, 0))
    return Counted(sums / counts.clamp(min=1), (counts > 0).long())


def _per_token(logps: LogProbs, sums: Tensor, which: Tensor) -> Counted:
    """[S] sums over the tokens of replies -> the mean over those of one side; every token counts alike."""
    tokens = _sum_per_example(logps, torch.where(which, logps.need("lengths"), 0))
    total = _sum_per_example(logps, torch.where(which, sums, 0))
    return Counted(total / tokens.clamp(min=1), tokens)


def _reward_metrics(
    logps: LogProbs, beta: float, per_token: bool, chosen: Tensor, rejected: Tensor
) -> dict[str, Tensor | Counted]:
    if logps.rewards is None and logps.reference is None and logps.shape == "unpaired":
        return {}
    values, noise = _rewards(logps, beta, per_token)
    everything = torch.ones_like(chosen)
    better, worse = (_mean_of(logps, values, side) for side in (chosen, rejected))
    found: dict[str, Tensor | Counted] = {"rewards/chosen": better, "rewards/rejected": worse}
    if logps.rewards is not None:
        found["rewards/mean"] = _mean_of(logps, values, everything)
    if logps.shape == "unpaired":
        signs = _won(torch.where(chosen, values, -values), noise)
        found["rewards/accuracies"] = _mean_of(logps, signs, everything)
        return found
    margins = better.values - worse.values
    if logps.shape == "pairs":
        return found | _margin_metrics(logps, margins, noise)
    found["rewards/margins"] = Counted(margins, better.counts)
    found["rewards/accuracies"] = _ranked_right(logps, values, noise)
    highest = values + noise >= _extreme(logps, values - noise, "amax")
    found["rewards/top1"] = Counted(
        _mean_of(logps, chosen.to(values.dtype), highest).values,
        better.counts,
    )
    return found


def _rewards(logps: LogProbs, beta: float, per_token: bool) -> tuple[Tensor, Tensor]:
    """[S] reward of each reply, and how far rounding may move it from that of an equal one."""
    if logps.rewards is not None:
        return logps.rewards, torch.zeros_like(logps.rewards)
    policy = logps.need("policy")
    factor = beta / logps.need("lengths").to(policy.dtype) if per_token else beta
    if logps.reference is None:
        return factor * policy, torch.zeros_like(policy)
    return factor * logps.logratios, factor * _ROUNDING * policy.abs()


def _margin_metrics(logps: LogProbs, margins: Tensor, noise: Tensor) -> dict[str, Tensor | Counted]:
    """Of the [P] reward margins of pairs, and [S] the rounding of their rewards."""
    noise_chosen, noise_rejected = logps.halves(noise)
    won = _won(margins, noise_chosen + noise_rejected)
    found: dict[str, Tensor | Counted] = {"rewards/margins": margins, "rewards/accuracies": won}
    if logps.lengths is not None:
        longer = logps.chosen_lengths > logps.rejected_lengths
        shorter = logps.chosen_lengths < logps.rejected_lengths
        for stratum, counts in (("chosen_longer", longer.long()), ("chosen_shorter", shorter.long())):
            found[f"rewards/margins_{stratum}"] = Counted(margins, counts)
            found[f"rewards/accuracies_{stratum}"] = Counted(won, counts)
    if logps.reference is not None or logps.rewards is not None:
        weight = torch.sigmoid(-margins)
        found |= {"gradient_weight": weight, "saturated": weight < SATURATED}
    if logps.reference is not None:
        fallen = logps.chosen_logratios < -_ROUNDING * logps.chosen.abs()
        found["displaced"] = fallen & (won == 1)
    return found


def _won(differences: Tensor, noise: Tensor) -> Tensor:
    """1 where above the rounding, 1/2 within it, 0 below."""
    return torch.where(differences.abs() <= noise, 0.5, (differences > 0).to(differences.dtype))


def _ranked_right(logps: LogProbs, values: Tensor, noise: Tensor) -> Counted:
    """Of each list, the share of its pairs of replies with different scores that the values rank alike."""
    scores, example = logps.need("scores"), logps.example
    ordered = (example[:, None] == example) & (scores[:, None] > scores)
    won = _won(values[:, None] - values, noise[:, None] + noise)
    right = torch.where(ordered, won, 0).sum(1)
    pairs = _sum_per_example(logps, ordered.sum(1))
    return Counted(_sum_per_example(logps, right) / pairs.clamp(min=1), (pairs > 0).long())


class WeightedMeans:
    """Running weighted means by name, in fp64."""

    def __init__(self) -> None:
        # Names that came together -> [2, names] their sums and weights.
        self._states: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor | Counted], weights: Tensor) -> None:
        """Take in [P] values by name with the [P] weights of the examples; the device is not waited for.

        A plain tensor counts every example once.
        """
        names = tuple(sorted(values))
        ones = torch.ones_like(weights)
        pairs = [v if isinstance(v, Counted) else Counted(v, ones) for v in map(values.__getitem__, names)]
        if not pairs:
            return
        values_KP = torch.stack([pair.values.double() for pair in pairs])
        weights_KP = torch.stack([pair.counts.double() for pair in pairs]) * weights.double()
        sums_K = torch.where(weights_KP != 0, values_KP * weights_KP, 0).sum(1)
        state = torch.stack([sums_K, weights_KP.sum(1)])
        self._states[names] = self._states[names] + state if names in self._states else state

    def state(self) -> list[Any]:
        """What `of_state` makes the same of, as JSON can hold it; waits for the device."""
        return [[list(names), *state.tolist()] for names, state in self._states.items()]

    @classmethod
    def of_state(cls, parts: Sequence[Any], device: torch.device | str | None = None) -> WeightedMeans:
        """From what `state` gave."""
        whole = cls()
        for names, *state in parts:
            whole._states[tuple(names)] = torch.tensor(state, dtype=torch.float64, device=device)
        return whole

    def cpu(self) -> WeightedMeans:
        """The same on the host, to be sent to other ranks."""
        return self.merged([self], "cpu")

    @classmethod
    def merged(
        cls, parts: Sequence[WeightedMeans], device: torch.device | str | None = None
    ) -> WeightedMeans:
        """Those of several ranks together; one that has no examples has no names either."""
        whole = cls()
        for part in parts:
            for names, state in part._states.items():
                state = state if device is None else state.to(device)
                whole._states[names] = whole._states[names] + state if names in whole._states else state
        return whole

    def means(self) -> dict[str, float]:
        """By name, sorted, without those over nothing; waits for the device."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for names, state in self._states.items():
            for name, total, weight in zip(names, *state.tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + total
                weights[name] = weights.get(name, 0.0) + weight
        return {name: sums[name] / weights[name] for name in sorted(sums) if weights[name]}


class DisplacementWatch:
    """Says once when chosen replies become unlikely while the margin grows, and what to try.

    Likelihood displacement (arXiv 2410.08847): the loss sees the difference of two log-probs alone, so both
    may fall, and the probability goes to replies that nobody looked at. It is called so where, in two logged
    lines one after the other, the chosen replies lie below DISPLACED_PER_TOKEN and the first line's value,
    and the margin above the first line's. State is not kept over a resume.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] | None = None
        self._below = 0
        self._said = False

    def advice(self, logged: Mapping[str, float]) -> str | None:
        """What to tell the user after a line of training metrics, if anything; nothing without a reference.

        Args:
            logged: as logged; looked at are logratios/chosen, logratios/chosen_per_token and rewards/margins.
        """
        names = ("logratios/chosen", "logratios/chosen_per_token", "rewards/margins")
        if self._said or not all(name in logged for name in names):
            return None
        now = {name: logged[name] for name in names}
        if self._first is None:
            self._first = now
        chosen, per_token, margins = (now[name] for name in names)
        falls = per_token < min(DISPLACED_PER_TOKEN, self._first[names[1]])
        self._below = self._below + 1 if falls and margins > self._first[names[2]] else 0
        self._said = self._below == 2
        if not self._said:
            return None
        return (
            f"the chosen replies become unlikely: their log-prob is {-chosen:.1f} nats a reply "
            f"({-per_token:.2f} a token) below the reference's, while the margin rose from "
            f"{self._first[names[2]]:.3g} to {margins:.3g} (likelihood displacement, arXiv 2410.08847). What "
            "both replies lose goes to others. Try a lower learning rate or a higher beta; the loss dpop "
            "(arXiv 2402.13228), or an sft term beside this one (loss: [{name: dpo}, {name: sft, weight: "
            "0.1}]); or leave out pairs whose replies are nearly alike."
        )
