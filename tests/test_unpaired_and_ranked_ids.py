"""Unpaired rows and ranked lists: turned into ids as pairs are, under the same policy and cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpo_kit import tokenization
from dpo_kit.dealing import TokenRows
from dpo_kit.encoding import encode_pair, encode_replies
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs
from dpo_kit.tokenization import longest_sequence, tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

ASK = [{"role": "user", "content": "Name a city."}]
PARIS = [{"role": "assistant", "content": "Paris"}]
LONDON = [{"role": "assistant", "content": "London"}]
TEXT = {"prompt": "Name a city.", "completion": " Paris", "label": True}
LIST = {"prompt": "Name a city.", "completions": [" Paris", " London", " Rome"], "scores": [0.5, 2, -1]}
MESSAGES = {"messages": ASK + PARIS, "label": False}
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write(path: Path, *rows: Any) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level with no merges: one token for each ASCII character, and one at the end of a reply."""
    backend = train_byte_level_bpe([], 258).backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=CHATML
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def unpaired(*rows: tuple) -> datasets.Dataset:
    columns = ("prompt", "completion", "label")
    return datasets.Dataset.from_list(
        [{**dict(zip(columns, row, strict=True)), "source": f"a:{i + 1}"} for i, row in enumerate(rows)]
    )


def lists(*rows: tuple) -> datasets.Dataset:
    columns = ("prompt", "completions", "scores")
    return datasets.Dataset.from_list(
        [{**dict(zip(columns, row, strict=True)), "source": f"a:{i + 1}"} for i, row in enumerate(rows)]
    )


INT32 = datasets.List(datasets.Value("int32"))


