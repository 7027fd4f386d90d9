"""Reasoning in a reply, and replies after a generation prompt that opens or closes a thought."""

from __future__ import annotations

import warnings

import pytest
from chat_templates import (
    CALL,
    DEEPSEEK,
    GLM,
    NEMOTRON,
    PLAIN,
    QWEN3,
    WRITTEN,
    chat_tokenizer,
    row,
    say,
    text_of,
)

from dpo_kit.errors import DpoKitWarning


@pytest.mark.parametrize(
    ("reply", "written"),
    [
        (say("assistant", "Good."), "</think>Good."),
        (say("assistant", " \n Good. \n"), "</think> \n Good."),
        (say("assistant", "Good.", reasoning_content="why"), "why\n</think>\nGood."),
        (say("assistant", "<think>\nwhy\n</think>\n\nGood."), "why\n</think>\n\nGood."),
        (say("assistant", "<think>why</think>Good."), "why</think>Good."),
        (say("assistant", None, tool_calls=[CALL]), f"</think>\n<tool_call>weather{WRITTEN}</tool_call>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_closed_as_the_template_closes_it(
    reply: dict, written: str
) -> None:
    text = text_of(row(reply), NEMOTRON)
    assert text.prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert text.replies == [written, "</think>No."]
    # Without that white space behind the opened thought it is the template's own text of the conversation.
    whole = chat_tokenizer(NEMOTRON).apply_chat_template([say("user", "Hi"), reply], tokenize=False)
    opened = text.prompt.removesuffix("\n")
    assert whole.removesuffix("<|im_end|>\n") in (opened + written, opened + "\n" + written)
    assert text_of(row(say("assistant", "Good.")), NEMOTRON, enable_thinking=False).replies == [
        "Good.",
        "No.",
    ]


def test_a_thought_that_nothing_closes_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for content in ("<think>\nwhy\n</think>\n\nGood.", "So.", "Ho."):
            text = text_of(row(say("assistant", content)), DEEPSEEK)
    assert [str(each.message)[:60] for each in said if each.category is DpoKitWarning] == [
        "the chat template's generation prompt opens a thought (<thin"
    ]
    assert text.prompt.endswith("<think>\n")
    assert text.replies == ["Ho.", "No."]
    both = row(say("assistant", "why</think>Good.")) | {
        "rejected": [say("assistant", "<think>no</think>No.")]
    }
    assert text_of(both, DEEPSEEK).replies == ["why</think>Good.", "no</think>No."]  # no warning


@pytest.mark.parametrize("content", ["<think>\nwhy\n</think>\n\nGood.", "why</think>Good."])
def test_a_second_thought_after_a_closed_one_is_said(content: str) -> None:
    with pytest.warns(DpoKitWarning, match="replies have another"):
        text = text_of(row(say("assistant", content)), QWEN3, enable_thinking=False)
    assert text.prompt.endswith("</think>\n\n")
    assert text.replies == [content, "No."]


def test_tags_in_the_words_of_a_reply_are_no_thought() -> None:
    assert text_of(row(say("assistant", "Use </think>.")), PLAIN).replies[0] == "Use </think>."


@pytest.mark.parametrize(
    "content", ["<think>\nwhy\n</think>\n\nYes.", "<think>why</think>Yes.", "why</think>Yes."]
)
def test_reasoning_in_the_content_is_written_as_the_template_writes_it(content: str) -> None:
    assert text_of(row(say("assistant", content)), GLM).replies == [
        "\n<think>why</think>\nYes.",
        "\n<think></think>\nNo.",
    ]


@pytest.mark.parametrize("opening", ["<think>", ""])
@pytest.mark.parametrize("thought", ["think", "2"])
def test_reasoning_that_the_template_takes_out_is_found_out(thought: str, opening: str) -> None:
    """Though the words of it stand in what the template writes."""
    content = f"{opening}{thought}</think>2 + 2 is 4; 2."
    template = GLM.replace("(parts[0].split('<think>')[-1].strip() if parts | length > 1 else '')", "''")
    assert text_of(row(say("assistant", content)), template).replies[0] == content
