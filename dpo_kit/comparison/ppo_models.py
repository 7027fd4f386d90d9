"""The models of PPO beside the policy, in the form that TRL reads: rewards, values, and what is padding.

TRL's `get_reward` takes `getattr(model, model.base_model_prefix)`, the hidden states of its last layer, and
`model.score` of them at one position. A reward model is that already; a reward that is a function of texts is
made to look like one here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.evaluation.rewards import Reward
from dpo_kit.models import load_reward_model
from dpo_kit.texts import Prompt

# Bytes that no UTF-8 text has, by the names of byte-level BPE and of SentencePiece's byte tokens.
_IMPOSSIBLE = ("<0xFF>", "\u00ff", "<0xFE>", "\u00fe")


class Normalised(nn.Module):
    """A score minus a mean, over a deviation; both stay as they are."""

    def __init__(self, score: nn.Module, mean: float, deviation: float) -> None:
        super().__init__()
        self.inner, self.mean, self.deviation = score, mean, deviation

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] hidden states -> [..., 1] scores."""
        return (self.inner(hidden) - self.mean) / self.deviation


class TextReward(nn.Module):
    """A reward of texts with the face of a reward model. Every position has the reward of the whole reply.

    A reply's text is what evaluation sees of the same tokens: those up to the first that ends a reply,
    decoded without special tokens. A prompt is the row's own (text or messages), not its tokens decoded.

    Args:
        reward: of prompts and replies.
        tokenizer: the policy's.
        prompts: a prompt's ids -> the prompt.
        ends: tokens that end a reply.
        dtype: of the scores; that of the policy's weights, since TRL adds them to log-probs in place.

    Attributes:
        width: columns of the batch that are prompts, padded on the left; whoever samples sets it.
    """

    base_model_prefix = "texts"

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[tuple[int, ...], Prompt],
        ends: Collection[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._reward, self._tokenizer, self._prompts, self._ends = reward, tokenizer, prompts, set(ends)
        self._dtype = dtype
        self.width = 0
        self.score: nn.Module = nn.Identity()

    def texts(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """[B, T] ids and their mask -> `hidden_states`, of which the last is [B, T, 1]: the rewards."""
        prompts, replies = [], []
        for row, mask in zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True):
            pairs = list(zip(row, mask, strict=True))
            prompts.append(self._prompts[tuple(token for token, real in pairs[: self.width] if real)])
            reply = [token for token, real in pairs[self.width :] if real]
            end = next((i for i, token in enumerate(reply) if token in self._ends), len(reply))
            replies.append(str(self._tokenizer.decode(reply[: end + 1], skip_special_tokens=True)))
        rewards = torch.tensor(self._reward(prompts, replies), dtype=self._dtype, device=input_ids.device)
        return SimpleNamespace(hidden_states=(rewards[:, None, None].expand(-1, input_ids.shape[1], 1),))


def value_model_of(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy's body with a new value head of zeros.

    All values are 0 at first, so that the first advantages are the rewards themselves and not a random
    head's noise.

    Args:
        policy: as it is before training; its body is copied.
    """
    model, _ = load_reward_model(policy.config.to_dict(), policy.dtype)
    body: Any = getattr(policy, policy.base_model_prefix)
    getattr(model, model.base_model_prefix).load_state_dict(body.state_dict())
    for parameter in model.score.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)
    return model


def padding_token(
    tokenizer: PreTrainedTokenizerBase,
    embedded: int,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
) -> int:
    """A token that can stand for padding: TRL knows padding by its id, so no text may contain it.

    The tokenizer's own padding token where that ends no reply and is in no prompt; else an id that the model
    embeds and the tokenizer does not have; else a byte that no UTF-8 text has. The vocabulary stays as it is.

    Args:
        tokenizer: the policy's.
        embedded: tokens that the policy embeds.
        prompts: their ids.
        ends: tokens that end a reply.

    Raises:
        InputError: there is none.
    """
    taken = {token for prompt in prompts for token in prompt} | set(ends)
    candidates = [tokenizer.pad_token_id]
    known = tokenizer.get_vocab()
    if max(known.values()) + 1 < embedded:
        candidates.append(embedded - 1)
    candidates += [
        known[name] for name in _IMPOSSIBLE if name in known and tokenizer.decode([known[name]]) == "\ufffd"
    ]
    for token in candidates:
        if token is not None and token not in taken:
            return int(token)
    raise InputError(
        "the tokenizer has no token that could stand for padding: replies end with its own, or it has none",
        field="model.tokenizer",
        mend="Give it a pad token that no text has, and the model a row for it (resize_token_embeddings).",
    )
