"""Canonical rows of any kind -> a data set of token ids, under a length policy.

Says for every row what was done with it, and keeps the result on disk. How rows become ids is in `encoding`,
what becomes of long ones in `length_policy`. Does not load or check rows (`pairs`), and makes no batches
(`packing`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from dpo_kit.batch_encoding import EncodedRows, Sequences, encode_groups
from dpo_kit.cache_folder import cache_folder
from dpo_kit.encoding import require_eos
from dpo_kit.errors import InputError
from dpo_kit.length_policy import CUT, DROPPED, LengthPolicy, outcome_of
from dpo_kit.pairs.kinds import KINDS_OF_ROWS, LISTS, UNPAIRED, Kind, kind_of_columns, kind_of_ids
from dpo_kit.pairs.schema import BadRow, checked_label, checked_scores
from dpo_kit.token_cache import map_cached

# Part of the cache's key: raise it when the ids of the same rows change, or what becomes of them.
FORMAT_VERSION = 3

CARRIED = ("source", "weight", "margin", "prompt_id")
# Memory holds so many rows as text, ids and what the tokenizer knows of them besides: about 100 MB.
ROWS_PER_BATCH = 4096


@dataclass
class TokenizedPairs:
    """Rows as ids, and what was done to get there.

    dataset: in the order of the input; columns `index` (int64, the row's number in the input, from 0), those
        of `CARRIED` that the input has, and (lists of int32)
        of pairs `prompt_ids`, `chosen_ids`, `rejected_ids`;
        of unpaired rows `prompt_ids`, `completion_ids`, and `label` (bool);
        of ranked lists `prompt_ids`, `completions_ids` (a list of them), and `scores` (list of float64).
    counts: `rows`, `kept`, `dropped_<kind>` for each kind in `DROPPED`; among the kept, `cut_prompt`,
        `cut_completion`; `inexact_border`: a token lies across the border of prompt and completion, and no
        ids of the completion alone give its text back there; and `template_drops`: the chat template leaves
        tools, a tool call, a tool's result or the content of a message out of the prompt (of rows without
        tools and extras only the system turns are looked at; the reasoning of earlier turns, which templates
        take out on purpose, does not count). A list is `identical_after_tokenisation`
        where it has fewer than two different completions left, or where a cut made completions with
        different scores equal; and `all_tied` where its scores are all equal (`load_pairs` gives no such).
    places: for each of these but `rows` and `kept` that is not 0, the `source` of its first five rows.
    """

    dataset: datasets.Dataset
    counts: dict[str, int]
    places: dict[str, list[str]]

    def account(self) -> list[str]:
        """A line for everything that was left out or cut: what, how often, and where first."""
        kind_of_rows = kind_of_ids(self.dataset.column_names)
        assert kind_of_rows is not None
        rows = kind_of_rows.rows
        happened = {kind: n for kind, n in self.counts.items() if n and kind not in ("rows", "kept")}
        return [
            f"{kind}: {n} of {self.counts['rows']} {rows} ({', '.join(self.places.get(kind, []))}"
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
    """Canonical rows of one kind -> `TokenizedPairs`, from the cache where the same was done before.

    The cache is `<cache_dir>/tokens` (default: $DPO_KIT_CACHE, or ~/.cache/dpo_kit). Without `num_proc` a
    fast tokenizer uses all cores by threads; `num_proc` processes help where a chat template takes the
    time. The ids depend on neither.

    Raises `InputError` where the columns are of no kind of canonical rows; where the tokenizer has no EOS, or
    no chat template for a row of messages; where a template refuses a row; for labels and scores that
    `load_pairs` would refuse; and where no row is left.
    """
    policy = LengthPolicy(max_length, overlong)
    require_eos(tokenizer)
    if len(dataset) == 0:
        raise InputError(
            "there is no row in the data", field="data.train", mend="Give a source that has rows"
        )
    kind = kind_of_columns(dataset.column_names)
    if kind is None:
        raise InputError(
            f"the data set has none of the known sets of columns, only: {', '.join(dataset.column_names)}",
            field="data.train",
            mend="Load it with load_pairs, which makes one of: "
            + "; ".join(", ".join(known.columns) for known in KINDS_OF_ROWS),
        )
    columns = [
        name
        for name in (*kind.columns, "tools", "chat_template_kwargs", *CARRIED)
        if name in dataset.column_names
    ]
    rows = dataset.with_format(None).select_columns(columns)
    template_kwargs = dict(chat_template_kwargs or {})
    key = _cache_key(rows, tokenizer, policy, template_kwargs)
    features = _mapped_features(kind, {name: rows.features[name] for name in columns if name in CARRIED})
    mapped = map_cached(
        rows,
        _tokenize_batch,
        cache_folder(cache_dir, "tokens") / f"{key}.arrow",
        min(num_proc or 1, -(-len(rows) // ROWS_PER_BATCH)),
        batched=True,
        batch_size=ROWS_PER_BATCH,
        with_indices=True,
        fn_kwargs={
            "kind": kind,
            "tokenizer": tokenizer,
            "policy": policy,
            "template_kwargs": template_kwargs,
            "schema": features.arrow_schema,
        },
        features=features,
        new_fingerprint=key,
        desc=f"Tokenising {kind.rows}",
    )
    return _gather(mapped, policy)


def _mapped_features(kind: Kind, carried: dict[str, Any]) -> datasets.Features:
    """The columns that `_tokenize_batch` gives beside those it leaves as they are."""
    ids = datasets.List(datasets.Value("int32"))
    replies = {name: datasets.List(ids) if kind == LISTS else ids for name in kind.ids}
    outcome = {"index": "int64", "outcome": "string", "length": "int64", "inexact": "bool", "drops": "bool"}
    judgements = {"label": datasets.Value("bool"), "scores": datasets.List(datasets.Value("float64"))}
    return datasets.Features(
        {
            "prompt_ids": ids,
            **replies,
            **{name: datasets.Value(dtype) for name, dtype in outcome.items()},
            **({kind.judgement: judgements[kind.judgement]} if kind.judgement else {}),
            **carried,
        }
    )


def longest_sequence(dataset: datasets.Dataset) -> tuple[int, int]:
    """Tokens of the longest sequence of a tokenised data set of any kind, and the number of its row."""
    replies = [name for kind in KINDS_OF_ROWS for name in kind.ids]
    names = [name for name in ("prompt_ids", *replies) if name in dataset.column_names]
    table = dataset.with_format("arrow").select_columns(names)[:]
    lengths = [_longest_of_each(column) for column in table.columns]
    total = lengths[0] + np.max(lengths[1:], axis=0)
    row = int(total.argmax())
    return int(total[row]), row


def _longest_of_each(column: pa.ChunkedArray) -> np.ndarray:
    """[N] length of each row's list; of a list of lists, that of the longest of them."""
    if not pa.types.is_list(column.type.value_type):
        return pa.compute.list_value_length(column).to_numpy()
    longest = []
    for chunk in column.chunks:
        bounds = chunk.offsets.to_numpy()
        lengths = pa.compute.list_value_length(chunk.flatten()).to_numpy()
        longest.append(np.maximum.reduceat(lengths, bounds[:-1] - bounds[0]))
    return np.concatenate(longest)


