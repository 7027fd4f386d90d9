"""Samples of a policy on given prompts, through transformers' own generate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.encoding import encode_rows
from dpo_kit.errors import InputError
from dpo_kit.texts import Prompt, read_prompts


@dataclass(frozen=True)
class Sample:
    """One sampled reply.

    Attributes:
        prompt: as it was given.
        reply: decoded text, without special tokens.
        prompt_ids: the prompt's tokens.
        reply_ids: the sampled tokens, with the end token where it was reached.
        finished: whether it was, before the limit of new tokens.
    """

    prompt: Prompt
    reply: str
    prompt_ids: list[int]
    reply_ids: list[int]
    finished: bool = True


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts to evaluate on, texts or messages: `read_prompts` of one source.

    Raises:
        InputError: no such file, broken JSON, or a line without a prompt.
    """
    prompts = list(read_prompts([str(path)], field="eval.prompts"))
    if not prompts:
        raise InputError("there is no prompt in the file", file=path, field="eval.prompts")
    return prompts[:limit]


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Prompts -> the ids that a reply is generated after, and the tokens that end one; as in training."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        # The reply has no say in the prompt's ids, but a row needs one.
        reply: Any = "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}]
        rows.append({"prompt": prompt, "chosen": reply, "rejected": reply})
    encoded = [pair for pair, _ in encode_rows(rows, tokenizer, chat_template_kwargs)]
    ends = {chosen[-1] for _, chosen, _ in encoded} | {int(tokenizer.eos_token_id)}
    return [list(prompt) for prompt, _, _ in encoded], sorted(ends)


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """Sample replies; the same seed gives the same replies, and the global generator is left as it was.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, with an EOS token.
        prompts: texts or message lists.
        samples: replies per prompt, next to each other in the result.
        max_new_tokens: longest reply.
        temperature: 0 takes the likeliest token each time.
        top_p: nucleus sampling below 1.
        batch_size: prompts generated at once; part of what the seed determines.
        seed: of the generator.
        chat_template_kwargs: for prompts that are messages.

    Raises:
        InputError: several greedy samples of a prompt, which would be the same.
    """
    if temperature == 0 and samples > 1:
        raise InputError(
            "greedy replies to one prompt are all the same", field="eval.samples", mend="Set it to 1."
        )
    device, training = model.device, model.training
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded, ends = encode_prompts(prompts, tokenizer, chat_template_kwargs)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        num_return_sequences=samples,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )
    found: list[Sample] = []
    model.eval()
    try:
        with _no_settings_of_its_own(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                part = encoded[start : start + batch_size]
                width = max(map(len, part))
                ids = torch.tensor([[pad] * (width - len(p)) + p for p in part], device=device)
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
                output: Any = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, generation_config=settings
                )
                replies = output[:, width:].tolist()
                for i, reply in enumerate(replies):
                    place = start + i // samples
                    cut = _until_end(reply, ends)
                    text = str(tokenizer.decode(cut, skip_special_tokens=True))
                    found.append(Sample(prompts[place], text, encoded[place], cut, cut[-1] in ends))
    finally:
        model.train(training)
    return found


@contextlib.contextmanager
def _no_settings_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Within: penalties and filters that the model was published with do not bend its distribution."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]
