"""What a trainer is given -> what it works on: token ids, bare models, a layout they may be trusted with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from torch import nn

from dpo_kit.adapter_folders import REWARD_TASK, in_a_line
from dpo_kit.adapter_kinds import check_names, check_new
from dpo_kit.adapters import check_trains, name_base
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.examples import Example, example_of
from dpo_kit.fingerprint import trained_base_parameters
from dpo_kit.losses import Objective
from dpo_kit.models import (
    check_length,
    disable_dropout,
    load_model,
    load_reward_model,
    output_head,
    value_head,
)
from dpo_kit.packing import Layout
from dpo_kit.padding import padding_advice, set_padding_token
from dpo_kit.pairs.kinds import kind_of_columns, kind_of_ids
from dpo_kit.quantised import check_trainable, use_exact_layers
from dpo_kit.scoring import backend_difference, choose_layout
from dpo_kit.tokenization import tokenize_pairs

# Rows of the training data among which the start-up check looks for its probe.
_PROBE_ROWS = 256
# By whether a reward model is trained.
_LORA_MEND = {
    True: "Set task_type to SEQ_CLS, or modules_to_save to [score] without a task_type.",
    False: "Set task_type to CAUSAL_LM.",
}


def tokenized(dataset: Any, tokenizer: Any, args: PreferenceConfig, objective: Objective) -> Any:
    """Rows of text -> rows of ids; rows of ids as they are; several data sets by name, each for itself.

    Raises:
        InputError: no rows, no tokenizer for text, or rows of a kind that the objective cannot learn from.
    """
    if isinstance(dataset, dict):
        return {name: tokenized(part, tokenizer, args, objective) for name, part in dataset.items()}
    if dataset is None:
        return None
    if not isinstance(dataset, Dataset) or not len(dataset):
        got = "an empty one" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise InputError(f"expected a datasets.Dataset with pairs, got {got}", field="train_dataset")
    kind = kind_of_ids(dataset.column_names) or kind_of_columns(dataset.column_names)
    if kind is not None:
        objective.check_shape(kind.name)
    objective.check_data(dataset)
    if "prompt_ids" in dataset.column_names:
        return dataset
    if tokenizer is None:
        raise InputError(
            "rows of text need a tokenizer", field="processing_class", mend="Give processing_class=tokenizer."
        )
    # One process tokenises and the others read what it wrote.
    with args.main_process_first(desc="tokenising"):
        found = tokenize_pairs(dataset, tokenizer, max_length=args.max_length, overlong=args.overlong)
    for line in found.account():
        warnings.warn(line, DpoKitWarning, stacklevel=3)
    return found.dataset


def prepared_policy(
    model: str | Path | nn.Module, peft_config: Any, *, rewards: bool, seed: int
) -> nn.Module:
    """The model that is trained: loaded where it is none yet, with its adapter, without dropout.

    Args:
        model: a model, or a folder or hub id.
        peft_config: of a new adapter, or None.
        rewards: whether it is a reward model.
        seed: of a new adapter's weights; the global generator is left as it was.

    Raises:
        InputError: it has no head that could be trained, an adapter that leaves the value head as it is, or
            one that cannot be trained here; or it is quantised and has no adapter.
    """
    if not isinstance(model, nn.Module):
        model = load_reward_model(model, seed=seed)[0] if rewards else load_model(model)
    policy = own_forward(model)
    if hasattr(policy, "peft_config"):
        if peft_config is not None:
            raise InputError(
                "the model has an adapter already, and another would be put on top of it",
                field="peft_config",
                mend="Train that one further (as model.adapter), or merge it first (dpo-kit merge).",
            )
        check_trains(policy)
    if peft_config is not None:
        policy = _with_new_adapter(policy, peft_config, rewards=rewards, seed=seed)
    check_trainable(policy)
    if hasattr(policy, "peft_config"):
        name_base(policy)
        _check_saved(policy)
    if disable_dropout(policy):
        warnings.warn("dropout is off: shared prefixes would correlate it", DpoKitWarning, stacklevel=3)
    if not rewards:
        output_head(policy)
    # peft trains and saves, beside its adapters, only what it holds as modules_to_save.
    elif not hasattr(value_head(policy), "modules_to_save") and hasattr(policy, "peft_config"):
        problem = "with this adapter the value head is not trained, nor saved"
        raise InputError(problem, field="model.lora", mend=_LORA_MEND[rewards])
    return policy


def _with_new_adapter(policy: nn.Module, config: Any, *, rewards: bool, seed: int) -> nn.Module:
    """The peft model around a policy, its new adapter made of a seed.

    Raises:
        InputError: as `check_new`; or what the configuration asks for does not go with the model.
    """
    check_new(config)
    check_names(config, policy)
    if config.task_type == REWARD_TASK and not rewards:
        problem = f"task_type {REWARD_TASK} is for reward models, and a causal LM is trained"
        raise InputError(problem, field="model.lora.task_type", mend=_LORA_MEND[rewards])
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            policy = get_peft_model(policy, config)
        except AttributeError as error:
            # What a task_type looks for in a model of another kind.
            raise InputError(str(error), field="model.lora", mend=_LORA_MEND[rewards]) from error
        # Each kind of adapter has errors of its own for fields that do not go with each other or the model.
        except Exception as error:
            raise InputError(
                f"peft cannot make this adapter: {in_a_line(error)}", field="model.lora"
            ) from error
    check_trains(policy)
    return policy


def _check_saved(policy: Any) -> None:
    """Refuse a peft model of which more is trained than is saved with its adapters."""
    from peft import get_peft_model_state_dict

    trained = set(trained_base_parameters(policy))
    parameters = policy.get_base_model().named_parameters(remove_duplicate=False) if trained else ()
    saved = {
        value.data_ptr()
        for name in policy.peft_config
        for value in (get_peft_model_state_dict(policy, adapter_name=name).values() if trained else ())
    }
    if lost := [n for n, p in parameters if n in trained and p.data_ptr() not in saved]:
        raise InputError(
            f"{len(lost)} parameters of the base model are trained, and would not be saved with the adapter: "
            f"{', '.join(lost[:3])}",
            field="model.lora",
            mend="Name their layers in modules_to_save, or freeze them (requires_grad_(False)).",
        )


def settle_padding(model: nn.Module, tokenizer: Any, dataset: Any) -> None:
    """Have a reward model name its tokenizer's padding token, and warn where that will not do.

    Args:
        model: a reward model.
        tokenizer: or None; it then counts what the model says already.
        dataset: tokenised; its first rows are what is looked at. None: nothing is.
    """
    token = getattr(tokenizer, "pad_token_id", None)
    config: Any = model.config
    if token not in (None, config.get_text_config().pad_token_id):
        # transformers' Trainer does so as well, when it trains.
        set_padding_token(model, token)
        if hasattr(model, "peft_config"):
            loading = f"from_pretrained(folder, num_labels=1, pad_token_id={token})"
            message = f"an adapter is saved without its model's configuration: load it by {loading}"
            warnings.warn(message, DpoKitWarning, stacklevel=3)
    if not isinstance(dataset, Dataset):
        return
    rows = map(example_of, dataset.select(range(min(len(dataset), _PROBE_ROWS))))
    if advice := padding_advice(model, {int(reply[-1]) for row in rows for reply in row.replies}):
        warnings.warn(advice, DpoKitWarning, stacklevel=3)


def own_forward(model: nn.Module) -> nn.Module:
    """The model without the autocast that an earlier trainer wrapped around its forward.

    Its quantised layers, where it has any, are made exact; see `quantised.use_exact_layers`.
    """
    use_exact_layers(model)
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def probe_of(
    dataset: Dataset, longest: int, to_example: Callable[[dict[str, Any]], Example]
) -> list[Example]:
    """What the start-up checks look at: the first rows of a tokenised data set, and its longest.

    Args:
        dataset: tokenised.
        longest: which row holds its longest sequence.
        to_example: row -> what is trained on.
    """
    rows = [*dataset.select(range(min(len(dataset), _PROBE_ROWS))), dataset[longest]]
    return [to_example(row) for row in rows]


def settle_layout(
    models: Sequence[nn.Module],
    pairs: Sequence[Example],
    longest: int,
    args: PreferenceConfig,
    backend: str,
) -> Layout:
    """The tree where every model may be trusted with it; see `scoring.choose_layout`.

    Args:
        models: policy and, where it is another model, reference.
        pairs: some of what is trained on, the longest among them.
        longest: tokens of the longest sequence.
        args: layout says what is wanted, max_length stands in messages.
        backend: of the tree's attention.

    Raises:
        InputError: sequences that a model has no positions for, or a tree that is asked for by name and
            cannot be trusted.
    """
    for model in models:
        check_length(model, args.max_length, longest)
    if args.layout == "padded":
        return "padded"
    found = (choose_layout(model, pairs, backend) for model in models)
    reasons = [reason for layout, reason in found if layout == "padded"]
    if reasons and args.layout == "tree":
        raise InputError(
            reasons[0], field="train.layout", mend="Set it to auto: padded sequences are then used."
        )
    for reason in reasons:
        message = f"{reason}; separate padded sequences are used, which is slower"
        warnings.warn(message, DpoKitWarning, stacklevel=4)
    return "padded" if reasons else "tree"


def settle_attention(
    models: Sequence[nn.Module],
    pairs: Sequence[Example],
    args: PreferenceConfig,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Have `gathered` take the place of an attention backend that fails on a model, in `args.attention`.

    Args:
        models: trusted with the tree, on their device; one that is sharded is run by all ranks together.
        pairs: some of what is trained on.
        args: of the run.
        autocast: what the models run in.
    """
    if args.backend == "gathered":
        return
    with autocast():
        failures = filter(None, (backend_difference(m, pairs, args.backend) for m in models))
        wrong = next(failures, None)
    if wrong:
        message = f"attention '{args.backend}' is not right here ({wrong}); 'gathered' is used"
        warnings.warn(message, DpoKitWarning, stacklevel=4)
        args.attention = "gathered"