def _tokenize_batch(
    batch: pa.Table,
    indices: list[int],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    policy: LengthPolicy,
    template_kwargs: dict[str, Any],
    schema: pa.Schema,
) -> pa.Table:
    """What `datasets.map` calls: a row for each input row, with no ids where the row is left out."""
    rows = batch.to_pylist()
    judgements = [_judgement(row, kind) for row in rows] if kind.judgement else []
    tables, start = [], 0
    for encoded in encode_groups(rows, tokenizer, template_kwargs):
        end = start + len(encoded.counts)
        tables.append(_outcomes(encoded, judgements[start:end], kind, policy, tokenizer.bos_token_id))
        start = end
    done = pa.concat_tables(tables)
    columns: dict[str, Any] = {
        **dict(zip(done.column_names, done.columns, strict=True)),
        "index": indices,
        **({kind.judgement: judgements} if kind.judgement else {}),
        **{name: batch[name] for name in CARRIED if name in batch.column_names},
    }
    return pa.table(columns, schema)


def _outcomes(
    encoded: EncodedRows, judgements: list[Any], kind: Kind, policy: LengthPolicy, bos_id: int | None
) -> pa.Table:
    """Ids as they are kept, and what was done. What is kept whole stays in arrays; only the other rows are
    looked at one by one."""
    first = np.cumsum(encoded.counts) - encoded.counts  # each row's first reply
    lengths = encoded.prompts.lengths + np.maximum.reduceat(encoded.replies.lengths, first)
    outcomes = np.full(len(first), "kept", dtype=object)
    prompts: dict[int, list[int]] = {}
    replies: dict[int, list[int]] = {}
    for row in _not_surely_whole(encoded, first, lengths, kind, policy):
        own = range(first[row], first[row] + encoded.counts[row])
        ids = encoded.prompts.ids(row), [encoded.replies.ids(reply) for reply in own]
        scores = judgements[row] if kind == LISTS else ()
        kept, outcomes[row] = outcome_of(ids, kind, scores, policy, bos_id)
        if kept is not ids:
            prompts[row], kept_replies = kept or ([], [[] for _ in own])
            replies.update(zip(own, kept_replies, strict=True))
    return pa.table(
        {
            "prompt_ids": _list_array(encoded.prompts.replaced(prompts)),
            **_reply_columns(
                encoded.replies.replaced(replies), encoded.counts, np.isin(outcomes, DROPPED), kind
            ),
            "outcome": pa.array(outcomes, pa.string()),
            "length": lengths,
            "inexact": encoded.inexact,
            "drops": encoded.drops,
        }
    )


