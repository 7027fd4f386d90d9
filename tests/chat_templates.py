"""Short chat templates after the manner of known families, and rows to write with them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpo_kit.chat import RowText, row_text
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
NEMOTRON = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content or '' %}{% if m.reasoning_content %}"
    "{% set said = '<think>\\n' + m.reasoning_content + '\\n</think>\\n' + said %}"
    "{% elif '<think>' not in said %}{% set said = '<think></think>' + said %}{% endif %}"
    "{{ said | trim }}{% for c in m.tool_calls or [] %}"
    "{{ '\\n<tool_call>' + c.function.name + c.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{{ '<think></think>' if enable_thinking is false else '<think>\\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{{ '\\n<think>' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') }}"
    "{{ '</think>\\n' }}"
    "{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
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
