"""One pair -> ids: plain text and chat templates, on tokenizers of every make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_kit.encoding import encode_pair, encode_rows
from dpo_kit.errors import InputError
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2-tokenizer"
LETTERS = " \nabcdeghilmnoprstuyAHPQ:.,?<>/"
CORPUS = ["Question: what is the capital? Answer: Paris.\n", "play playing unable able\n", LETTERS] * 20


def byte_level() -> PreTrainedTokenizerFast:
    return train_byte_level_bpe(CORPUS, 300)


def prefix_space() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's: a space before the first word, BOS and (unlike Llama's) EOS added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def word_level() -> PreTrainedTokenizerFast:
    vocab = {"</s>": 0, "<unk>": 1, "what": 2, "is": 3, "it": 4, "this": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    vocab = {"[UNK]": 0, "[SEP]": 1, "play": 2, "playing": 3, "##ing": 4, "##ed": 5, "a": 6, "ing": 7}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


MAKES = {make.__name__: make() for make in (byte_level, prefix_space, metaspace)}


@pytest.fixture(params=[*MAKES, "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param != "gpt2":
        return MAKES[request.param]
    if not GPT2.is_dir():
        pytest.skip("needs ../shared/data/gpt2-tokenizer")
    return load_tokenizer(GPT2)


def text_row(prompt: str, chosen: str, rejected: str = "no") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def check_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str) -> None:
    prompt_ids, *completions = encode_pair(text_row(prompt, chosen, rejected), tokenizer)
    if prompt_ids[0] == tokenizer.bos_token_id:
        prompt_ids = prompt_ids[1:]
    for text, ids in zip((chosen, rejected), completions, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in [*prompt_ids, *ids[:-1]]
        assert tokenizer.bos_token_id not in [*prompt_ids, *ids[:-1]]
        # A dummy space before the first word is in neither; one inside the text would be seen here.
        assert decode(tokenizer, prompt_ids + ids[:-1]).removeprefix(" ") == prompt + text


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_ids_give_back_the_text_and_end_once(data: st.DataObject) -> None:
    tokenizer = MAKES[data.draw(st.sampled_from([*MAKES]))]
    words = st.lists(
        st.sampled_from(["play", "ing", " un", "able", " ", "\n", "Paris", "A:", "."]), max_size=5
    )
    text = st.one_of(st.text(LETTERS, max_size=12), words.map("".join))
    # Two of the tokenizers take a space at the very beginning for their own dummy space.
    prompt = data.draw(text.filter(lambda t: t and not t[0].isspace()))
    check_plain(tokenizer, prompt, data.draw(text), data.draw(text))


@pytest.mark.parametrize("completion", ["Paris", " Paris", "\nParis", "able to", "  ", "s"])
@pytest.mark.parametrize("prompt", ["Answer:", "Answer: ", "Answer:\n", "un", "Pari", "Paris  "])
def test_borders(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> None:
    check_plain(tokenizer, prompt, completion, "no")


def test_no_dummy_space_before_a_completion() -> None:
    tokenizer = MAKES["metaspace"]
    prompt, chosen, _ = encode_pair(text_row("Answer: ", "Paris"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(prompt + chosen)
    assert tokens[0] == "<s>"
    assert "".join(tokens) == "<s>▁Answer:▁Paris</s>"


def test_a_token_across_the_border_is_not_used() -> None:
    tokenizer = word_piece()
    assert encode_pair(text_row("play", "ing", "ed"), tokenizer) == ([2], [4, 1], [5, 1])


def test_a_completion_that_no_ids_can_give_back_is_told() -> None:
    tokenizer = word_level()
    rows = [text_row("what is", " it", " this"), text_row("what is", "it", " this")]
    exact, lost = encode_rows(rows, tokenizer, None)
    assert exact == (([2, 3], [4, 0], [5, 0]), False)
    assert lost == (([2, 3], [4, 0], [5, 0]), True)  # the text was "what isit"


def test_bos_comes_once() -> None:
    tokenizer = MAKES["metaspace"]
    plain = encode_pair(text_row("Answer:", " Paris"), tokenizer)
    assert encode_pair(text_row("<s>Answer:", " Paris"), tokenizer) == plain
    assert plain[0].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("ending", ["</s>", "</s>\n", "</s></s>"])
def test_eos_of_the_text_itself_is_not_doubled(ending: str) -> None:
    tokenizer = MAKES["metaspace"]
    assert encode_pair(text_row("A:", " Paris" + ending), tokenizer) == encode_pair(
        text_row("A:", " Paris"), tokenizer
    )


def test_an_empty_prompt_is_bos_or_nothing() -> None:
    for name in ("metaspace", "byte_level"):
        assert encode_pair(text_row("", "Paris"), MAKES[name])[0] == [MAKES[name].bos_token_id]
    assert encode_pair(text_row("", "it"), word_level()) == ([], [4, 0], [1, 0])


def test_bad_rows_and_tokenizers() -> None:
    without_eos = PreTrainedTokenizerFast(tokenizer_object=word_level().backend_tokenizer)
    with pytest.raises(InputError, match=r"field 'model\.tokenizer'.*no EOS"):
        encode_pair(text_row("what", "it"), without_eos)
    chat = messages_row("Hi", "Hello") | {"source": "a.jsonl:3"}
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'model\.tokenizer'.*no chat template"):
        encode_pair(chat, MAKES["byte_level"])
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'prompt'.*not all text"):
        encode_pair(chat | {"prompt": "Hi"}, MAKES["byte_level"])


# Chat templates, each written after the manner of the family it is named for.

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') "
    "if '</think>' in m.content else '' %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user')"
    " + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
COUNTED = (
    "{% for m in messages %}{{ '.' }}{% endfor %}" + ZEPHYR
)  # the end of a conversation changes its start
NO_ASSISTANT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>")
SPECIAL += ("<|User|>", "<|Assistant|>", "<start_of_turn>", "<end_of_turn>")
USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
WHY = "<think>\nwhy\n</think>\n\nHello"


def messages_row(prompt: str, chosen: str, rejected: str = "no") -> dict:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    texts = text_row(prompt, chosen, rejected)
    return {name: [{"role": role, "content": texts[name]}] for name, role in roles.items()}


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Byte-level, so that ids decode to exactly the text; adds BOS by itself, as Llama's does."""
    tokenizer = train_byte_level_bpe(CORPUS, 300, eos_token="</s>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(SPECIAL)})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize(
    ("template", "content", "prompt", "completion"),
    [
        (CHATML, "Hello", "<|im_start|>system\nBe kind.<|im_end|>\n" + USER, "Hello<|im_end|>"),
        (CHATML, "\n Hello ", "<|im_start|>system\nBe kind.<|im_end|>\n" + USER, "\n Hello <|im_end|>"),
        (CHATML, "Hello<|im_end|>", "<|im_start|>system\nBe kind.<|im_end|>\n" + USER, "Hello<|im_end|>"),
        (LLAMA2, "Hello", "<s>[INST] Hi [/INST]", " Hello </s>"),
        (
            LLAMA3,
            " Hello \n",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Hello<|eot_id|>",
        ),
        (QWEN3, "Hello", USER, "<think>\n\n</think>\n\nHello<|im_end|>"),
        (QWEN3, WHY, USER, WHY + "<|im_end|>"),
        (QWEN3, "<think>why</think>Hello", USER, WHY + "<|im_end|>"),
        (QWEN3, "why</think>\nHello", USER, WHY + "<|im_end|>"),
        (DEEPSEEK, WHY, "<s><|User|>Hi<|Assistant|><think>\n", "why\n</think>\n\nHello</s>"),
        (
            GEMMA,
            "Hello",
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
            "Hello<end_of_turn>",
        ),
        (ZEPHYR, "Hello", "<|user|>\nHi</s>\n<|assistant|>\n", "Hello</s>"),
        (COUNTED, "Hello", ".<|user|>\nHi</s>\n<|assistant|>\n", "Hello</s>"),
        (PHI3, "Hello", "<|user|>\nHi<|end|>\n<|assistant|>\n", "Hello<|end|>"),
        (BARE, "Hello", "user: Hi\nassistant:", " Hello\n</s>"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*opens a thought:dpo_kit.errors.DpoKitWarning")
def test_templates(template: str, content: str, prompt: str, completion: str) -> None:
    tokenizer = chat_tokenizer(template)
    prompt_ids, chosen, rejected = encode_pair(messages_row("Hi", content), tokenizer)
    assert decode(tokenizer, prompt_ids) == prompt
    assert decode(tokenizer, chosen) == completion
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert chosen[-1] == rejected[-1] == tokenizer.convert_tokens_to_ids(completion[completion.rindex("<") :])


def test_template_arguments_and_history() -> None:
    tokenizer = chat_tokenizer(QWEN3)
    row = messages_row("Hi", "Hello")
    row["prompt"] += [{"role": "assistant", "content": WHY}, {"role": "user", "content": "So?"}]
    prompt, chosen, _ = encode_pair(row, tokenizer, chat_template_kwargs={"enable_thinking": False})
    history = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    opened = "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert decode(tokenizer, prompt) == history + opened
    assert decode(tokenizer, chosen) == "Hello<|im_end|>"


def test_tools_reach_the_template() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tools = [{"type": "function", "function": {"name": "search"}}]
    prompt, *_ = encode_pair(messages_row("Hi", "Hello") | {"tools": json.dumps(tools)}, tokenizer)
    assert json.dumps(tools) in decode(tokenizer, prompt)
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'tools': expected a list of tool"):
        encode_pair(messages_row("Hi", "Hello") | {"tools": "[{", "source": "a.jsonl:3"}, tokenizer)


@given(content=st.text(max_size=20).filter(lambda t: "<|im_" not in t), user=st.text(max_size=10))
@settings(max_examples=100, deadline=None)
def test_chat_content_is_unchanged(content: str, user: str) -> None:
    tokenizer = MAKES.setdefault("chatml", chat_tokenizer(CHATML))
    row = messages_row(user, content)
    prompt, chosen, _ = encode_pair(row, tokenizer)
    conversation = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
    assert decode(tokenizer, prompt + chosen) + "\n" == conversation
    assert decode(tokenizer, chosen) == content + "<|im_end|>"


def test_what_a_template_refuses_is_named() -> None:
    row = messages_row("Hi", "Hello") | {"source": "a.jsonl:3"}
    system = {"prompt": [{"role": "system", "content": "Be kind."}, *row["prompt"]]}
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'prompt'.*System role not supported"):
        encode_pair(row | system, chat_tokenizer(GEMMA))
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'prompt'.*empty conversation"):
        encode_pair(row | {"prompt": []}, chat_tokenizer(CHATML))
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'chosen'.*does not write"):
        encode_pair(row, chat_tokenizer(NO_ASSISTANT))
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'rejected'.*not one message"):
        encode_pair(row | {"rejected": row["rejected"] * 2}, chat_tokenizer(CHATML))
