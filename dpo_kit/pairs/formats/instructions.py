"""Instructions and questions with a better and a worse reply, under the names that public sets have for them.

Prompts stay text where a row is one instruction: which template a model was trained with, Alpaca's among
them, is the model's business and not in the data. A row with a column for the system text or for earlier
turns has a list of messages for a prompt, filled or not, so that all rows of a file are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_kit.pairs.formats.registry import Convert, Format, Row
from dpo_kit.pairs.formats.turns import SYSTEM, taking_system
from dpo_kit.pairs.formats.values import label, number
from dpo_kit.pairs.kinds import UNPAIRED
from dpo_kit.pairs.schema import BadRow, checked_text, kind_of

_TURNS = (*SYSTEM, "history")
_RATINGS = ("avg_rating", "rating", "reward")
_RATED = tuple(f"{side}_{rating}" for rating in _RATINGS for side in ("chosen", "rejected"))


def instruction(row: Row) -> str:
    """The instruction; an input follows on a line of its own, as LLaMA-Factory reads these files."""
    asked = checked_text(row["instruction"], "instruction")
    more = "" if row.get("input") is None else checked_text(row["input"], "input")
    return f"{asked}\n{more}" if more.strip() else asked


def _after_history(row: Row, asked: str) -> str | list[dict[str, str]]:
    """The prompt: the text alone, or messages where the row has the column `history`."""
    if "history" not in row:
        return asked
    history = row["history"] or []
    if not isinstance(history, list):
        raise BadRow(f"expected a list of [question, answer], found {kind_of(history)}", field="history")
    messages = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"expected [question, answer], found {kind_of(pair)}", field=f"history[{i}]")
        for j, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            messages.append({"role": role, "content": checked_text(text, f"history[{i}][{j}]")})
    return [*messages, {"role": "user", "content": asked}]


def _alpaca(row: Row) -> Row:
    return {
        "prompt": _after_history(row, instruction(row)),
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    }


def _alpaca_kto(row: Row) -> Row:
    return {
        "prompt": _after_history(row, instruction(row)),
        "completion": row["output"],
        "label": label(row["kto_tag"], "kto_tag"),
    }


def _rated(asked: Callable[[Row], str]) -> Convert:
    """The adapter of {chosen_response, rejected_response}; ratings of both make a margin."""

    def convert(row: Row) -> Row:
        replies = {"chosen": row["chosen_response"], "rejected": row["rejected_response"]}
        pair = {"prompt": asked(row), **replies}
        for rating in _RATINGS:
            names = (f"chosen_{rating}", f"rejected_{rating}")
            chosen, rejected = (number(row.get(name), name) for name in names)
            if chosen is not None and rejected is not None:
                return {**pair, "margin": chosen - rejected}
        return pair

    return taking_system(convert)


def _asked(question: str, chosen: str = "chosen", rejected: str = "rejected") -> Convert:
    """The adapter of rows with a question and two replies in these columns, and whatever stood before."""

    def convert(row: Row) -> Row:
        asked = checked_text(row[question], question)
        return {"prompt": _after_history(row, asked), "chosen": row[chosen], "rejected": row[rejected]}

    return taking_system(convert)


def _beside(*names: str) -> Callable[[Row], list[str]]:
    """Detection: none of these columns, which say that the row is of another shape."""
    return lambda row: [f"a row without '{name}'" for name in names if name in row]


def _not_texts(row: Row) -> list[str]:
    return [
        f"text in '{name}'"
        for name in ("prompt", "question", "chosen", "rejected")
        if name in row and not isinstance(row[name], str)
    ]


def _not_question(row: Row) -> list[str]:
    return [*_not_texts(row), *_beside("prompt", "instruction")(row)]


def _stack_exchange(row: Row) -> Row:
    return {"prompt": row["question"], "chosen": row["response_j"], "rejected": row["response_k"]}


def _steps(row: Row) -> Row:
    """The steps before the judged one begin both replies; they cancel in the difference of log-probs."""
    begun = checked_text(row["initial_reason_steps"], "initial_reason_steps")
    replies = {name: begun + checked_text(row[name], name) for name in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **replies}


def _not_openai(row: Row) -> list[str]:
    fits = "input" not in row or (isinstance(row["input"], dict) and "messages" in row["input"])
    return [] if fits else ["an object with 'messages' in 'input'"]


def _openai(row: Row) -> Row:
    """`parallel_tool_calls` is of the request and no part of what a template writes."""
    asked: Any = row["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        found = "an object without" if isinstance(asked, dict) else kind_of(asked)
        raise BadRow(f"expected an object with 'messages', found {found}", field="input")
    lists = {"input.messages": asked["messages"]}
    lists |= {name: row[name] for name in ("preferred_output", "non_preferred_output")}
    for name, messages in lists.items():
        if not isinstance(messages, list):
            raise BadRow(f"expected a list of messages, found {kind_of(messages)}", field=name)
    pair = {
        "prompt": asked["messages"],
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
    }
    return {**pair, "tools": asked["tools"]} if asked.get("tools") else pair


FORMATS = (
    Format(
        "alpaca",
        "{instruction, input, chosen, rejected}, the input on a line of its own; also with system, and "
        "history: [[question, answer]] (hiyouga/LLaMA-Factory)",
        ("instruction", "chosen", "rejected"),
        taking_system(_alpaca),
        _beside("prompt"),
        optional=("input", *_TURNS),
        prompt_field="instruction",
    ),
    Format(
        "alpaca_kto",
        "{instruction, input, output, kto_tag: true where the output is desirable} (hiyouga/LLaMA-Factory)",
        ("instruction", "output", "kto_tag"),
        taking_system(_alpaca_kto),
        optional=("input", *_TURNS),
        prompt_field="instruction",
        names={"completion": "output", "label": "kto_tag"},
        kind=UNPAIRED,
    ),
    Format(
        "rated_responses",
        "{instruction, chosen_response, rejected_response, chosen_avg_rating, rejected_avg_rating} "
        "(argilla/ultrafeedback-binarized-preferences, argilla/distilabel-math-preference-dpo)",
        ("instruction", "chosen_response", "rejected_response"),
        _rated(instruction),
        optional=("input", *SYSTEM, *_RATED),
        prompt_field="instruction",
        names={"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    Format(
        "nemo_aligner",
        "{prompt, chosen_response, rejected_response, chosen_reward, rejected_reward} (NVIDIA/NeMo-Aligner)",
        ("prompt", "chosen_response", "rejected_response"),
        _rated(lambda row: row["prompt"]),
        _beside("instruction"),
        optional=(*SYSTEM, *_RATED),
        names={"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    Format(
        "query_responses",
        "{query, response, rejected_response}; also with system, and history: [[question, answer]] "
        "(modelscope/ms-swift)",
        ("query", "response", "rejected_response"),
        _asked("query", "response", "rejected_response"),
        optional=_TURNS,
        prompt_field="query",
        names={"chosen": "response", "rejected": "rejected_response"},
    ),
    Format(
        "orca_dpo",
        "{system, question, chosen, rejected} (Intel/orca_dpo_pairs)",
        ("system", "question", "chosen", "rejected"),
        _asked("question"),
        _beside("prompt", "instruction"),
        optional=_TURNS,
        prompt_field="question",
    ),
    Format(
        "orca_dpo_input",
        "{system, input, chosen, rejected} (argilla/distilabel-intel-orca-dpo-pairs)",
        ("system", "input", "chosen", "rejected"),
        _asked("input"),
        _beside("prompt", "instruction", "question"),
        optional=_TURNS,
        prompt_field="input",
    ),
    Format(
        "question",
        "{question, chosen, rejected} as text (ProlificAI/social-reasoning-rlhf)",
        ("question", "chosen", "rejected"),
        _asked("question"),
        _not_question,
        optional=_TURNS,
        prompt_field="question",
    ),
    Format(
        "question_responses",
        "{question, response_chosen, response_rejected}; also with system, and history: [[question, answer]] "
        "(shibing624/MedicalGPT, reward data)",
        ("question", "response_chosen", "response_rejected"),
        _asked("question", "response_chosen", "response_rejected"),
        optional=_TURNS,
        prompt_field="question",
        names={"chosen": "response_chosen", "rejected": "response_rejected"},
    ),
    Format(
        "stack_exchange_paired",
        "{question, response_j, response_k}, j is better (lvwerra/stack-exchange-paired)",
        ("question", "response_j", "response_k"),
        _stack_exchange,
        prompt_field="question",
        names={"chosen": "response_j", "rejected": "response_k"},
    ),
    Format(
        "step_dpo",
        "{prompt, initial_reason_steps, chosen, rejected}: the next step, better and worse; the steps before "
        "it begin both replies (xinlai/Math-Step-DPO-10K)",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        _steps,
    ),
    Format(
        "openai_preference",
        "{input: {messages, tools, parallel_tool_calls}, preferred_output: [messages], "
        "non_preferred_output: [messages]} (OpenAI's preference fine-tuning)",
        ("input", "preferred_output", "non_preferred_output"),
        _openai,
        _not_openai,
        prompt_field="input.messages",
        names={
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
            "tools": "input.tools",
        },
    ),
)
