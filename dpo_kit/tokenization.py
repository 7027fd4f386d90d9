"""Canonical pairs -> a data set of token ids, under a length policy; also loads and trains tokenizers.

Says for every pair what was done with it, and keeps the result on disk. How one pair becomes ids is in
`encoding`. Does not load or check rows (`pairs`), and makes no batches (`packing`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_kit.encoding import Pair, encode_pair, encode_rows, require_eos
from dpo_kit.errors import DpoKitWarning, InputError

__all__ = [
    "LengthPolicy",
    "TokenizedPairs",
    "encode_pair",
    "load_tokenizer",
    "tokenize_pairs",
    "train_byte_level_bpe",
]

# Part of the cache's key: raise it when the ids of the same rows change.
FORMAT_VERSION = 1

OVERLONG = ("drop", "cut_prompt_left", "cut_completion_right")
DROPPED = ("overlong", "prompt_too_long", "empty_prompt", "identical_after_tokenisation")
CUT = ("cut_prompt", "cut_completion")

INPUTS = ("prompt", "chosen", "rejected", "tools")
CARRIED = ("source", "weight", "margin", "prompt_id")
ROWS_PER_BATCH = 256

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class LengthPolicy:
    """What becomes of a pair whose longer sequence, prompt + completion, has more than `max_length` tokens.

    `drop`: it is left out.
    `cut_prompt_left`: the prompt loses its beginning (but not its BOS) until the longer sequence fits, alike
    for both; the pair is left out where no prompt token would stay.
    `cut_completion_right`: each completion loses its end, and with it the end token; the pair is left out
    where no completion token would stay.
    `max_length` None accepts every length. Raises `InputError` for an unknown name or a length below 2.
    """

    max_length: int | None = 1024
    overlong: str = "drop"

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            near = difflib.get_close_matches(str(self.overlong), OVERLONG, n=1, cutoff=0.0)[0]
            raise InputError(
                f"'{self.overlong}' is not one of {', '.join(OVERLONG)}",
                field="data.overlong",
                mend=f"Did you mean '{near}'?",
            )
        if self.max_length is not None and self.max_length < 2:
            raise InputError(
                f"{self.max_length} leaves no room for a prompt and a completion",
                field="data.max_length",
                mend="Set it to 2 or more, or to null for no limit",
            )

    def apply(self, pair: Pair, bos_id: int | None = None) -> tuple[Pair | None, str]:
        """-> the pair as it is kept (None: left out), and `kept` or one of `CUT` or `DROPPED`."""
        prompt, chosen, rejected = pair
        longest = max(len(chosen), len(rejected))
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return pair, "kept"
        if self.overlong == "cut_prompt_left":
            opening = prompt[:1] if prompt[:1] == [bos_id] else []
            room = self.max_length - longest - len(opening)
            if room > 0:
                return ([*opening, *prompt[-room:]], chosen, rejected), "cut_prompt"
        if self.overlong == "cut_completion_right":
            room = self.max_length - len(prompt)
            if room > 0:
                return (prompt, chosen[:room], rejected[:room]), "cut_completion"
            return None, "prompt_too_long"
        return None, "overlong"


@dataclass
class TokenizedPairs:
    """Pairs as ids, and what was done to get there.

    dataset: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int32), `index` (int64, the row's
        number in the input, from 0) and those of `CARRIED` that the input has; in the order of the input.
    counts: `rows`, `kept`, `dropped_<kind>` for each kind in `DROPPED`; among the kept, `cut_prompt`,
        `cut_completion`, and `inexact_border`: a token lies across the border of prompt and completion, and
        no ids of the completion alone give its text back there.
    places: for each of these but `rows` and `kept` that is not 0, the `source` of its first five rows.
    """

    dataset: datasets.Dataset
    counts: dict[str, int]
    places: dict[str, list[str]]

    def account(self) -> list[str]:
        """A line for everything that was left out or cut: what, how often, and where first."""
        happened = {kind: n for kind, n in self.counts.items() if n and kind not in ("rows", "kept")}
        return [
            f"{kind}: {n} of {self.counts['rows']} pairs ({', '.join(self.places.get(kind, []))}"
            f"{', ...' * (n > 5)})"
            for kind, n in happened.items()
        ]


def tokenize_pairs(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    overlong: str = "drop",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> TokenizedPairs:
    """Canonical pairs -> `TokenizedPairs`, from the cache where the same was done before.

    The cache is `<cache_dir>/tokens` (default: $DPO_KIT_CACHE, or ~/.cache/dpo_kit). Without `num_proc` a
    fast tokenizer uses all cores by threads; `num_proc` processes help where a chat template takes the
    time. The ids depend on neither.

    Raises `InputError` where the tokenizer has no EOS, or no chat template for a row of messages; where a
    template refuses a row; and where no pair is left.
    """
    policy = LengthPolicy(max_length, overlong)
    require_eos(tokenizer)
    if len(dataset) == 0:
        raise InputError(
            "there is no pair in the data", field="data.train", mend="Give a source that has rows"
        )
    columns = [name for name in (*INPUTS, *CARRIED) if name in dataset.column_names]
    rows = dataset.with_format(None).select_columns(columns)
    template_kwargs = dict(chat_template_kwargs or {})
    key = _cache_key(rows, tokenizer, policy, template_kwargs)
    carried = {name: rows.features[name] for name in columns if name in CARRIED}
    ids = datasets.List(datasets.Value("int32"))
    outcome = {"index": "int64", "outcome": "string", "length": "int64", "inexact": "bool"}
    mapped = _map_cached(
        rows,
        _tokens_folder(cache_dir) / f"{key}.arrow",
        num_proc,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "policy": policy, "template_kwargs": template_kwargs},
        remove_columns=[name for name in columns if name in INPUTS],
        features=datasets.Features(
            {
                **{f"{part}_ids": ids for part in ("prompt", "chosen", "rejected")},
                **{name: datasets.Value(dtype) for name, dtype in outcome.items()},
                **carried,
            }
        ),
        new_fingerprint=key,
        desc="Tokenising pairs",
    )
    return _gather(mapped, policy)


def longest_sequence(dataset: datasets.Dataset) -> tuple[int, int]:
    """Tokens of the longest sequence of a tokenised data set, and the number of its row."""
    table = dataset.with_format("arrow").select_columns(
        [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    )[:]
    lengths = [pa.compute.list_value_length(column).to_numpy() for column in table.columns]
    total = lengths[0] + np.max(lengths[1:], axis=0)
    row = int(total.argmax())
    return int(total[row]), row


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub repository; runs no code from there.

    A folder with nothing but `vocab.json` and `merges.txt` is taken for GPT-2's. Raises `InputError` where
    there is no tokenizer.
    """
    folder, field = Path(path).expanduser(), "model.tokenizer"
    mend = f"Set {field} (or model.path) to a folder with a tokenizer, or to a model's name on the hub"
    if not folder.is_dir() and (str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1):
        raise InputError("there is no such folder", file=path, field=field, mend=mend)
    if folder.is_dir() and not any(entry for glob in TOKENIZER_FILES for entry in folder.glob(glob)):
        raise InputError("the folder has no tokenizer", file=path, field=field, mend=mend)
    source = folder if folder.is_dir() else str(path)
    try:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} == {"vocab.json", "merges.txt"}:
            return GPT2Tokenizer.from_pretrained(source)
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False, use_fast=True)
        return _as_saved(folder, loaded) if folder.is_dir() else loaded
    except Exception as error:  # OSError, ValueError, KeyError; and the tokenizers library raises a bare one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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