def _not_surely_whole(
    encoded: EncodedRows, first: np.ndarray, lengths: np.ndarray, kind: Kind, policy: LengthPolicy
) -> list[int]:
    """The rows of which lengths alone do not say that they are kept as they are."""
    if kind == LISTS:
        return list(range(len(lengths)))
    rows = encoded.prompts.lengths == 0
    if policy.max_length is not None:
        rows |= lengths > policy.max_length
    if kind != UNPAIRED:
        of_reply = encoded.replies.lengths
        rows |= of_reply[first] == of_reply[first + 1]
    return np.flatnonzero(rows).tolist()


def _reply_columns(replies: Sequences, counts: np.ndarray, dropped: np.ndarray, kind: Kind) -> dict[str, Any]:
    """The replies of all rows, one after the other, by column; a list that is dropped has none."""
    if kind == LISTS:
        kept = replies.take(np.flatnonzero(np.repeat(~dropped, counts)))
        bounds = np.concatenate([[0], np.cumsum(np.where(dropped, 0, counts))]).astype(np.int32)
        return {kind.ids[0]: pa.ListArray.from_arrays(pa.array(bounds), _list_array(kept))}
    first = np.cumsum(counts) - counts
    return {name: _list_array(replies.take(first + place)) for place, name in enumerate(kind.ids)}


def _list_array(sequences: Sequences) -> pa.ListArray:
    ids, bounds = sequences.joined()
    return pa.ListArray.from_arrays(pa.array(bounds), pa.array(ids))


def _judgement(row: Mapping[str, Any], kind: Kind) -> bool | list[float]:
    """The row's label or scores, checked as `load_pairs` does: a data set may be made without it."""
    try:
        if kind == UNPAIRED:
            return checked_label(row["label"])
        if len(row["completions"]) < 2:
            raise BadRow("a list needs two completions or more", field="completions")
        return checked_scores(row, len(row["completions"]))
    except BadRow as bad:
        raise InputError(bad.message, file=row.get("source"), field=bad.field, mend=bad.mend) from bad


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
    table = mapped.with_format("arrow").select_columns(["outcome", "inexact", "drops"])[:]
    kinds = {f"dropped_{kind}": _equal(table["outcome"], kind) for kind in DROPPED}
    kept = ~np.any(list(kinds.values()), axis=0)
    kinds |= {kind: _equal(table["outcome"], kind) for kind in CUT}
    kinds["inexact_border"] = kept & table["inexact"].to_numpy()
    kinds["template_drops"] = kept & table["drops"].to_numpy()
    counts = {"rows": len(mapped), "kept": int(kept.sum())}
    counts |= {kind: int(rows.sum()) for kind, rows in kinds.items()}
    if not counts["kept"]:
        raise _nothing_left(counts, mapped["length"][:], policy)
    places = {kind: _places(mapped, np.flatnonzero(rows)[:5]) for kind, rows in kinds.items() if rows.any()}
    dataset = mapped.remove_columns(["outcome", "length", "inexact", "drops"])
    if not kept.all():
        dataset = dataset.select(np.flatnonzero(kept))
    return TokenizedPairs(dataset, counts, places)


def _equal(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return pa.compute.equal(column, value).to_numpy()


def _places(mapped: datasets.Dataset, rows: np.ndarray) -> list[str]:
    sources = mapped.select(rows)["source"][:] if "source" in mapped.column_names else [None] * len(rows)
    return [source or f"row {row + 1}" for source, row in zip(sources, rows, strict=True)]


def _nothing_left(counts: dict[str, int], lengths: list[int], policy: LengthPolicy) -> InputError:
    reasons = ", ".join(
        f"{count} {kind}" for kind, count in counts.items() if kind.startswith("dropped_") and count
    )
    problem = f"no row is left of {counts['rows']} ({reasons})"
    if not (counts["dropped_overlong"] or counts["dropped_prompt_too_long"]):
        return InputError(problem, field="data.train", mend="Use rows with a prompt and different replies")
    return InputError(
        f"{problem}; the longest has {max(lengths)} tokens, the median {median(lengths):.0f}, "
        f"and data.max_length is {policy.max_length}",
        field="data.max_length",
        mend=f"Raise data.max_length, to {max(lengths)} for all of them",
    )
