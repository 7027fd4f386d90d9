"""One row of each shape of conversations as its public set has it, and what becomes of it, by format."""

from __future__ import annotations

import json
from typing import Any


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def reply(content: str) -> list[dict[str, str]]:
    return [said("assistant", content)]


ANN = [said("system", "You are Ann."), said("user", "Who are you?")]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CONVERSATIONS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "explicit_prompt": [
        (  # Dahoas/full-hh-rlhf: HH's turns in a prompt of its own stay as they are
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant:",
                "response": " Hello",
                "chosen": " Hello",
                "rejected": " Bye",
            },
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Bye"},
        ),
        (  # jondurbin/truthy-dpo-v0.1
            {
                "id": "1",
                "source": "truthy_dpo",
                "system": "You are Ann.",
                "prompt": "Who are you?",
                "chosen": "Ann.",
                "rejected": "Bob.",
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        ),
        (  # the system text is in one of the two columns, and in one side's own turns already
            {
                "system": None,
                "system_prompt": "You are Ann.",
                "prompt": ANN[1:],
                "chosen": [*ANN, *reply("Ann.")],
                "rejected": [*ANN[1:], *reply("Bob.")],
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        ),
        (
            {
                "system": "You are Ann.",
                "prompt": "Who are you?",
                "chosen": said("assistant", "Ann."),
                "rejected": {"from": "gpt", "value": "Bob."},
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        ),
        (  # a text prompt beside whole conversations of more turns
            {
                "system": "You are Ann.",
                "prompt": "Who are you?",
                "chosen": [*ANN[1:], *reply("Ann."), said("user", "Who?"), *reply("Ann.")],
                "rejected": [*ANN[1:], *reply("Ann."), said("user", "Who?"), *reply("Bob.")],
            },
            {
                "prompt": [*ANN, *reply("Ann."), said("user", "Who?")],
                "chosen": reply("Ann."),
                "rejected": reply("Bob."),
            },
        ),
        (  # HuggingFaceH4/ultrafeedback_binarized: 'messages' is a copy of the chosen side
            {
                "prompt": "Hi",
                "messages": [said("user", "Hi"), *reply("Hello")],
                "chosen": [said("user", "Hi"), *reply("Hello")],
                "rejected": [said("user", "Hi"), *reply("Bye")],
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            },
            {
                "prompt": [said("user", "Hi")],
                "chosen": reply("Hello"),
                "rejected": reply("Bye"),
                "margin": 2.5,
            },
        ),
    ],
    "implicit_prompt": [
        (
            {
                "messages": [said("user", "Hi"), *reply("Hello")],
                "chosen": [said("user", "Hi"), *reply("Hello")],
                "rejected": [said("user", "Hi"), *reply("Bye")],
            },
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        ),
        (
            {
                "system": "You are Ann.",
                "chosen": [*ANN[1:], *reply("Ann.")],
                "rejected": [*ANN[1:], *reply("Bob.")],
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        ),
        (
            {
                "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bye"}],
            },
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        ),
        (  # Llama 3's name for a tool, and OpenAI's old one
            {
                side: [said("user", "1 + 1?"), said("ipython", "2"), said("function", "2"), *reply(text)]
                for side, text in (("chosen", "2"), ("rejected", "3"))
            },
            {
                "prompt": [said("user", "1 + 1?"), said("tool", "2"), said("tool", "2")],
                "chosen": reply("2"),
                "rejected": reply("3"),
            },
        ),
    ],
    "sharegpt": [
        (
            {
                "conversations": [
                    {"from": "human", "value": "How cold is it?"},
                    {"from": "function_call", "value": '{"name": "weather"}'},
                    {"from": "observation", "value": "10"},
                ],
                "tools": json.dumps([WEATHER]),
                "chosen": {"from": "gpt", "value": "Ten degrees."},
                "rejected": [{"from": "gpt", "value": "Cold."}],
            },
            {
                "prompt": [
                    said("user", "How cold is it?"),
                    said("assistant", '{"name": "weather"}'),
                    said("tool", "10"),
                ],
                "tools": json.dumps([WEATHER]),
                "chosen": reply("Ten degrees."),
                "rejected": reply("Cold."),
            },
        ),
        (
            {
                "conversations": [{"from": "human", "value": "How cold is it?"}],
                "tools": "",
                "chosen": {"from": "function_call", "value": '{"name": "weather"}'},
                "rejected": "Cold.",
            },
            {
                "prompt": [said("user", "How cold is it?")],
                "chosen": reply('{"name": "weather"}'),
                "rejected": reply("Cold."),
            },
        ),
    ],
    "messages_and_replies": [
        (
            {
                "messages": [said("system", "Be brief."), said("user", "Hi")],
                "chosen": said("assistant", "Hello"),
                "rejected": said("assistant", "Bye"),
            },
            {
                "prompt": [said("system", "Be brief."), said("user", "Hi")],
                "chosen": reply("Hello"),
                "rejected": reply("Bye"),
            },
        ),
        (
            {"messages": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
            {"prompt": [said("user", "Hi")], "chosen": reply("Hello"), "rejected": reply("Bye")},
        ),
    ],
    "swift": [
        (
            {"messages": [*ANN, *reply("Ann.")], "rejected_response": "Bob."},
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        )
    ],
    "swift_conversations": [
        (
            {
                "system": "You are Ann.",
                "messages": [ANN[1], *reply("Ann.")],
                "rejected_messages": [ANN[1], *reply("Bob.")],
            },
            {"prompt": ANN, "chosen": reply("Ann."), "rejected": reply("Bob.")},
        )
    ],
    "context_turns": [
        (
            {
                "context": [
                    {"role": "human", "text": "Hi"},
                    {"role": "assistant", "text": "Ho"},
                    {"role": "human", "text": "Hi!"},
                ],
                "chosen": {"role": "assistant", "text": "Hello"},
                "rejected": {"role": "assistant", "text": "Bye"},
            },
            {
                "prompt": [said("user", "Hi"), *reply("Ho"), said("user", "Hi!")],
                "chosen": reply("Hello"),
                "rejected": reply("Bye"),
            },
        )
    ],
    "ultrainteract": [
        (
            {
                "task": "Coding",
                "dataset": "codecontest",
                "trajectory": [{"from": "user", "value": "Solve it."}],
                "chosen": "Step 1",
                "rejected": "Step 0",
                "id": "a",
                "parent_id": "b",
            },
            {"prompt": [said("user", "Solve it.")], "chosen": reply("Step 1"), "rejected": reply("Step 0")},
        )
    ],
    "sharegpt_kto": [
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "kto_tag": True,
            },
            {"prompt": [said("user", "Hi")], "completion": reply("Hello"), "label": True},
        )
    ],
}