def _tokenize_batch(
    batch: Mapping[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    policy: LengthPolicy,
    template_kwargs: dict[str, Any],
) -> dict[str, list]:
    """What `datasets.map` calls: a row for each input row, with no ids where the pair is left out."""
    inputs = [batch[name] for name in batch]
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*inputs, strict=True)]
    columns: dict[str, list] = {
        name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "outcome", "length", "inexact")
    }
    for pair, inexact in encode_rows(rows, tokenizer, template_kwargs):
        prompt, chosen, rejected = pair
        length = len(prompt) + max(len(chosen), len(rejected))
        kept, outcome = policy.apply(pair, tokenizer.bos_token_id) if prompt else (None, "empty_prompt")
        if kept is not None and kept[1] == kept[2]:
            kept, outcome = None, "identical_after_tokenisation"
        for name, value in zip(columns, (*(kept or ([], [], [])), outcome, length, inexact), strict=True):
            columns[name].append(value)
    return {**columns, "index": indices}


def _map_cached(rows: datasets.Dataset, file: Path, num_proc: int | None, **options: Any) -> datasets.Dataset:
    """`rows.map(_tokenize_batch)` from or to the file, which datasets writes whole and then renames."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder for the token cache: {error.strerror}",
            file=file.parent,
            mend="Set DPO_KIT_CACHE to a folder that can be written",
        ) from error
    written = any(file.parent.glob(f"{file.stem}*{file.suffix}"))
    processes = min(num_proc or 1, -(-len(rows) // ROWS_PER_BATCH))
    options |= {"cache_file_name": str(file), "num_proc": processes if processes > 1 else None}
    with _environment_kept():
        try:
            mapped = rows.map(_tokenize_batch, load_from_cache_file=True, **options)
            if len(mapped) == len(rows):
                return mapped
        except (pa.ArrowInvalid, OSError):
            if not written:
                raise
        warnings.warn(f"{file}: the token cache is damaged; tokenising again", DpoKitWarning, stacklevel=4)
        return rows.map(_tokenize_batch, load_from_cache_file=False, **options)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """datasets turns off the tokenizer's threads for its forks, and leaves `os.environ` another object."""
    environ, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _tokens_folder(cache_dir: str | Path | None) -> Path:
    root = cache_dir or os.environ.get("DPO_KIT_CACHE") or Path.home() / ".cache" / "dpo_kit"
    return Path(root).expanduser() / "tokens"


