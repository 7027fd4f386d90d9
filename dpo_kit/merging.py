"""An adapter and its base model -> one model folder (`dpo-kit merge`), compared before and after.

The adapter is merged in fp32, whatever dtype is written. Where it was trained on a quantised base, as the
recipe of its run says, it is merged into what those quantised weights stand for. Nothing has the name of the
result until its logits were compared.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_kit.adapter_folders import base_of, is_adapter, reads_rewards, run_recipe_of, saves
from dpo_kit.adapters import put_adapter
from dpo_kit.errors import DpoKitError, InputError
from dpo_kit.examples import example_of
from dpo_kit.measurement import Say
from dpo_kit.models import embedded_tokens, is_reward_model, load_config, load_model, load_reward_model
from dpo_kit.padding import no_padding_token
from dpo_kit.pairs import LoadOptions, load_with_report
from dpo_kit.quantised import quantised_layers
from dpo_kit.recipe import Recipe
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import has_tokenizer, load_tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Random sequences that are always compared, their length, and the seed.
_SEQUENCES, _TOKENS, _SEED = 4, 32, 0
# Of the data, so many pairs, and of each of their sequences the first so many tokens.
_PAIRS, _LONGEST = 4, 128
# What rounding may make of a logit, as a share of the largest one.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}


class MergeError(DpoKitError):
    """The merged model is another than the base with its adapter."""


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        folder: the model.
        base: what it was merged into.
        dtype: of the weights as written.
        quantised: whether the base's weights are those that quantised ones stand for.
        sequences: number of those that were compared.
        effect: the most that the adapter changes a logit.
        difference: the most that merging changes one, in fp32 (fp64 where that is written).
        written: the most that merging and then rounding to `dtype` changes one.
    """

    folder: Path
    base: str
    dtype: str
    quantised: bool
    sequences: int
    effect: float
    difference: float
    written: float


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    data: Sequence[str] = (),
    say: Say = print,
) -> Merged:
    """Merge an adapter into its base model and write the model, with the tokenizer.

    Args:
        adapter: its folder.
        out: the folder to write, which is not there yet.
        base: folder or hub id of the base model, whole or quantised; default: what the adapter names.
        dtype: of the weights that are written; "auto": as the base model's own.
        data: sources of pairs; the logits are compared on the first of them too.
        say: gets lines of progress.

    Raises:
        InputError: no such adapter or base, one that does not fit the other, a kind that cannot be merged,
            or a folder that is there.
        MergeError: the logits differ by more than rounding; nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    _check(adapter, out, dtype)
    base = base_of(adapter) if base is None else base
    tokenizer = load_tokenizer(adapter if has_tokenizer(adapter) else base)
    kept = _saved_dtype(base) if dtype == "auto" else getattr(torch, dtype)
    model, quantised = _load_base(adapter, base, kept, say)
    sequences = _random_sequences(model) + _data_sequences(data, tokenizer)
    bare = _logits(model, sequences)
    adapted = put_adapter(model, adapter, as_trained=True)
    before = _logits(adapted, sequences)
    merged = _merge(adapted, adapter)
    effect = _difference(bare, before)
    difference = _difference(before, _logits(merged, sequences))
    if not difference <= _allowed(before, merged.dtype):
        raise MergeError(
            f"merged, the model is another: a logit differs by {difference:.3g}, where the adapter changes "
            f"them by up to {effect:.3g}. Nothing was written. All commands take the adapter on its base too"
        )
    say(f"the adapter changes logits by up to {effect:.2e}, and merging it by {difference:.2e}")
    with _written_whole(out) as folder:
        written = _write(merged, kept, tokenizer, folder, sequences, before)
    name = str(kept).removeprefix("torch.")
    say(f"wrote {out} in {name}: there logits differ from the adapter's by up to {written:.2e}")
    return Merged(out, base, name, quantised, len(sequences), effect, difference, written)


def _check(adapter: Path, out: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'", field="--dtype", mend=f"Known: {', '.join(DTYPES)}.")
    if not is_adapter(adapter):
        mend = "Name a folder with adapter_config.json, such as the model folder of a run with an adapter."
        raise InputError("this is no adapter's folder", file=adapter, field="ADAPTER", mend=mend)
    if out.exists() or not out.parent.is_dir():
        problem = "it is there already" if out.exists() else "its folder is not there"
        raise InputError(problem, file=out, field="OUT", mend="Name a new folder in one that is there.")


def _load_base(adapter: Path, base: str, kept: torch.dtype, say: Say) -> tuple[Any, bool]:
    """The base model in fp32 (fp64 where that is kept), and whether it stands for quantised weights."""
    computing = torch.float64 if kept == torch.float64 else torch.float32
    options, trained_in = _trained_on(adapter)
    quantised = options.get("quantization") is not None
    # What is quantised depends on the dtype it is quantised from.
    dtype = trained_in if quantised else computing
    if reads_rewards(adapter):
        model, is_new = load_reward_model(base, dtype, **options)
        if is_new and not saves(adapter, "score"):
            raise InputError(
                "neither the adapter nor its base has a value head", file=adapter, field="ADAPTER"
            )
    else:
        model = load_model(base, dtype, **options)
    if quantised_layers(model):
        quantised = True
        say(
            "the adapter was trained on a quantised base: it is merged into the weights which that stands for"
        )
        model = model.dequantize()
    return _set_dtype(model, computing).eval(), quantised


def _set_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model, its parameters in another dtype; buffers, such as rotary frequencies, stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _trained_on(adapter: Path) -> tuple[dict[str, Any], torch.dtype]:
    """How the run that trained an adapter loaded its base, by the recipe beside it; else as it is saved."""
    if (path := run_recipe_of(adapter)) is not None:
        recipe = Recipe.load(path)
        return recipe.loading_options(), getattr(torch, recipe.model.dtype)
    return {}, torch.float32


def _saved_dtype(base: str) -> torch.dtype:
    found = getattr(load_config(base), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _random_sequences(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_SEQUENCES, _TOKENS)
    return list(torch.randint(embedded_tokens(model), shape, generator=generator))


def _data_sequences(sources: Sequence[str], tokenizer: Any) -> list[Tensor]:
    if not sources:
        return []
    rows, _ = load_with_report(list(sources), LoadOptions(invalid="drop"))
    data = tokenize_pairs(rows.select(range(min(len(rows), _PAIRS))), tokenizer, max_length=None).dataset
    examples = map(example_of, data)
    return [
        torch.tensor([*example.prompt, *reply])[:_LONGEST]
        for example in examples
        for reply in example.replies
    ]


@torch.no_grad()
def _logits(model: nn.Module, sequences: list[Tensor]) -> list[Tensor]:
    """Of each sequence by itself [T]: [1, T, V] of a causal LM, [1, 1] of a reward model."""
    with no_padding_token(model):
        return [model(input_ids=ids[None]).logits for ids in sequences]


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest, nan where there is one."""
    parts = [(a.double() - b.double()).abs().max() for a, b in zip(first, second, strict=True)]
    return float(torch.stack(parts).max())


