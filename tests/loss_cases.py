"""What several files of loss tests work with: two pairs of hand-worked log-probs, and a loss by its name."""

import torch

from dpo_kit.losses import LogProbs, get_loss


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def value(name, logps, **options):
    return get_loss(name).function(logps, **options)


def two_pairs(**changes):
    """Log-ratios: chosen 1 and 0, rejected -0.25 and 2, so the margins are 1.25 and -2."""
    fields = {
        "chosen": f64(-3, -3),
        "rejected": f64(-0.5, -2),
        "reference_chosen": f64(-4, -3),
        "reference_rejected": f64(-0.25, -4),
        "chosen_lengths": torch.tensor([2, 1]),
        "rejected_lengths": torch.tensor([1, 2]),
    }
    return LogProbs.of_pairs(**(fields | changes))
