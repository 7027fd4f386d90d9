"""Rewards by a reward model that dpo_kit trained: what its value head says at the end of each reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.adapter_folders import is_adapter
from dpo_kit.attention import attention_backend
from dpo_kit.encoding import encode_replies, require_eos
from dpo_kit.errors import InputError
from dpo_kit.examples import Example, ScoredReplies
from dpo_kit.models import check_length, load_reward_model
from dpo_kit.packing import Layout, plan_step
from dpo_kit.scoring import choose_layout, sequence_rewards
from dpo_kit.tokenizer import load_tokenizer
from dpo_kit.yaml_file import parse_yaml

# Replies that are planned together: many enough that like prompts meet, few enough to hold.
_REPLIES_AT_ONCE = 1024


class LearnedReward:
    """A reward (`dpo_kit.evaluation.rewards.Reward`) that a model gives, without gradients.

    Prompt and reply become tokens as they do in training, the reply closed by its end token: an empty one
    is the end token alone. Nothing is cut.

    Args:
        model: a reward model, on the device that it is to run on; it is put in eval mode.
        tokenizer: that it was trained with.
        chat_template_kwargs: likewise.
        token_budget: tokens of one forward pass.

    Attributes:
        model, tokenizer: as given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_budget: int = 8192,
    ) -> None:
        require_eos(tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self._chat_template_kwargs, self._token_budget = chat_template_kwargs, token_budget
        self._backend = attention_backend(model.device.type)
        self._layout: Layout | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], replies: Sequence[str]) -> list[float]:
        """A reward for each reply.

        Args:
            prompts: texts or lists of messages.
            replies: as many texts.
        """
        values: list[float] = []
        for start in range(0, len(replies), _REPLIES_AT_ONCE):
            part = slice(start, start + _REPLIES_AT_ONCE)
            values += self._score(self._encode(prompts[part], replies[part]))
        return values

    def _encode(self, prompts: Sequence[Any], replies: Sequence[str]) -> list[Example]:
        rows = []
        for prompt, reply in zip(prompts, replies, strict=True):
            said = reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}]
            rows.append({"prompt": prompt, "completion": said, "label": True})
        encoded = encode_replies(rows, self.tokenizer, self._chat_template_kwargs)
        # The number of each reply travels where its source would, through the order that packing makes.
        return [
            ScoredReplies(np.asarray(prompt), [np.asarray(reply)], [1.0], source=str(i))
            for i, ((prompt, (reply,)), _) in enumerate(encoded)
        ]

    def _score(self, examples: list[Example]) -> list[float]:
        longest = max(len(e.prompt) + len(e.replies[0]) for e in examples)
        check_length(self.model, None, longest, field="eval.max_new_tokens")
        if self._layout is None:
            self._layout, _ = choose_layout(self.model, examples, self._backend)
        found = torch.empty(len(examples), dtype=torch.float64)
        for planned in plan_step(examples, self._token_budget, self._layout, self._backend):
            batch = planned.to(self.model.device)
            places = torch.tensor([int(source) for source in batch.sources])
            found[places] = sequence_rewards(self.model, batch).double().cpu()
        return found.tolist()


def load_learned_reward(folder: str | Path, *, field: str) -> LearnedReward:
    """The reward of a model that `dpo-kit train` saved: a run's `model` folder, with its tokenizer.

    An adapter is put into the model that it was trained on. The chat template's settings are those of the
    recipe beside the folder, where there is one.

    Args:
        folder: local.
        field: what names it, for errors.

    Raises:
        InputError: there is no such folder, or no reward model in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", file=folder, field=field, mend="Name a run's model folder.")
    try:
        model = _load(folder)
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        raise InputError(error.problem, file=error.file, field=field, mend=error.mend) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LearnedReward(model.to(device), tokenizer, chat_template_kwargs=_template_settings(folder))  # type: ignore[arg-type]


def _load(folder: Path) -> PreTrainedModel:
    """The model in fp32; in fewer bits, rewards of replies that are nearly alike would be the same."""
    model, is_new = load_reward_model(folder)
    if is_new:
        both = "neither the adapter nor its model has a value head"
        raise _no_reward_model(folder, both if is_adapter(folder) else "the model has no value head")
    return model


def _no_reward_model(folder: Path, problem: str) -> InputError:
    mend = "Train one: dpo-kit train with loss: bradley_terry."
    return InputError(f"this is no reward model: {problem}", file=folder, mend=mend)


def _template_settings(folder: Path) -> dict[str, Any]:
    # RUN/model, or RUN/checkpoints/step-N.
    run = folder.resolve().parent
    recipe = (run.parent if run.name == "checkpoints" else run) / "recipe.yaml"
    if not recipe.is_file():
        return {}
    content = parse_yaml(recipe.read_text(encoding="utf-8"), recipe) or {}
    return dict((content.get("data") or {}).get("chat_template_kwargs") or {})
