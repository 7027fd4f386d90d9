"""The batched encoding against its definition, on tokenizers that split text in every usual way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_kit import batch_encoding
from dpo_kit.batch_encoding import EncodedRows, encode_groups
from dpo_kit.borders import is_plain_backend, safe_cut
from dpo_kit.encoding import encode_replies
from dpo_kit.tokenizer import load_tokenizer

GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2-tokenizer"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    *("the", " the", "in", "g", " un", "able", "play", "ing ", "I'm", "'t", "'LL", " a b", "x y z", "Human:"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "\u00a0",
        "\u3000",
        "1",
        "12 ",
        "2026",
        " 3.5",
        "...",
        ":",
        " -- ",
        "(",
    ),
    *("漢字", "。", "かな", "🙂", "👩‍👩‍👧", "e\u0301", "\u0301", "é", "ß", "İ", "ﬁ", "\u200b", "نص"),
    *("<|end|>", " <|end|>", "<tool>", "<tool> ", "<s>", "</s>", "<unk>", "▁"),
]
CORPUS = [
    " ".join(PIECES),
    "".join(PIECES),
    "play playing unable the thing is in the play, I'm 2026 x y",
] * 20


def _trained(backend: Tokenizer, trainer: trainers.Trainer, **special: str) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>"])
    backend.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **special)


def byte_bpe(rule: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = rule
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        backend, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    )


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


def prefix_space() -> PreTrainedTokenizerFast:
    return byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama3_like() -> PreTrainedTokenizerFast:
    return byte_bpe(split(LLAMA3))


def gpt4o_like() -> PreTrainedTokenizerFast:
    return byte_bpe(split(GPT4O))


def qwen_like() -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe(split(LLAMA3.replace("{1,3}", "")))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def digits_apart() -> PreTrainedTokenizerFast:
    rule = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_bpe(pre_tokenizers.Sequence(rule))


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return _trained(backend, trainer, unk_token="<unk>", bos_token="<s>")


def metaspace_first() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    return _trained(backend, trainer, unk_token="<unk>", bos_token="<s>")


def llama2_like() -> PreTrainedTokenizerFast:
    """The whole text is one word to the merges: nothing may be cut."""
    tokenizer = metaspace_first()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unsplit_metaspace() -> PreTrainedTokenizerFast:
    tokenizer = metaspace_first()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    return _trained(backend, trainer, unk_token="[UNK]")


def greedy_token() -> PreTrainedTokenizerFast:
    """An added token that swallows the spaces behind it, and one that holds a space."""
    tokenizer = gpt2_like()
    tokenizer.add_tokens([AddedToken("un", rstrip=True), AddedToken("a b")])
    return tokenizer


def unknown_rule() -> PreTrainedTokenizerFast:
    """Pairs of words are one piece, so that a cut between words would be wrong."""
    return byte_bpe(split(r"\w+ \w+|\s+|."))


CUT = (
    *(gpt2_like, prefix_space, llama3_like, gpt4o_like, qwen_like, digits_apart),
    *(unigram, metaspace_first, word_piece),
)
WHOLE = (llama2_like, unsplit_metaspace, greedy_token, unknown_rule)


def as_lists(groups: Iterator[EncodedRows]) -> list:
    rows = []
    for encoded in groups:
        at = 0
        for row, count in enumerate(encoded.counts.tolist()):
            replies = [encoded.replies.ids(at + i) for i in range(count)]
            rows.append(((encoded.prompts.ids(row), replies), bool(encoded.inexact[row])))
            at += count
    return rows


def random_rows(seed: int, count: int) -> list[dict]:
    chance = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(chance.choice(PIECES) for _ in range(chance.randint(0, longest)))

    rows = [{"prompt": text(12), "chosen": text(5), "rejected": text(5)} for _ in range(count)]
    # Borders inside words and numbers, and texts that come again.
    for row in rows[::3]:
        whole = row["prompt"] + row["chosen"]
        at = chance.randint(0, len(whole))
        row |= {"prompt": whole[:at], "chosen": whole[at:]}
    for row, other in zip(rows[1::5], rows[2::5], strict=False):
        row |= {"prompt": other["prompt"], "rejected": other["chosen"]}
    return rows


@pytest.mark.parametrize("make", [*CUT, *WHOLE], ids=lambda make: make.__name__)
def test_equal_to_the_definition(make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    assert is_plain_backend(tokenizer)
    assert safe_cut(tokenizer)("one two. #\n") == (8 if make in CUT else 0)
    monkeypatch.setattr(batch_encoding, "ROWS_AT_ONCE", 100)
    rows = random_rows(1, 1500)
    assert as_lists(encode_groups(rows, tokenizer, None)) == encode_replies(rows, tokenizer, None)


@pytest.mark.parametrize("make", CUT, ids=lambda make: make.__name__)
def test_ids_of_a_cut_text_are_those_of_its_parts(make) -> None:
    tokenizer = make()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    cut, cuts = safe_cut(tokenizer), 0
    for row in random_rows(2, 1500):
        prompt, more = row["prompt"], row["chosen"]
        at = cut(prompt)
        cuts += at > 0
        assert ids(prompt + more) == ids(prompt[:at]) + ids(prompt[at:] + more), (prompt, more)
    assert cuts > 300


def test_lists_and_unpaired_rows() -> None:
    tokenizer = unigram()
    pairs = random_rows(3, 200)
    lists = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], "x"][: 2 + i % 2],
            "scores": [],
        }
        for i, row in enumerate(pairs)
    ]
    single = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    for rows in (lists, single):
        assert as_lists(encode_groups(rows, tokenizer, None)) == encode_replies(rows, tokenizer, None)


def test_messages_and_tokens_in_text() -> None:
    tokenizer = llama3_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<tool>' + m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<tool>assistant\\n' }}{% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in random_rows(4, 150)
    ]
    assert as_lists(encode_groups(rows, tokenizer, None)) == encode_replies(rows, tokenizer, None)
    for tokenizer.split_special_tokens in (True, False):
        plain = random_rows(5, 150)
        assert as_lists(encode_groups(plain, tokenizer, None)) == encode_replies(plain, tokenizer, None)


def test_a_tokenizer_with_a_call_of_its_own_is_called() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            texts = texts.upper() if isinstance(texts, str) else [text.upper() for text in texts]
            return super().__call__(texts, **options)

    plain = gpt2_like()
    tokenizer = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token="<|end|>")
    rows = random_rows(6, 50)
    assert not is_plain_backend(tokenizer)
    assert as_lists(encode_groups(rows, tokenizer, None)) == encode_replies(rows, tokenizer, None)
    assert encode_replies(rows, tokenizer, None) != encode_replies(rows, plain, None)


@pytest.mark.slow
@pytest.mark.skipif(not GPT2.is_dir(), reason="needs ../shared/data/gpt2-tokenizer")
def test_gpt2_on_many_texts() -> None:
    tokenizer = load_tokenizer(GPT2)
    rows = random_rows(7, 100_000)
    assert as_lists(encode_groups(rows, tokenizer, None)) == encode_replies(rows, tokenizer, None)
