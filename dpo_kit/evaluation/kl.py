"""KL divergence of the policy from the reference, over sampled replies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_kit.evaluation.sampling import Sample

# Logits of both models that are held at once.
_LOGIT_BYTES = 256 * 2**20


@torch.no_grad()
def sequence_kl(policy: PreTrainedModel, reference: PreTrainedModel, samples: Sequence[Sample]) -> Tensor:
    """Sequence KL(policy || reference) of each sample, exact at every token.

    sum over t of KL(policy(. | x, y<t) || reference(. | x, y<t)) along a reply y drawn from the policy:
    its mean over replies is an unbiased estimate of the KL between the distributions of replies, with
    less variance than the log-ratio of the sampled tokens alone.

    Args:
        policy: the model that the samples were drawn from, at temperature 1.
        reference: the model it is compared with; the same vocabulary.
        samples: at least one.

    Returns:
        [samples] nats, fp32, on the CPU.
    """
    results = []
    vocabulary = policy.config.get_text_config().vocab_size
    training = policy.training, reference.training
    policy.eval()
    reference.eval()
    try:
        longest = max(len(s.prompt_ids) + len(s.reply_ids) for s in samples)
        rows = max(1, _LOGIT_BYTES // (2 * 4 * longest * vocabulary))
        for start in range(0, len(samples), rows):
            results.append(_batch_kl(policy, reference, samples[start : start + rows]))
    finally:
        policy.train(training[0])
        reference.train(training[1])
    return torch.cat(results)


def _batch_kl(policy: PreTrainedModel, reference: PreTrainedModel, samples: Sequence[Sample]) -> Tensor:
    sequences = [s.prompt_ids + s.reply_ids for s in samples]
    width = max(map(len, sequences))
    # Padding on the right is seen by no earlier token and weighs nothing in the sum.
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=policy.device)
    predicts = torch.zeros(len(samples), width, device=policy.device)
    for i, sample in enumerate(samples):
        first = len(sample.prompt_ids) - 1
        predicts[i, first : first + len(sample.reply_ids)] = 1
    logps = policy(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    reference_logps = reference(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    per_token = (logps.exp() * (logps - reference_logps)).sum(-1)
    return (per_token * predicts).sum(-1).cpu()