def test_unpaired_ids(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_pairs(
        write(file, {**TEXT, "weight": 2}, {**TEXT, "label": 0}, {**TEXT, "completion": "x" * 40})
    )
    result = tokenize_pairs(data, tokenizer, max_length=30)
    assert result.dataset.features == datasets.Features(
        {
            "prompt_ids": INT32,
            "completion_ids": INT32,
            "index": datasets.Value("int64"),
            "label": datasets.Value("bool"),
            "source": datasets.Value("string"),
            "weight": datasets.Value("float64"),
        }
    )
    assert result.dataset["label"][:] == [True, False]
    assert result.dataset["weight"][:] == [2.0, None]
    first = result.dataset[0]
    assert tokenizer.decode(first["prompt_ids"]) == "Name a city."
    assert tokenizer.decode(first["completion_ids"]) == " Paris<|endoftext|>"
    assert (result.counts["kept"], result.counts["dropped_overlong"]) == (2, 1)
    assert result.account() == [f"dropped_overlong: 1 of 3 unpaired rows ({file}:3)"]


def test_list_ids(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_pairs(
        write(file, {**LIST, "prompt_id": 3}, {**LIST, "completions": [" a", " b"], "scores": [0, 1]}),
        shape="lists",
    )
    result = tokenize_pairs(data, tokenizer)
    assert result.dataset.features == datasets.Features(
        {
            "prompt_ids": INT32,
            "completions_ids": datasets.List(INT32),
            "index": datasets.Value("int64"),
            "scores": datasets.List(datasets.Value("float64")),
            "source": datasets.Value("string"),
            "prompt_id": datasets.Value("string"),
        }
    )
    first = result.dataset[0]
    assert [tokenizer.decode(ids) for ids in first["completions_ids"]] == [
        f"{text}<|endoftext|>" for text in LIST["completions"]
    ]
    assert (first["scores"], first["prompt_id"]) == ([0.5, 2.0, -1.0], "3")


@given(
    st.text(min_size=1, max_size=9),
    st.lists(st.text(max_size=9), min_size=2, max_size=4),
    st.sampled_from(["text", "messages"]),
)
@settings(max_examples=100, deadline=None)
def test_replies_have_the_ids_that_they_have_in_a_pair(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, replies: list[Any], how: str
) -> None:
    if how == "messages":
        prompt = [{"role": "user", "content": prompt}]
        replies = [[{"role": "assistant", "content": reply}] for reply in replies]
    row = {"prompt": prompt, "completions": replies, "scores": [0.0] * len(replies)}
    ranked = encode_replies([row, row], tokenizer, None)
    assert ranked[0] == ranked[1]
    (prompt_ids, all_ids), _ = ranked[0]
    for ids, reply in zip(all_ids, replies, strict=True):
        pair = {"prompt": prompt, "chosen": reply, "rejected": replies[0]}
        assert encode_pair(pair, tokenizer) == (prompt_ids, ids, all_ids[0])
        alone = {"prompt": prompt, "completion": reply, "label": True}
        assert encode_replies([alone], tokenizer, None)[0][0] == (prompt_ids, [ids])


@pytest.mark.parametrize(
    ("overlong", "prompt", "lengths"),
    [
        ("drop", None, None),
        ("cut_prompt_left", "cdef", [6, 3, 4]),  # 4 + 6 = 10: judged on the longest, cut alike for all
        ("cut_completion_right", "abcdef", [4, 3, 4]),
    ],
)
def test_a_list_is_fitted_or_left_out_whole(
    tokenizer: PreTrainedTokenizerFast, overlong: str, prompt: str | None, lengths: list | None
) -> None:
    short = ("a", ["b", "c"], [1.0, 0.0])
    data = lists(("abcdef", ["xxxxx", "yy", "zzz"], [0.0, 1.0, 2.0]), short)
    result = tokenize_pairs(data, tokenizer, max_length=10, overlong=overlong)
    assert result.counts["rows"] == 2
    if prompt is None:
        assert (result.counts["kept"], result.counts["dropped_overlong"]) == (1, 1)
        assert result.places == {"dropped_overlong": ["a:1"]}
        return
    first = result.dataset[0]
    assert tokenizer.decode(first["prompt_ids"]) == prompt
    assert [len(ids) for ids in first["completions_ids"]] == lengths
    assert first["scores"] == [0.0, 1.0, 2.0]


def test_coinciding_replies_of_a_list(tokenizer: PreTrainedTokenizerFast) -> None:
    end = "<|endoftext|>"
    data = lists(
        ("ab", ["same", "same" + end], [1.0, 0.0]),
        ("ab", ["same", "same" + end, "other"], [1.0, 0.0, 2.0]),
    )
    result = tokenize_pairs(data, tokenizer)
    assert result.counts["dropped_identical_after_tokenisation"] == 1
    (row,) = result.dataset
    assert row["index"] == 1
    assert len(row["completions_ids"]) == 3
    # One reply alone cannot coincide with another.
    assert tokenize_pairs(unpaired(("ab", "x", True)), tokenizer).counts["kept"] == 1


def test_a_list_in_which_a_cut_contradicts_the_scores_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    data = lists(
        ("ab", ["samex", "samey", "z"], [1.0, 0.0, 2.0]),
        ("ab", ["samex", "samey", "z"], [1.0, 1.0, 2.0]),  # equals may become one
        ("ab", ["xsame", "ysame", "z"], [1.0, 0.0, 2.0]),
    )
    result = tokenize_pairs(data, tokenizer, max_length=5, overlong="cut_completion_right")
    assert result.dataset["index"][:] == [1, 2]
    assert result.counts["dropped_identical_after_tokenisation"] == 1
    assert result.counts["cut_completion"] == 2
    assert tokenize_pairs(data, tokenizer).counts["kept"] == 3


def test_a_list_that_prefers_nothing_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    result = tokenize_pairs(lists(("a", ["b", "c"], [1.0, 1.0]), ("a", ["b", "c"], [1.0, 2.0])), tokenizer)
    assert result.dataset["index"][:] == [1]
    assert result.account() == ["dropped_all_tied: 1 of 2 ranked lists (a:1)"]


def test_a_data_set_made_without_load_pairs_is_checked(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_pairs(unpaired(("a", "b", 1), ("a", "c", 0)), tokenizer).dataset["label"][:] == [
        True,
        False,
    ]
    for data, field in (
        (unpaired(("a", "b", 2)), "label"),
        (lists(("a", ["b", "c"], [1.0])), "scores"),
        (lists(("a", ["b", "c"], [1.0, math.inf])), r"scores\[1\]"),
        (lists(("a", ["b"], [1.0])), "completions"),
    ):
        with pytest.raises(InputError, match=rf"a:1: field '{field}'"):
            tokenize_pairs(data, tokenizer)
    with pytest.raises(InputError, match="none of the known sets of columns, only: prompt, source"):
        tokenize_pairs(unpaired(("a", "b", True)).remove_columns(["completion", "label"]), tokenizer)


def test_the_cache_knows_labels_and_scores(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    for scores in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]):
        assert tokenize_pairs(lists(("a", ["b", "c"], scores)), tokenizer).dataset["scores"][:] == [scores]
    for label in (True, False, True):
        assert tokenize_pairs(unpaired(("a", "b", label)), tokenizer).dataset["label"][:] == [label]
    assert len(list(cache.glob("*.arrow"))) == 4


def test_processes_change_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "ROWS_PER_BATCH", 4)
    ranked = lists(*(("ab", ["x" * i, "y" * (i % 3)], [1.0, float(i)]) for i in range(2, 12)))
    for data in (ranked, unpaired(*(("ab", "x" * i, i % 2 == 0) for i in range(10)))):
        single = tokenize_pairs(data, tokenizer, max_length=9)
        forked = tokenize_pairs(data, tokenizer, max_length=9, num_proc=2, cache_dir=tmp_path / "forked")
        assert 0 < single.counts["kept"] < 10
        assert (forked.counts, list(forked.dataset)) == (single.counts, list(single.dataset))


def test_longest_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    scores = [1.0, 0.0]
    data = lists(
        *(("ab", ["x" * i, "y"], scores) for i in range(1, 9)),
        ("abc", ["x", "y" * 11, "z"], [1.0, 2.0, 3.0]),
        ("ab", ["x", "yy"], scores),
    )
    ids = tokenize_pairs(data, tokenizer).dataset
    assert longest_sequence(ids) == (3 + 12, 8)
    assert longest_sequence(ids.select([9, 3, 8, 0])) == (15, 2)
    assert longest_sequence(ids.select(range(2, 8))) == (2 + 9, 5)
    assert longest_sequence(datasets.Dataset(ids.data.table.slice(1, 4))) == (2 + 6, 3)
    ids = tokenize_pairs(
        unpaired(("ab", "x", True), ("abc", "xx", False), ("a", "b", True)), tokenizer
    ).dataset
    assert longest_sequence(ids) == (3 + 3, 1)


def test_from_file_to_rows(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": ASK, "completions": [PARIS, LONDON], "ranks": [2, 1]}
    rows = TokenRows(tokenize_pairs(load_pairs(write(file, row), shape="lists"), tokenizer).dataset)
    (loaded,) = rows.__getitems__([0])
    assert [tokenizer.decode(ids) for ids in loaded["completions_ids"]] == [
        "Paris<|endoftext|>",
        "London<|endoftext|>",
    ]
    assert tokenizer.decode(loaded["prompt_ids"]) == "<|user|>Name a city.<|endoftext|>\n<|assistant|>"
    assert (loaded["scores"].tolist(), loaded["source"]) == ([-2.0, -1.0], f"{file}:1")
    labelled = write(file, {**MESSAGES, "label": True}, MESSAGES)
    rows = TokenRows(tokenize_pairs(load_pairs(labelled), tokenizer).dataset)
    assert [row["label"] for row in rows.__getitems__([0, 1])] == [True, False]
