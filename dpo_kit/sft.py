"""Plain text -> a tokenizer and a policy trained on it: where a run from a configuration starts.

A document is a sequence without a rejected reply: the trainer, the tree and the kernel are the same
as for pairs, with the `sft` loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_kit.errors import InputError
from dpo_kit.models import load_config, load_model
from dpo_kit.recipe import Recipe, SftSection, make_training_config
from dpo_kit.tokenizer import train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer

# One process computes in one precision: accelerate holds it for both stages.
_INHERITED = ("bf16", "fp16", "use_cpu", "disable_tqdm")


def read_corpus(paths: Sequence[str]) -> list[str]:
    """The documents of text files, one a line, in order; empty lines are none.

    Raises:
        InputError: a file is not there, is not UTF-8, or there is no document at all.
    """
    documents = []
    for path in paths:
        try:
            documents += [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            raise InputError(f"the corpus cannot be read: {problem}", file=path, field="sft.corpus") from None
    if not documents:
        raise InputError("there is no text in the corpus", file=paths[0], field="sft.corpus")
    return documents


def check_corpus(recipe: Recipe) -> None:
    """Refuse what would stop the stage, before anything is written.

    Raises:
        InputError: the corpus, the settings or the configuration.
    """
    assert recipe.sft is not None
    read_corpus(recipe.sft.corpus)
    make_training_config({"output_dir": "sft"} | recipe.sft.train)
    load_config(recipe.model.config or {})


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
    """Documents -> rows of ids for the `sft` loss, and how many were cut at `max_length` tokens."""
    if max_length < 2:
        raise ValueError(f"max_length must leave room for BOS and a token, got {max_length}")
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    whole = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    rows = {
        "prompt_ids": [[tokenizer.bos_token_id]] * len(whole),
        "chosen_ids": [ids[: max_length - 1] for ids in whole],
        "source": [f"document {number}" for number in range(1, len(whole) + 1)],
    }
    return Dataset.from_dict(rows), sum(len(ids) > max_length - 1 for ids in whole)


def train_sft(section: SftSection, recipe: Recipe, folder: Path) -> None:
    """Train tokenizer and policy on the corpus; `folder` holds model/ and figures.json afterwards.

    Args:
        section: what to train on.
        recipe: its model section gives the configuration and the seed comes from its train section.
        folder: a run folder of its own.
    """
    documents = read_corpus(section.corpus)
    tokenizer = learn_tokenizer(documents, section.vocabulary)
    seed = int(recipe.train.get("seed", 42))
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = load_model((recipe.model.config or {}) | special, seed=seed)
    dataset, cut = text_rows(documents, tokenizer, section.max_length)
    inherited = {key: recipe.train[key] for key in _INHERITED if key in recipe.train}
    settings = {"seed": seed, "save_strategy": "no"} | inherited | section.train
    config = make_training_config(settings | {"output_dir": str(folder), "loss": "sft"})
    trainer = PreferenceTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    result = trainer.train()
    figures = {
        "sft/runtime": float(result.metrics["train_runtime"]),
        "sft/loss": float(result.metrics["train_loss"]),
        "sft/documents": float(len(dataset)),
        "sft/documents_cut": float(cut),
    }
    trainer.save_model(str(folder / "model.writing"))
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "model.writing").rename(folder / "model")