def _cache_key(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    policy: LengthPolicy,
    template_kwargs: dict[str, Any],
) -> str:
    """Digest of all that the mapped data set depends on, in 40 hexadecimal digits."""
    settings = [FORMAT_VERSION, asdict(policy), template_kwargs, _behaviour(tokenizer)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(rows.features.arrow_schema.remove_metadata().serialize())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        # A slice is written with parts of what it was sliced from; taken rows lie by themselves.
        for batch in table.combine_chunks().take(np.arange(len(table))).to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:40]


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides a tokenizer's ids; without the padding and truncation that a call leaves behind in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inner: Any = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    else:
        inner = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return {
        "class": type(tokenizer).__name__,
        "backend": inner,
        "special_tokens": tokenizer.special_tokens_map,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "chat_template": tokenizer.chat_template,
    }


def _gather(mapped: datasets.Dataset, policy: LengthPolicy) -> TokenizedPairs:
    """The mapped rows -> the kept ones, and the account of all."""
    outcomes = np.asarray(mapped["outcome"][:])
    kept = ~np.isin(outcomes, DROPPED)
    kinds = {f"dropped_{kind}": outcomes == kind for kind in DROPPED} | {
        kind: outcomes == kind for kind in CUT
    }
    kinds["inexact_border"] = kept & np.asarray(mapped["inexact"][:])
    counts = {"rows": len(mapped), "kept": int(kept.sum())}
    counts |= {kind: int(rows.sum()) for kind, rows in kinds.items()}
    if not counts["kept"]:
        raise _nothing_left(counts, mapped["length"][:], policy)
    places = {kind: _places(mapped, np.flatnonzero(rows)[:5]) for kind, rows in kinds.items() if rows.any()}
    dataset = mapped.remove_columns(["outcome", "length", "inexact"])
    if not kept.all():
        dataset = dataset.select(np.flatnonzero(kept))
    return TokenizedPairs(dataset, counts, places)


def _places(mapped: datasets.Dataset, rows: np.ndarray) -> list[str]:
    sources = mapped.select(rows)["source"][:] if "source" in mapped.column_names else [None] * len(rows)
    return [source or f"row {row + 1}" for source, row in zip(sources, rows, strict=True)]


def _nothing_left(counts: dict[str, int], lengths: list[int], policy: LengthPolicy) -> InputError:
    reasons = ", ".join(
        f"{count} {kind}" for kind, count in counts.items() if kind.startswith("dropped_") and count
    )
    problem = f"no pair is left of {counts['rows']} ({reasons})"
    if not (counts["dropped_overlong"] or counts["dropped_prompt_too_long"]):
        return InputError(
            problem, field="data.train", mend="Use pairs with a prompt and two different replies"
        )
    return InputError(
        f"{problem}; the longest has {max(lengths)} tokens, the median {median(lengths):.0f}, "
        f"and data.max_length is {policy.max_length}",
        field="data.max_length",
        mend=f"Raise data.max_length, to {max(lengths)} for all of them",
    )
