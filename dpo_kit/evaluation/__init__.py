"""What a trained policy is worth: log-probs of given pairs, samples, true reward, KL to the reference."""

from dpo_kit.evaluation.kl import sequence_kl
from dpo_kit.evaluation.pair_scores import score_pairs
from dpo_kit.evaluation.rewards import Reward, load_reward
from dpo_kit.evaluation.sampling import Sample, load_prompts, sample_replies

__all__ = [
    "Reward",
    "Sample",
    "load_prompts",
    "load_reward",
    "sample_replies",
    "score_pairs",
    "sequence_kl",
]
