"""What a run's examples and its two kinds of replies are called, found out from the metrics it logged.

Metrics say "chosen" and "rejected" for pairs, labelled replies and ranked lists alike; a page does not. The
metrics tell them apart, as the recipe's loss does not: most losses for labelled replies take pairs as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_kit.report.run_folder import Run


@dataclass(frozen=True)
class Words:
    """The words of a page.

    Attributes:
        examples: what a step's batch holds, in the plural.
        chosen, rejected: the two kinds of replies.
        accuracy: what rewards/accuracies is the share of.
        rewards: what the rewards are.
    """

    examples: str
    chosen: str
    rejected: str
    accuracy: str
    rewards: str = "implicit rewards"


PAIRS = Words("pairs", "chosen", "rejected", "share of pairs with margin > 0")
REWARD_MODEL = Words("pairs", "chosen", "rejected", "share of pairs with margin > 0", "rewards")
LABELLED = Words("replies", "desirable", "undesirable", "share with the sign of the label")
LISTS = Words("lists", "best", "worst", "share in order")
# A loss that looks at one side of pairs alone, and labelled replies that are all good, log the same.
ONE_SIDED = Words("replies", "trained on", "others", "accuracy")
ROLLOUTS = Words("prompts", "better", "worse", "accuracy", "scores")
ANY = Words("examples", "better", "worse", "accuracy", "rewards")


def words_of(runs: Sequence[Run]) -> Words:
    """The words for one run, or those that fit all of several."""
    found = {_words_of(run) for run in runs}
    return found.pop() if len(found) == 1 else ANY


def _words_of(run: Run) -> Words:
    logged = {key.removeprefix("eval_") for row in run.rows for key in row.values}
    if "objective/scores" in logged:
        return ROLLOUTS
    if "rewards/top1" in logged:
        return LISTS
    if "rewards/mean" in logged:
        return REWARD_MODEL
    if "rewards/margins" in logged or "logps/chosen" not in logged:
        return PAIRS
    return LABELLED if "logps/rejected" in logged else ONE_SIDED
