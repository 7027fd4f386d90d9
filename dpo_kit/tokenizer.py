"""Where tokenizers come from: a folder, the hub, or texts that a new one is learned from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from dpo_kit.adapter_folders import base_of, is_adapter
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.foreign_code import refused_code, tell_of_code

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there are a tokenizer's files in a folder."""
    return any(entry for glob in TOKENIZER_FILES for entry in Path(folder).glob(glob))


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub repository; runs no code from there unless told to trust it.

    A folder with nothing but `vocab.json` and `merges.txt` is taken for GPT-2's, and an adapter's without a
    tokenizer for its base model's. Raises `InputError` where there is no tokenizer.
    """
    folder, field = Path(path).expanduser(), "model.tokenizer"
    mend = f"Set {field} (or model.path) to a folder with a tokenizer, or to a model's name on the hub"
    if not folder.is_dir() and (str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1):
        raise InputError("there is no such folder", file=path, field=field, mend=mend)
    if folder.is_dir() and not has_tokenizer(folder):
        if is_adapter(folder):
            return load_tokenizer(base_of(folder))
        raise InputError("the folder has no tokenizer", file=path, field=field, mend=mend)
    source = folder if folder.is_dir() else str(path)
    try:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} == {"vocab.json", "merges.txt"}:
            return GPT2Tokenizer.from_pretrained(source)
        if trust_remote_code:
            tell_of_code(source, get_tokenizer_config(source))
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, use_fast=True)
        return _as_saved(folder, loaded) if folder.is_dir() else loaded
    except Exception as error:  # OSError, ValueError, KeyError; and the tokenizers library raises a bare one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if refused := refused_code(error, path, field):
            raise refused from error
        problem = f"the tokenizer cannot be loaded: {reason}"
        raise InputError(problem, file=path, field=field, mend=mend) from error


def _as_saved(folder: Path, loaded: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that the folder's tokenizer.json describes.

    For some model types (Qwen2) AutoTokenizer puts the family's own class, with its own way of splitting, in
    the place of the class that the folder names, and other ids come out than the ones it was saved with.
    """
    names, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (names.is_file() and file.is_file() and loaded.is_fast):
        return loaded
    named = str(json.loads(names.read_text(encoding="utf-8")).get("tokenizer_class", ""))
    if named.removesuffix("Fast") in ("", type(loaded).__name__.removesuffix("Fast")):
        return loaded
    saved, used = (
        json.loads(text) for text in (file.read_text(encoding="utf-8"), loaded.backend_tokenizer.to_str())
    )
    if all(saved.get(part) == used.get(part) for part in ("normalizer", "pre_tokenizer")):
        return loaded
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, eos_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's (Radford et al. 2019), learned from the texts.

    Id 0 is `eos_token`, which is BOS as well, id 1 the padding token `<|pad|>`. Adds no special token by
    itself; the same texts give the same vocabulary. Raises `InputError` for a vocabulary smaller than the
    bytes, warns (`DpoKitWarning`) where the texts have too few different words to fill it.
    """
    special = [eos_token, "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise InputError(
            f"{vocab_size} tokens cannot hold the {len(alphabet)} bytes and {len(special)} special tokens",
            field="vocab_size",
            mend=f"Set it to {len(alphabet) + len(special)} or more",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if (size := backend.get_vocab_size()) < vocab_size:
        warnings.warn(
            f"the texts fill a vocabulary of {size} only, not {vocab_size}", DpoKitWarning, stacklevel=2
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=eos_token,
        eos_token=eos_token,
        pad_token=special[1],
        clean_up_tokenization_spaces=False,
    )
