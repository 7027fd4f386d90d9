"""Which token a reward model takes for padding: what scoring, saving and whoever loads it go by."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from torch import nn

from dpo_kit.models import configs_of, unwrap


@contextlib.contextmanager
def no_padding_token(model: nn.Module) -> Iterator[None]:
    """Within: a reward model takes no token for padding; after: as before.

    So its own pooling reads the very last token of a row, and refuses no batch for want of such a token.
    """
    configs = [config for config in configs_of(model) if hasattr(config, "pad_token_id")]
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = -1
        yield
    finally:
        for config, token in zip(configs, before, strict=True):
            config.pad_token_id = token


def set_padding_token(model: nn.Module, token: int) -> None:
    """Have a model's configurations, which are saved with it, name this token as the one for padding."""
    for config in configs_of(model):
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = token


def padding_advice(model: nn.Module, last_tokens: Collection[int]) -> str:
    """What to tell the user of a reward model whose padding token is none, or one that replies end with.

    Empty where it is right. dpo_kit reads the value at a reply's last token; whoever loads the model into
    transformers gets that of the last token that is no padding.

    Args:
        model: a reward model.
        last_tokens: of some of the run's replies.
    """
    token = unwrap(model).config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
    if token is not None and token not in last_tokens:
        return ""
    problem = (
        "the model has no pad_token_id: transformers would refuse to score several replies at once"
        if token is None
        else f"replies end with token {token}, which is the model's pad_token_id: transformers would read "
        "their reward one token before the end"
    )
    return (
        f"{problem}. Set pad_token_id, in the config and in the tokenizer, to a token that no reply ends "
        "with, such as the one that begins a text"
    )
