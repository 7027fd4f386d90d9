"""Plain text -> a policy trained on it: where a run starts from that has no policy yet, or none of the kind.

From random weights and a tokenizer learned on the same text, or from a model that is there, with its own.
A document is a sequence without a rejected reply: the trainer, the tree and the kernel are the same as for
pairs, with the `sft` loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_kit import ranks
from dpo_kit.adapter_folders import is_adapter
from dpo_kit.checkpoint_folders import newest_checkpoint
from dpo_kit.encoding import opening_of, require_eos
from dpo_kit.errors import InputError
from dpo_kit.models import check_length, embedded_tokens, load_config, load_model
from dpo_kit.recipe import Recipe, SftSection, make_training_config
from dpo_kit.run_folder import without_leftovers, write_text
from dpo_kit.texts import read_texts
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer

# One process computes in one precision: accelerate holds it for both stages.
_INHERITED = ("bf16", "fp16", "use_cpu", "disable_tqdm")


_DOCUMENTS_AT_ONCE = 1000


def read_corpus(section: SftSection) -> Iterator[str]:
    """The documents of the corpus in order, as many as are asked for; empty ones are none.

    Raises:
        InputError: while reading; see `read_texts`. And at the end, where there was no document at all.
    """
    number = 0
    for number, document in enumerate(  # noqa: B007
        islice(read_texts(section.corpus, field="sft.corpus"), section.documents), 1
    ):
        yield document
    if not number:
        raise InputError("there is no text in the corpus", file=section.corpus[0], field="sft.corpus")


def check_corpus(recipe: Recipe) -> None:
    """Refuse what would stop the stage, before anything is written.

    Raises:
        InputError: the corpus, the settings, the configuration or the model.
    """
    assert recipe.sft is not None
    if is_adapter(recipe.model.path):
        raise InputError(
            "an adapter is no model for SFT",
            file=recipe.model.path,
            field="model.path",
            mend="Merge it into its base first (dpo-kit merge), or leave sft out.",
        )
    for _ in read_corpus(recipe.sft):
        pass
    make_training_config({"output_dir": "sft"} | recipe.sft.train)
    source = recipe.model.path or recipe.model.config or {}
    load_config(source, trust_remote_code=recipe.model.trust_remote_code)
    if named := _named_tokenizer(recipe):
        require_eos(load_tokenizer(named, **recipe.tokenizer_options()))


def learn_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS before every text, as the policy sees it in training."""
    tokenizer = train_byte_level_bpe(documents, vocabulary)
    bos, bos_id = str(tokenizer.bos_token), int(tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def text_rows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """Documents -> rows of ids for the `sft` loss, and how many were cut at `max_length` tokens.

    A document begins as a prompt does later: with what the tokenizer by itself puts before a text, BOS or
    nothing. With nothing its first token is the one that is not learned, since there is none before it.
    """
    if max_length < 2:
        raise ValueError(f"max_length must leave room for two tokens, got {max_length}")
    opening = opening_of(tokenizer)
    rows: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": []}
    cut = 0
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        part = list(documents[start : start + _DOCUMENTS_AT_ONCE])
        encoded: Any = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            whole = [*opening, *ids, tokenizer.eos_token_id]
            seen = max(1, len(opening))
            rows["prompt_ids"].append(whole[:seen])
            rows["chosen_ids"].append(whole[seen:max_length])
            cut += len(whole) > max_length
    rows["source"] = [f"document {number}" for number in range(1, len(documents) + 1)]
    return Dataset.from_dict(rows), cut


def train_sft(section: SftSection, recipe: Recipe, folder: Path) -> None:
    """Train the policy on the corpus; `folder` holds model/ and figures.json afterwards.

    It goes on from a checkpoint that lies there: of a stage that was stopped, or saved some (`sft.train`).

    Args:
        section: what to train on.
        recipe: its model section says where from, and the seed comes from its train section.
        folder: a run folder of its own.

    Raises:
        InputError: corpus, model, tokenizer and settings do not fit together.
    """
    documents = list(read_corpus(section))
    seed = int(recipe.train.get("seed", 42))
    model, tokenizer = _start(recipe, documents, section.vocabulary, seed)
    dataset, cut = text_rows(documents, tokenizer, section.max_length)
    longest = max(map(len, dataset["chosen_ids"])) + len(dataset[0]["prompt_ids"])
    check_length(model, section.max_length, longest, field="sft.max_length")
    inherited = {key: recipe.train[key] for key in _INHERITED if key in recipe.train}
    settings = {"seed": seed, "save_strategy": "no"} | inherited | section.train
    config = make_training_config(settings | {"output_dir": str(folder), "loss": "sft"})
    trainer = PreferenceTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    checkpoint = newest_checkpoint(folder)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    figures = {
        "sft/runtime": trainer.train_seconds,
        "sft/loss": float(result.metrics["train_loss"]),
        "sft/tokens": int(trainer.cost()["tokens"]),
        "sft/documents": len(dataset),
        "sft/documents_cut": cut,
    }
    written = without_leftovers(folder / "model.writing")
    trainer.save_model(str(written))
    ranks.wait()
    if ranks.is_first():
        write_text(folder / "figures.json", json.dumps(figures))
        written.rename(folder / "model")
    ranks.wait()


def _named_tokenizer(recipe: Recipe) -> str | None:
    """The tokenizer that is there; None where one is learned on the corpus."""
    return recipe.model.tokenizer or recipe.model.path


def _start(
    recipe: Recipe, documents: Sequence[str], vocabulary: int, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before the stage, and its tokenizer."""
    dtype, named = getattr(torch, recipe.model.dtype), _named_tokenizer(recipe)
    options = recipe.tokenizer_options()
    tokenizer = load_tokenizer(named, **options) if named else learn_tokenizer(documents, vocabulary)
    require_eos(tokenizer)
    if recipe.model.path is None:
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return load_model((recipe.model.config or {}) | special, dtype, seed), tokenizer
    model = load_model(recipe.model.path, dtype, trust_remote_code=recipe.model.trust_remote_code)
    if len(tokenizer) > (rows := embedded_tokens(model)):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}",
            field="model.tokenizer",
            mend="Use the model's own tokenizer.",
        )
    return model, tokenizer
