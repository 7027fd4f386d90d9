"""Tool calls, reasoning, tools and a row's own variables through chat templates; what these drop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpo_kit.chat import RowText, dropped_parts, row_text
from dpo_kit.errors import InputError
from dpo_kit.pairs.messages import packed
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

# Each after the manner of the family it is named for, in what is tested here.

QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\\n' + (m.reasoning_content or '').strip() + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% for c in m.tool_calls or [] %}{% set c = c.function or c %}"
    '{{ \'<tool_call>\\n{"name": "\' + c.name + \'", "arguments": \' + c.arguments | tojson + '
    "'}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson + '}' }}"
    "{{ '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '\\n' + c.function.arguments + '</call>' }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' + "
    "m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
SPECIAL += ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>")

CITY = 'Pa"ris é'
CALL = {
    "id": "a1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": CITY, "days": 2}},
}
WRITTEN = '{"city": "Pa\\"ris é", "days": 2}'
QWEN_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {WRITTEN}}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_byte_level_bpe(["play playing unable able\n"] * 20, 270, eos_token="</s>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([AddedToken("</tool_call>", special=False)])
    tokenizer.chat_template = template
    return tokenizer


def say(role: str, content: str | None, **extras: Any) -> dict:
    return {"role": role, "content": content, **extras}


def row(chosen: dict, *prompt: dict, **columns: Any) -> dict:
    messages = list(prompt) or [say("user", "Hi")]
    return {"prompt": messages, "chosen": [chosen], "rejected": [say("assistant", "No.")], **columns}


def text_of(row: dict, template: str, **kwargs: Any) -> RowText:
    tokenizer = chat_tokenizer(template)
    added = frozenset([*SPECIAL, "</tool_call>", "<s>", "</s>"])
    return row_text(row, tokenizer, kwargs, added)


USED_TOOL = (
    say("user", "Hi"),
    say("assistant", None, tool_calls=[CALL], reasoning_content="ask first"),
    say("tool", "sunny", tool_call_id="a1"),
)


def test_a_tool_call_is_written_by_the_template() -> None:
    text = text_of(row(say("assistant", None, tool_calls=[CALL]), tools=json.dumps(TOOLS)), QWEN3)
    assert text.prompt == (
        f"<|im_start|>system\n{json.dumps(TOOLS[0])}\n<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.replies == ["<think>\n\n</think>\n\n" + QWEN_CALL, "<think>\n\n</think>\n\nNo."]
    assert text.ends == ["<|im_end|>", "<|im_end|>"]


def test_reasoning_beside_the_content_is_written_by_the_template() -> None:
    reply = say("assistant", "It is.", reasoning_content="why \\ not", tool_calls=[CALL])
    text = text_of(row(reply, *USED_TOOL), QWEN3)
    assert text.prompt == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nask first\n</think>\n\n"
        f"{QWEN_CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text.replies[0] == "<think>\nwhy \\ not\n</think>\n\nIt is." + QWEN_CALL


def test_llama_writes_one_call_and_its_arguments_as_an_object_however_they_came() -> None:
    as_text = {
        **CALL,
        "function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])},
    }
    for call in (CALL, as_text):
        text = text_of(row(say("assistant", None, tool_calls=[call])), LLAMA31)
        assert text.prompt == (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert text.replies == [f'{{"name": "weather", "parameters": {WRITTEN}}}', "No."]
        assert text.ends == ["<|eot_id|>", "<|eot_id|>"]
    with pytest.raises(InputError, match=r"only single tool-calls"):
        text_of(row(say("assistant", None, tool_calls=[CALL, CALL])), LLAMA31)


def test_a_template_that_wants_arguments_as_text_gets_them_so() -> None:
    text = text_of(row(say("assistant", "", tool_calls=[CALL])), DEEPSEEK)
    assert text.prompt == "<s><|User|>Hi<|Assistant|><think>\n"
    assert text.replies[0] == f"<call>weather\n{WRITTEN}</call>"


def test_each_reply_has_its_own_end() -> None:
    text = text_of(row(say("assistant", None, tool_calls=[CALL])), LLAMA31, builtin_tools=["search"])
    assert text.ends == ["<|eom_id|>", "<|eot_id|>"]
    assert text.replies[0] == f'{{"name": "weather", "parameters": {WRITTEN}}}'
    text = text_of(row(say("assistant", "", tool_calls=[CALL], thinking="why")), GPT_OSS)
    assert text.replies == [
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant to=weather<|message|>" + WRITTEN,
        "<|channel|>final<|message|>No.",
    ]
    assert text.ends == ["<|call|>", "<|return|>"]


def test_a_reply_that_changes_how_earlier_turns_are_written() -> None:
    earlier = (say("user", "Hi"), say("assistant", "Ho", thinking="old"))
    template = GPT_OSS.replace(
        "m.thinking and loop.last", "m.thinking and loop.index0 >= messages | length - 2"
    )
    text = text_of(row(say("assistant", "Yes.", thinking="new"), *earlier), template)
    assert text.prompt.count("old") == 1  # written in the prompt, not before a reply of its own turn
    assert text.replies[0] == (
        "<|channel|>analysis<|message|>new<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )


@pytest.mark.parametrize(
    ("template", "extras", "field"),
    [
        (PLAIN, {"tool_calls": [CALL]}, "chosen[0].tool_calls[0].function.name"),
        (PLAIN, {"reasoning_content": "why"}, "chosen[0].reasoning_content"),
        (LLAMA31, {"reasoning_content": "why"}, "chosen[0].reasoning_content"),
        (LLAMA31, {"tool_calls": [CALL]}, "chosen[0].content"),  # beside a call it writes no content
        (
            QWEN3.replace("c.arguments | tojson", "'{}'"),
            {"tool_calls": [CALL]},
            "chosen[0].tool_calls[0].function.arguments.city",
        ),
    ],
)
def test_what_a_template_drops_of_a_reply_is_refused_and_named(
    template: str, extras: dict, field: str
) -> None:
    said = row(say("assistant", "It is.", **extras), source="a.jsonl:3")
    with pytest.raises(InputError, match=r"a\.jsonl:3: .*drops this part of the reply.*template") as caught:
        text_of(said, template)
    assert caught.value.field == field
    assert dropped_parts(said, chat_tokenizer(template), None)[0] == field


def test_reasoning_after_a_prompt_that_closed_it_is_refused() -> None:
    said = row(say("assistant", "It is.", reasoning_content="why"), source="a.jsonl:3")
    with pytest.raises(InputError, match=r"a\.jsonl:3: field 'chosen'.*enable_thinking"):
        text_of(said, QWEN3, enable_thinking=False)
    calling = row(say("assistant", None, tool_calls=[CALL]))
    assert text_of(calling, QWEN3, enable_thinking=False).replies[0] == QWEN_CALL


def test_the_row_s_own_variables_go_over_the_recipe_s() -> None:
    own = row(say("assistant", "Yes."), chat_template_kwargs='{"enable_thinking": false}', source="a.jsonl:3")
    assert text_of(own, QWEN3, enable_thinking=True).prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    for bad, field in (("{", ""), ('{"tokenize": true}', ".tokenize")):
        with pytest.raises(InputError) as caught:
            text_of(own | {"chat_template_kwargs": bad}, QWEN3)
        assert (caught.value.file, caught.value.field) == ("a.jsonl:3", f"chat_template_kwargs{field}")


def test_dropped_parts_of_prompt_and_tools() -> None:
    thought = say("assistant", "<think>\nold\n</think>\n\nHo")
    asked = say("user", "<tool_response>weather</tool_response>", name="Ann")
    said = row(say("assistant", "Yes."), *USED_TOOL, asked, thought, asked, tools=json.dumps(TOOLS))
    assert dropped_parts(said, chat_tokenizer(QWEN3), {}) == [
        "prompt[1].reasoning_content",
        "prompt[3].name",
        "prompt[4].content<think>",
        "prompt[5].name",
    ]
    assert dropped_parts(said, chat_tokenizer(PLAIN), {}) == [
        "tools[0].function.name",
        "tools[0].function.description",
        "prompt[1].tool_calls[0].function.name",
        "prompt[1].tool_calls[0].function.arguments.city",
        "prompt[1].tool_calls[0].function.arguments.days",
        "prompt[1].reasoning_content",
        "prompt[3].name",
        "prompt[5].name",
    ]
    texts = {"prompt": "weather", "chosen": "a", "rejected": "b", "tools": json.dumps(TOOLS)}
    assert dropped_parts(texts, chat_tokenizer(QWEN3), {}) == [
        "tools[0].function.name",
        "tools[0].function.description",
    ]


def test_dropped_parts_where_the_template_minds_the_marks() -> None:
    fussy = "{% if messages[0].content != 'Hi' %}{{ raise_exception('not Hi') }}{% endif %}" + PLAIN
    said = row(
        say("assistant", "Yes.", reasoning_content="why"), say("user", "Hi"), say("user", "Ho", name="Ann")
    )
    assert dropped_parts(said, chat_tokenizer(fussy), {}) == ["prompt[1].name", "chosen[0].reasoning_content"]
    said["prompt"] = [say("user", "Ho")]
    with pytest.raises(InputError, match="not Hi"):
        dropped_parts(said, chat_tokenizer(fussy), {})


def test_from_a_data_set_to_ids(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(QWEN3)
    plain = row(say("assistant", None, tool_calls=[CALL]), *USED_TOOL, tools=json.dumps(TOOLS))
    held = {name: [packed(m) for m in plain[name]] for name in ("prompt", "chosen", "rejected")}
    rows = [
        {**plain, **held, "chat_template_kwargs": kwargs} for kwargs in (None, '{"enable_thinking": false}')
    ]
    tokenised = [
        tokenize_pairs(datasets.Dataset.from_list(some), tokenizer, cache_dir=tmp_path).dataset
        for some in (rows, [rows[1], rows[1]])
    ]
    chosen = [tokenizer.decode(ids) for ids in tokenised[0]["chosen_ids"]]
    assert chosen == [f"<think>\n\n</think>\n\n{QWEN_CALL}<|im_end|>", f"{QWEN_CALL}<|im_end|>"]
    assert tokenizer.decode(tokenised[0][1]["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
    assert tokenised[1][0]["chosen_ids"] == tokenised[0][1]["chosen_ids"]  # and not what lay in the cache
