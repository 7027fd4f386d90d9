"""Rewards by a sequence classifier of transformers: how much more likely a label is than the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.foreign_code import refuse_kernels, refused_code, require_safetensors
from dpo_kit.tokenizer import load_tokenizer

# What a label that is asked for by nothing else is called, in lower case; the second where there are two.
_POSITIVE = ("positive", "pos")
_SECOND_OF_TWO = ("label_1", "1")


class Classifier:
    """Texts -> the log-odds log(p / (1 - p)) of a label, without gradients.

    With two labels the difference of their logits; of independent labels (multi-label), or a single one, the
    label's logit. A text longer than the model can read is cut at its end, and there is one warning with
    the number of such texts in the call where they first come.

    Args:
        model: on the device that it is to run on; it is put in eval mode.
        tokenizer: its own.
        label: number of the label.
        token_budget: tokens of one forward pass, padding included.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, label: int, *, token_budget: int = 16384
    ) -> None:
        self._model, self._tokenizer, self._label = model.eval(), tokenizer, label
        self._token_budget, self._limit = token_budget, _longest(model, tokenizer)
        self._has_told = False
        self._can_pad = tokenizer.pad_token_id is not None
        if self._can_pad and model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """A number for each text; an empty one is read as a space, for tokenizers that make nothing of it."""
        if not texts:
            return []
        encoded = self._encode([text or " " for text in texts])
        found = torch.empty(len(texts), dtype=torch.float64)
        for places in self._batches([len(row["input_ids"]) for row in encoded]):
            rows = [encoded[place] for place in places]
            # Without a padding token there is one row.
            padded = self._tokenizer.pad(rows, return_tensors="pt") if self._can_pad else _as_batch(rows[0])
            logits = self._model(**{k: v.to(self._model.device) for k, v in padded.items()}).logits
            found[places] = self._log_odds(logits.double()).cpu()
        return found.tolist()

    def _encode(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        found = self._tokenizer(list(texts), padding=False, truncation=False, verbose=False)
        longer = [i for i, ids in enumerate(found["input_ids"]) if self._limit and len(ids) > self._limit]
        if longer:
            cut = [texts[i] for i in longer]
            shorter = self._tokenizer(cut, padding=False, truncation=True, max_length=self._limit)
            for name, rows in shorter.items():
                for i, row in zip(longer, rows, strict=True):
                    found[name][i] = row
            if not self._has_told:
                self._has_told = True
                message = (
                    f"{len(longer)} of {len(texts)} texts are longer than the {self._limit} tokens that "
                )
                message += "the classifier reads; their ends are not seen, nor will those of others be"
                warnings.warn(message, DpoKitWarning, stacklevel=3)
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of texts of like length."""
        batch: list[int] = []
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            full = (len(batch) + 1) * lengths[place] > self._token_budget or not self._can_pad
            if batch and full:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _log_odds(self, logits: Tensor) -> Tensor:
        """[rows, labels] -> [rows]."""
        chosen = logits[:, self._label]
        independent = self._model.config.problem_type == "multi_label_classification"
        if logits.shape[1] == 1 or independent:
            return chosen
        others = torch.cat([logits[:, : self._label], logits[:, self._label + 1 :]], 1)
        return chosen - others.logsumexp(1)


def load_classifier(name: str, *, field: str) -> Classifier:
    """The classifier that `MODEL[@LABEL]` names, on CUDA where there is one.

    Args:
        name: a folder or hub id, with weights in safetensors; no code of theirs is run. LABEL is one of its
            labels, in any case; without it, the one called positive (or, of two, LABEL_1).
        field: what names it, for errors.

    Raises:
        InputError: no such folder, no weights, or no such label; the message has the labels there are.
    """
    source, _, label = (name, "", "") if Path(name).is_dir() else name.rpartition("@")
    if not source:
        source, label = name, ""
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise InputError("no such folder", file=source, field=field, mend="Correct the path.")
    if Path(source).is_dir():
        require_safetensors(Path(source), field=field)
    try:
        tokenizer = load_tokenizer(source)
        refuse_kernels(AutoConfig.from_pretrained(source, trust_remote_code=False), source, field)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except InputError as error:
        mend = error.mend if error.field == field else "Save it beside the model."
        raise InputError(error.problem, file=source, field=field, mend=mend) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if refused := refused_code(error, source, field):
            raise refused from error
        problem = f"the classifier cannot be loaded: {str(error).strip().splitlines()[0]}"
        mend = "Save model and tokenizer with save_pretrained(); pickled weights are never loaded."
        raise InputError(problem, file=source, field=field, mend=mend) from error
    if lacking := sorted(found["missing_keys"]):
        problem = f"this is no classifier: its weights lack {', '.join(lacking[:3])}"
        raise InputError(problem, file=source, field=field, mend="Name a sequence classifier.")
    number = _number_of(label, model.config.id2label, source, field)
    return Classifier(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, number)


def _number_of(label: str, names: Mapping[int, str], source: str, field: str) -> int:
    known = {str(name).lower(): int(number) for number, name in names.items()}
    unasked = _POSITIVE + (_SECOND_OF_TWO if len(known) == 2 else ())
    for wanted in [label.lower()] if label else unasked:
        if wanted in known:
            return known[wanted]
    if not label and len(known) == 1:
        return 0
    raise InputError(
        f"the classifier has no label '{label}'" if label else "none of the classifier's labels is positive",
        file=source,
        field=field,
        mend=f"Write classifier:MODEL@LABEL with one of {', '.join(map(str, names.values()))}.",
    )


def _longest(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the longest text that a classifier can read; None where it has no limit."""
    limits = [tokenizer.model_max_length]
    if (positions := getattr(model.config, "max_position_embeddings", None)) is not None:
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa and its kind count positions from the one after that of padding.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    shortest = min(limits)
    return int(shortest) if shortest < 10**9 else None


def _as_batch(row: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([values]) for name, values in row.items()}
