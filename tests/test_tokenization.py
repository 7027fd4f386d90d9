"""A data set of pairs -> ids: length policy, account, cache; loading and training tokenizers."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_kit import tokenization
from dpo_kit.encoding import encode_pair
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.length_policy import OVERLONG, LengthPolicy
from dpo_kit.tokenization import TokenizedPairs, tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class CountingTokenizer(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    """Byte-level with no merges: one token for each ASCII character."""
    backend = train_byte_level_bpe([], 258).backend_tokenizer
    CountingTokenizer.calls = 0
    return CountingTokenizer(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenization, "ROWS_PER_BATCH", 4)
    return tmp_path / "cache" / "tokens"


def pairs(*rows: tuple[str, str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": f"a.jsonl:{i + 1}"}
            for i, (prompt, chosen, rejected) in enumerate(rows)
        ]
    )


def many(count: int = 30) -> datasets.Dataset:
    return pairs(*((f"prompt {i}", "yes" * (i % 5 + 1), "no" * (i % 3 + 1)) for i in range(count)))


def ids(result: TokenizedPairs) -> list[tuple]:
    return [tuple(row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")) for row in result.dataset]


# The length policy, on lengths that can be counted on the fingers; 9 is BOS.


@pytest.mark.parametrize(
    ("overlong", "max_length", "kept", "outcome"),
    [
        ("drop", 7, ([9, 1, 2, 3], [[4, 5, 6], [7]]), "kept"),
        ("drop", 6, None, "overlong"),
        ("cut_prompt_left", 6, ([9, 2, 3], [[4, 5, 6], [7]]), "cut_prompt"),
        ("cut_prompt_left", 5, ([9, 3], [[4, 5, 6], [7]]), "cut_prompt"),
        ("cut_prompt_left", 4, None, "overlong"),
        ("cut_completion_right", 6, ([9, 1, 2, 3], [[4, 5], [7]]), "cut_completion"),
        ("cut_completion_right", 5, ([9, 1, 2, 3], [[4], [7]]), "cut_completion"),
        ("cut_completion_right", 4, None, "prompt_too_long"),
    ],
)
def test_length_policy(overlong: str, max_length: int, kept: tuple | None, outcome: str) -> None:
    row = ([9, 1, 2, 3], [[4, 5, 6], [7]])
    assert LengthPolicy(max_length, overlong).apply(row, bos_id=9) == (kept, outcome)


def test_without_bos_the_prompt_may_be_cut_to_one_token() -> None:
    policy = LengthPolicy(4, "cut_prompt_left")
    assert policy.apply(([1, 2, 3], [[4, 5, 6], [7]])) == (([3], [[4, 5, 6], [7]]), "cut_prompt")


TOKENS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(
    TOKENS,
    st.lists(TOKENS, min_size=1, max_size=4),
    st.integers(2, 16),
    st.sampled_from(OVERLONG),
)
def test_what_is_kept_fits_and_is_never_empty(
    prompt: list, replies: list, max_length: int, overlong: str
) -> None:
    result, outcome = LengthPolicy(max_length, overlong).apply((prompt, replies), bos_id=1)
    fits = len(prompt) + max(map(len, replies)) <= max_length
    assert (outcome == "kept") == fits
    if result is None:
        return
    kept, kept_replies = result
    assert kept
    assert prompt[0] != 1 or kept[0] == 1
    for reply, whole in zip(kept_replies, replies, strict=True):
        assert 0 < len(reply) <= max_length - len(kept)
        assert reply == whole[: len(reply)]
    assert fits or len(kept) + max(map(len, kept_replies)) == max_length


def test_policy_errors() -> None:
    with pytest.raises(InputError, match=r"field 'data\.overlong'.*Did you mean 'cut_prompt_left'\?"):
        LengthPolicy(10, "cut_prompt")
    with pytest.raises(InputError, match=r"field 'data\.max_length'"):
        LengthPolicy(1)


# Data sets.


def test_every_pair_is_accounted_for(tokenizer: CountingTokenizer) -> None:
    data = pairs(
        ("ab", "yes", "no"),
        ("ab", "y" * 20, "no"),
        ("", "yes", "no"),
        ("ab", "same", "same" + "<|endoftext|>"),
    )
    data = data.add_column("weight", [1.0, 2.0, 3.0, 4.0])
    result = tokenize_pairs(data, tokenizer, max_length=12)
    assert {k: v for k, v in result.counts.items() if v} == {
        "rows": 4,
        "kept": 1,
        "dropped_overlong": 1,
        "dropped_empty_prompt": 1,
        "dropped_identical_after_tokenisation": 1,
    }
    assert result.places == {
        "dropped_overlong": ["a.jsonl:2"],
        "dropped_empty_prompt": ["a.jsonl:3"],
        "dropped_identical_after_tokenisation": ["a.jsonl:4"],
    }
    (row,) = result.dataset
    assert (row["index"], row["source"], row["weight"]) == (0, "a.jsonl:1", 1.0)
    assert tokenizer.decode(row["chosen_ids"]) == "yes<|endoftext|>"
    assert result.dataset.features["chosen_ids"] == datasets.List(datasets.Value("int32"))


def test_cutting_is_counted_and_cut_replies_that_agree_are_dropped(tokenizer: CountingTokenizer) -> None:
    data = pairs(("ab", "longer reply", "no"), ("ab", "longer reply", "longer one"))
    result = tokenize_pairs(data, tokenizer, max_length=6, overlong="cut_completion_right")
    assert tokenizer.decode(ids(result)[0][1]) == "long"
    assert (result.counts["cut_completion"], result.counts["dropped_identical_after_tokenisation"]) == (1, 1)
    assert result.places["cut_completion"] == ["a.jsonl:1"]


def test_nothing_left_is_an_error_with_the_lengths(tokenizer: CountingTokenizer) -> None:
    data = pairs(("ab", "yes", "no"), ("ab", "y" * 7, "no"), ("ab", "y" * 17, "no"))
    with pytest.raises(
        InputError, match=r"longest has 20 tokens, the median 10.*Raise data\.max_length, to 20"
    ):
        tokenize_pairs(data, tokenizer, max_length=5)
    with pytest.raises(InputError, match=r"no row is left of 1 \(1 dropped_identical"):
        tokenize_pairs(pairs(("ab", "yes", "yes")), tokenizer)
    with pytest.raises(InputError, match="there is no row"):
        tokenize_pairs(data.select([]), tokenizer)


def test_processes_and_batches_change_no_id(
    tokenizer: CountingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = os.environ
    data = many()
    forked = tokenize_pairs(data, tokenizer, max_length=20, num_proc=2, cache_dir=tmp_path / "forked")
    assert os.environ is environ
    assert "TOKENIZERS_PARALLELISM" not in environ
    assert len(list((tmp_path / "forked" / "tokens").glob("*.arrow"))) == 2
    monkeypatch.setattr(tokenization, "ROWS_PER_BATCH", 7)
    single = tokenize_pairs(data, tokenizer, max_length=20)
    assert 0 < single.counts["kept"] < len(data)
    assert ids(forked) == ids(single) == [encode_pair(data[i], tokenizer) for i in single.dataset["index"]]
    assert forked.counts == single.counts


def test_errors_come_out_of_processes(tokenizer: CountingTokenizer) -> None:
    message = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": message, "chosen": message, "rejected": message, "source": "a.jsonl:1"}] * 10
    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'model\.tokenizer'.*no chat template"):
        tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, num_proc=2)


# The cache.


def test_the_second_call_reads_the_cache(tokenizer: CountingTokenizer, cache: Path) -> None:
    first = tokenize_pairs(many(), tokenizer)
    assert tokenizer.calls > 0
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    CountingTokenizer.calls = 0
    again = tokenize_pairs(many(40).select(range(30)), tokenizer, num_proc=2)
    assert tokenizer.calls == 0
    assert (ids(again), again.counts) == (ids(first), first.counts)
    assert len(list(cache.glob("*.arrow"))) == 1


def test_what_changes_the_ids_changes_the_key(tokenizer: CountingTokenizer, cache: Path) -> None:
    data = many(8)
    changed = pairs(
        *((row["prompt"], row["chosen"] + "!" * (i == 7), row["rejected"]) for i, row in enumerate(data))
    )
    other = CountingTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|pad|>")
    tokenize_pairs(data, tokenizer)
    tokenize_pairs(changed, tokenizer)
    tokenize_pairs(data, other)
    tokenize_pairs(data, tokenizer, overlong="cut_prompt_left")
    tokenize_pairs(data, tokenizer, max_length=100)
    tokenize_pairs(data, tokenizer, chat_template_kwargs={"enable_thinking": False})
    tokenizer.chat_template = CHATML
    tokenize_pairs(data, tokenizer)
    assert len(list(cache.glob("*.arrow"))) == 7


def test_an_interrupted_write_is_not_taken(
    tokenizer: CountingTokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    encode_groups = tokenization.encode_groups

    def interrupted(*args):
        batches.append(sorted(file.name for file in cache.iterdir()))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return encode_groups(*args)

    monkeypatch.setattr(tokenization, "encode_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_pairs(many(), tokenizer)
    # What a kill would have left behind has not the name that the next run looks for.
    assert len(batches[-1]) == 1
    assert not batches[-1][0].endswith(".arrow")
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    assert tokenize_pairs(many(), tokenizer, cache_dir=cache.parent).counts["kept"] == 30


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999])
def test_a_damaged_file_is_made_again(tokenizer: CountingTokenizer, cache: Path, share: float) -> None:
    expected = ids(tokenize_pairs(many(), tokenizer))
    (file,) = cache.glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.warns(DpoKitWarning, match="damaged"):
        result = tokenize_pairs(many(), tokenizer)
    assert ids(result) == expected
    assert file.read_bytes() == whole


def test_a_changed_byte_is_noticed(tokenizer: CountingTokenizer, cache: Path) -> None:
    """Arrow reads such a file without a word: other ids would be trained on."""
    expected = ids(tokenize_pairs(many(), tokenizer))
    (file,) = cache.glob("*.arrow")
    (column,) = {tuple(row[0]) for row in expected[:1]}
    found = bytearray(file.read_bytes())
    place = found.index(np.asarray(column, np.int32).tobytes())
    found[place] ^= 1
    file.write_bytes(found)
    with pytest.warns(DpoKitWarning, match="damaged"):
        assert ids(tokenize_pairs(many(), tokenizer)) == expected


def test_a_file_without_its_digests_is_not_taken(tokenizer: CountingTokenizer, cache: Path) -> None:
    tokenize_pairs(many(), tokenizer)
    (digests,) = cache.glob("*.digests.json")
    digests.unlink()
    with pytest.warns(DpoKitWarning, match="not written whole"):
        tokenize_pairs(many(), tokenizer)
    assert digests.exists()


def test_a_cache_file_with_rows_missing_is_made_again(tokenizer: CountingTokenizer, cache: Path) -> None:
    expected = ids(tokenize_pairs(many(), tokenizer))
    (file,) = cache.glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 10))
    with pytest.warns(DpoKitWarning, match="damaged"):
        assert ids(tokenize_pairs(many(), tokenizer)) == expected


# Messages, and real data.


def test_messages_with_tools_and_extras(tokenizer: CountingTokenizer) -> None:
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + CHATML
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "assistant", "content": "Go"}],
        "prompt_id": "7",
    }
    data = datasets.Dataset.from_list([{**row, "tools": '[{"name": "f"}]'}, {**row, "tools": None}])
    result = tokenize_pairs(data, tokenizer)
    texts = [[tokenizer.decode(part) for part in row] for row in ids(result)]
    end = "<|endoftext|>"
    first = [f'[{{"name": "f"}}]<|user|>Hi{end}\n<|assistant|>', f"Hello{end}", f"Go{end}"]
    assert texts == [first, [f"<|user|>Hi{end}\n<|assistant|>", *first[1:]]]
    assert result.dataset["prompt_id"][:] == ["7", "7"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_hh_texts_come_back_from_gpt2_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "ROWS_PER_BATCH", 256)
    tokenizer = load_tokenizer(SHARED / "gpt2-tokenizer")
    border = "\n\nAssistant:"
    with gzip.open(SHARED / "hh-rlhf" / "harmless-base" / "test.jsonl.gz", "rt") as file:
        rows = [json.loads(next(file)) for _ in range(200)]
    split = [[text.rpartition(border) for text in (row["chosen"], row["rejected"])] for row in rows]
    data = pairs(*((a[0] + border, a[2], b[2]) for a, b in split if a[0] == b[0]))
    result = tokenize_pairs(data, tokenizer, max_length=None)
    assert result.counts["kept"] == len(data) > 190
    for row, (prompt, *replies) in zip(data, ids(result), strict=True):
        assert tokenizer.decode(prompt) == row["prompt"]
        for reply, text in zip(replies, (row["chosen"], row["rejected"]), strict=True):
            assert tokenizer.decode(reply) == text + "<|endoftext|>"
            assert prompt + reply[:-1] == tokenizer(row["prompt"] + text)["input_ids"]


# Tokenizers.


def test_trained_vocabulary(tmp_path: Path) -> None:
    texts = ["low low low low low lower lower newest newest newest newest newest newest"] * 3
    tokenizer = train_byte_level_bpe(texts, 266)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (
        266,
        0,
        0,
        1,
    )
    words = [word for word, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if i >= 258]
    assert words == _merges(texts, 8)
    assert train_byte_level_bpe(iter(texts), 266).get_vocab() == tokenizer.get_vocab()
    text = "low <|endoftext|> naïve 漢字\n"
    assert tokenizer(text)["input_ids"].count(0) == 1
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def _merges(texts: list[str], count: int) -> list[str]:
    """The textbook algorithm: again and again the most frequent pair; of equal ones the smaller symbols."""
    words = Counter(("Ġ" + word if i else word) for text in texts for i, word in enumerate(text.split()))
    splits = {word: list(word) for word in words}
    ranks = {symbol: (0, symbol) for word in words for symbol in word}
    made: list[str] = []
    for _ in range(count):
        found: Counter = Counter()
        for word, symbols in splits.items():
            for pair in pairwise(symbols):
                found[pair] += words[word]
        best = min(found, key=lambda pair: (-found[pair], ranks[pair[0]], ranks[pair[1]]))
        made.append("".join(best))
        ranks[made[-1]] = (1, f"{len(made):04d}")
        for word, symbols in splits.items():
            splits[word] = _merged(symbols, best)
    return made


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def test_vocabulary_sizes() -> None:
    with pytest.raises(InputError, match="field 'vocab_size': 257 tokens cannot hold"):
        train_byte_level_bpe(["a"], 257)
    with pytest.warns(DpoKitWarning, match="a vocabulary of 260 only, not 300"):
        train_byte_level_bpe(["ab ab"], 300)


def test_loading(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "broken" / "tokenizer_config.json").write_text("{}")
    for name, problem in (
        ("none", "no such folder"),
        ("empty", "has no tokenizer"),
        ("broken", "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=rf"{name}: field 'model\.tokenizer': .*{problem}"):
            load_tokenizer(tmp_path / name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_gpt2_vocabulary_files_alone_load(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SHARED / "gpt2-tokenizer")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert (tokenizer.eos_token_id, len(tokenizer)) == (50256, 50257)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello world")["input_ids"] == [15496, 995]


def test_a_saved_tokenizer_comes_back_whatever_model_lies_beside_it(tmp_path: Path) -> None:
    """AutoTokenizer alone splits by Qwen2's rule where the config beside it says qwen2."""
    text = "don't 12345 x\n\n  Human: 1999 foo's"
    saved = train_byte_level_bpe([text] * 9, 270)
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == saved(text)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token) == (saved.eos_token, saved.pad_token)