def _merge(adapted: Any, adapter: Path) -> PreTrainedModel:
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"peft cannot merge this adapter: {reason}"
        mend = "Use it on its base: all commands take its folder as a model."
        raise InputError(problem, file=adapter, field="ADAPTER", mend=mend) from error
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        # An adapter's own copy of one of the two has parted them.
        merged.config.get_text_config().tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    return merged


def _allowed(logits: list[Tensor], computing: torch.dtype) -> float:
    """What rounding may make of the largest of these."""
    return _ROUNDING[computing] * max(1.0, *(float(part.abs().max()) for part in logits))


def _write(
    merged: PreTrainedModel,
    kept: torch.dtype,
    tokenizer: Any,
    folder: Path,
    sequences: list[Tensor],
    before: list[Tensor],
) -> float:
    """Save the model and read it back; how far its logits are from those before merging."""
    computing = merged.dtype
    _set_dtype(merged, kept)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Its weights as they are rounded now, computed with as before.
    rounded = _logits(_set_dtype(merged, computing), sequences)
    if not all(bool(torch.isfinite(part).all()) for part in rounded):
        raise MergeError(
            f"in {kept} the model's logits are not finite, and it is not kept. Give another --dtype"
        )
    load = load_reward_model if is_reward_model(merged) else load_model
    loaded: Any = load(folder, computing)
    loaded = loaded[0] if isinstance(loaded, tuple) else loaded
    found = _logits(loaded.eval(), sequences)
    if not _difference(found, rounded) <= _allowed(before, computing):
        raise MergeError("what was written is another model than what was merged, and it is not kept")
    return _difference(before, found)


@contextlib.contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder to write, which has its name afterwards, or is gone where the body raised."""
    folder = out.with_name(f".{out.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
