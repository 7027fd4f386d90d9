"""Tool calls, tools and a row's own variables through chat templates; what these drop."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from chat_templates import (
    CALL,
    DEEPSEEK,
    GPT_OSS,
    LLAMA31,
    PLAIN,
    QWEN3,
    QWEN_CALL,
    TOOLS,
    USED_TOOL,
    WRITTEN,
    chat_tokenizer,
    row,
    say,
    text_of,
)
from transformers import PreTrainedTokenizerFast

from dpo_kit.borders import is_plain_backend
from dpo_kit.chat import dropped_parts
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.pairs import load_pairs
from dpo_kit.pairs.messages import packed
from dpo_kit.tokenization import tokenize_pairs


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
    with pytest.warns(DpoKitWarning, match="opens a thought"):
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
    assert text.replies[1] == "<|channel|>final<|message|>No."


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


@pytest.mark.parametrize(
    ("template", "prompt", "tools", "drops"),
    [
        (PLAIN, [say("system", " Be kind.\n"), say("user", "Hi")], None, False),
        (PLAIN.replace("in messages", "in messages if m.role != 'system'"), [say("user", "Hi")], None, False),
        (
            PLAIN.replace("in messages", "in messages if m.role != 'system'"),
            [say("system", "Be kind."), say("user", "Hi")],
            None,
            True,
        ),
        (PLAIN, [say("user", "Hi")], TOOLS, True),
        (QWEN3, [say("user", "Hi")], TOOLS, False),
        (PLAIN, list(USED_TOOL), None, True),  # the call
        (QWEN3, [*USED_TOOL, say("assistant", "Sunny."), say("user", "Ho", name="Ann")], TOOLS, False),
        (PLAIN, [say("user", "Hi"), say("assistant", "Ho", reasoning_content="why")], None, False),
        (QWEN3.replace("m.content +", "'' +"), list(USED_TOOL), None, True),  # the call's result
    ],
)
def test_rows_of_which_the_prompt_loses_a_part(
    template: str, prompt: list[dict], tools: list | None, drops: bool
) -> None:
    said = row(say("assistant", "Yes."), *prompt, **({"tools": json.dumps(tools)} if tools else {}))
    assert text_of(said, template).drops == drops


class WithOwnCall(PreTrainedTokenizerFast):
    """Rows go through such a one in lists, not in arrays."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_what_a_template_drops_of_kept_rows_is_counted(tmp_path: Path) -> None:
    asks = [[say("user", "Hi")], [say("system", "Be kind."), say("user", "Hi")]]
    asks += [asks[0], [say("user", "H" * 99)]]
    tools = [None, None, json.dumps(TOOLS), json.dumps(TOOLS)]
    rows = [
        row(say("assistant", "Yes."), *prompt, tools=own, source=f"a.jsonl:{i + 1}")
        for i, (prompt, own) in enumerate(zip(asks, tools, strict=True))
    ]
    arrays = chat_tokenizer(PLAIN.replace("in messages", "in messages if m.role != 'system'"))
    lists = WithOwnCall(tokenizer_object=arrays.backend_tokenizer, eos_token="</s>")
    lists.chat_template = arrays.chat_template
    assert (is_plain_backend(arrays), is_plain_backend(lists)) == (True, False)
    for folder, tokenizer in (("arrays", arrays), ("lists", lists)):
        result = tokenize_pairs(
            datasets.Dataset.from_list(rows), tokenizer, max_length=60, cache_dir=tmp_path / folder
        )
        assert result.account() == [
            "dropped_overlong: 1 of 4 pairs (a.jsonl:4)",
            "template_drops: 2 of 4 pairs (a.jsonl:2, a.jsonl:3)",
        ]
        assert "drops" not in result.dataset.column_names


def test_tools_of_texts_are_dropped() -> None:
    texts = {"prompt": "weather", "chosen": "a", "rejected": "b"}
    assert not text_of(texts, PLAIN).drops
    assert text_of(texts | {"tools": json.dumps(TOOLS)}, PLAIN).drops


def test_tools_as_a_list_of_json_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row(say("assistant", "Yes."), tools=[json.dumps(tool) for tool in TOOLS]))
    )
    (loaded,) = load_pairs(tmp_path / "a.jsonl")
    assert json.loads(loaded["tools"]) == TOOLS
    by_hand = loaded | {"tools": json.dumps([json.dumps(tool) for tool in TOOLS])}
    assert text_of(loaded, QWEN3) == text_of(by_hand, QWEN3)
    assert json.dumps(TOOLS[0]) in text_of(by_hand, QWEN3).prompt
    for bad in (["weather"], ["3"], [3], {"name": "weather"}):
        with pytest.raises(InputError, match=r"a\.jsonl:1: field 'tools"):
            text_of(loaded | {"tools": json.dumps(bad)}, QWEN3)


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
