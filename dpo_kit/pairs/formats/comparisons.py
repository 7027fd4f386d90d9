"""Rows that say which of two replies is better: by a label, by two scores, by several votes.

Each adapter gives the replies in their order on disk, with the share of the judgement that is for the first
(see `registry.Format`); what becomes of ties and votes is `choosing`'s. A label is read strictly: a value
that the shape does not know is a bad row. Arenas, which compare whole conversations, are in `arenas`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_kit.pairs.formats.instructions import instruction
from dpo_kit.pairs.formats.ranked import helpsteer_prompt
from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.formats.values import bounded, number
from dpo_kit.pairs.schema import BadRow, UnusablePair, checked_text, kind_of, need

Shares = Mapping[Any, float]
FIRST_OF_0_1: Shares = {0: 1, 1: 0}
VOTES: Shares = {0: 0.5, 1: 1, 2: 0}
_ANNOTATOR = re.compile(r"annotator\d+")


def share(value: Any, field: str, shares: Shares) -> float:
    """The share for the first reply that a label's value means; numbers may also be written as text (CSV).

    Raises `BadRow` with the known values for any other, booleans among them.
    """
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    for known, first in shares.items() if plain else ():
        if value in (known, str(known)):
            return first
    found = f"{value!r:.40}" if plain else kind_of(value)
    words = ", ".join(map(repr, shares))
    raise BadRow(f"unknown judgement {found}", field=field, mend=f"Known values: {words}")


def sign_share(difference: float) -> float:
    """1, 0.5 or 0 by whether the first reply's score is above, equal to or below that of the second."""
    return 0.5 if difference == 0 else float(difference > 0)


def _labelled(prompt: str, first: str, second: str, label: str, shares: Shares) -> Callable[[Row], Row]:
    """The adapter of rows with the prompt, two replies and a label in these columns."""

    def convert(row: Row) -> Row:
        return {
            "prompt": row[prompt],
            "chosen": row[first],
            "rejected": row[second],
            "preference": share(need(row, label), label, shares),
        }

    return convert


_safe_rlhf = {
    judgement: _labelled("prompt", "response_0", "response_1", f"{judgement}_response_id", FIRST_OF_0_1)
    for judgement in ("better", "safer")
}


_by_upvotes = _labelled("history", "human_ref_A", "human_ref_B", "labels", {1: 1, 0: 0})


def _shp(row: Row) -> Row:
    pair = _by_upvotes(row)
    first, second = (number(row.get(name), name) for name in ("score_A", "score_B"))
    return pair if first is None or second is None else {**pair, "margin": first - second}


def _summaries(row: Row) -> Row:
    summaries = row["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        found = f"{len(summaries)}" if isinstance(summaries, list) else kind_of(summaries)
        raise BadRow(f"expected two summaries, found {found}", field="summaries")
    texts = [_inside(summary, "text", f"summaries[{i}]") for i, summary in enumerate(summaries)]
    return {
        "prompt": _summary_prompt(row["info"]),
        "chosen": texts[0],
        "rejected": texts[1],
        "preference": share(row["choice"], "choice", FIRST_OF_0_1),
    }


def _summary_prompt(info: Any) -> str:
    """The queries of the paper's own code (openai/summarize-from-feedback, utils/experiment_helpers.py)."""
    if isinstance(info, dict) and info.get("post") is None and info.get("article") is not None:
        return f"Article:\n{_inside(info, 'article', 'info')}\n\nTL;DR:\n"
    post, title, subreddit = (_inside(info, name, "info") for name in ("post", "title", "subreddit"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _inside(container: Any, key: str, field: str) -> str:
    """The text under a key of an object."""
    if not isinstance(container, dict):
        raise BadRow(f"expected an object with '{key}', found {kind_of(container)}", field=field)
    return checked_text(container.get(key), f"{field}.{key}")


def _webgpt(row: Row) -> Row:
    """The paper takes scores of 0 for ties and of all others the sign alone; here they are the margin too."""
    scores = [bounded(row[name], name, -1, 1) for name in ("score_0", "score_1")]
    return {
        "prompt": _inside(row["question"], "full_text", "question"),
        "chosen": row["answer_0"],
        "rejected": row["answer_1"],
        "preference": sign_share(scores[0] - scores[1]),
        "margin": scores[0] - scores[1],
    }


def _pandalm(row: Row) -> Row:
    votes = [
        share(row[name], name, VOTES) for name in row if _ANNOTATOR.fullmatch(name) and row[name] is not None
    ]
    prompt = instruction(row)
    for name in ("response1", "response2"):
        if not isinstance(row[name], str):
            message = f"the reply is no text but {kind_of(row[name])}"
            raise UnusablePair("reply_not_text", field=name, message=message)
    if not votes:
        raise UnusablePair("nothing_to_compare", field="annotator1")
    tied = 2 * votes.count(0.5) > len(votes)
    return {
        "prompt": prompt,
        "chosen": row["response1"],
        "rejected": row["response2"],
        "preference": 0.5 if tied else sum(votes) / len(votes),
    }


def _alpaca_farm(row: Row) -> Row:
    prompt = instruction(row)
    if row["preference"] is None:
        raise UnusablePair("nothing_to_compare", field="preference")
    judged = bounded(row["preference"], "preference", 0, 2)
    if 0 < judged < 1:
        raise BadRow(
            f"unknown judgement {judged:g}",
            field="preference",
            mend="Known values: 1 (the first is better) to 2 (the second is), 1.5 or 0 (a tie)",
        )
    pair = {"prompt": prompt, "chosen": row["output_1"], "rejected": row["output_2"]}
    return {**pair, "preference": 2 - judged if judged else 0.5}


def _helpsteer2(row: Row) -> Row:
    prompt = helpsteer_prompt(row["prompt"], "prompt")
    return _by_strength(prompt, row["response_1"], row["response_2"], row, "preference_strength")


def _helpsteer3(row: Row) -> Row:
    return _by_strength(row["context"], row["response1"], row["response2"], row, "overall_preference")


def _by_strength(prompt: Any, first: Any, second: Any, row: Row, field: str) -> Row:
    """-3: the first is much better, 3: the second is."""
    strength = bounded(row[field], field, -3, 3)
    return {
        "prompt": prompt,
        "chosen": first,
        "rejected": second,
        "preference": sign_share(-strength),
        "margin": 0.0 - strength,
    }


def _names(first: str, second: str, label: str) -> dict[str, str]:
    return {"chosen": first, "rejected": second, "preference": label}


FORMATS = (
    Format(
        "safe_rlhf",
        "{prompt, response_0, response_1, better_response_id: 0 or 1, safer_response_id} "
        "(PKU-Alignment/PKU-SafeRLHF)",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _safe_rlhf["better"],
        optional=("safer_response_id",),
        names=_names("response_0", "response_1", "better_response_id"),
        judgements=_safe_rlhf,
    ),
    Format(
        "shp",
        "{history, human_ref_A, human_ref_B, labels: 1 where A is preferred, score_A, score_B} "
        "(stanfordnlp/SHP)",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        _shp,
        optional=("score_A", "score_B"),
        prompt_field="history",
        names=_names("human_ref_A", "human_ref_B", "labels"),
    ),
    Format(
        "align_anything",
        "{question, response_1, response_2, overall_response: 1 or 2, the better} "
        "(PKU-Alignment/align-anything)",
        ("question", "response_1", "response_2", "overall_response"),
        _labelled("question", "response_1", "response_2", "overall_response", {1: 1, 2: 0}),
        prompt_field="question",
        names=_names("response_1", "response_2", "overall_response"),
    ),
    Format(
        "summarize_from_feedback",
        "{info: {post, title, subreddit} or {article}, summaries: [{text}, {text}], choice: 0 or 1}; the "
        "prompt is the paper's query (openai/summarize_from_feedback, comparisons)",
        ("info", "summaries", "choice"),
        _summaries,
        prompt_field="info",
        names=_names("summaries[0].text", "summaries[1].text", "choice"),
    ),
    Format(
        "webgpt",
        "{question: {full_text}, answer_0, answer_1, score_0, score_1 from -1 to 1, 0 for a tie} "
        "(openai/webgpt_comparisons)",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        _webgpt,
        prompt_field="question.full_text",
        names=_names("answer_0", "answer_1", "score_0"),
    ),
    Format(
        "pandalm",
        "{instruction, input, response1, response2, annotator1, annotator2, ...: 1, 2 or 0 for a tie}; a tie "
        "where most votes say so, else each vote for a tie is half a vote for each (WeOpenML/PandaLM)",
        ("instruction", "response1", "response2", "annotator1"),
        _pandalm,
        optional=("input", "annotator2", "annotator3"),
        prompt_field="instruction",
        names=_names("response1", "response2", "annotator1"),
    ),
    Format(
        "alpaca_farm",
        "{instruction, input, output_1, output_2, preference: 1 or 2, or 1 + the probability that the second "
        "is better; 0 or 1.5 for a tie} (tatsu-lab/alpaca_farm, tatsu-lab/alpaca_eval)",
        ("instruction", "output_1", "output_2", "preference"),
        _alpaca_farm,
        optional=("input",),
        prompt_field="instruction",
        names=_names("output_1", "output_2", "preference"),
    ),
    Format(
        "helpsteer2_preference",
        "{prompt, response_1, response_2, preference_strength from -3 (the first is much better) to 3}; "
        "<extra_id_1> turns in the prompt (nvidia/HelpSteer2, preference)",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2,
        names=_names("response_1", "response_2", "preference_strength"),
    ),
    Format(
        "helpsteer3_preference",
        "{context: messages, response1, response2, overall_preference from -3 (the first is much better) to "
        "3} (nvidia/HelpSteer3, preference)",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3,
        prompt_field="context",
        names=_names("response1", "response2", "overall_preference"),
    ),
    Format(
        "prometheus_preference",
        "{orig_instruction, orig_response_A, orig_response_B, orig_preference: A or B} "
        "(prometheus-eval/Preference-Collection)",
        ("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        _labelled(
            "orig_instruction", "orig_response_A", "orig_response_B", "orig_preference", {"A": 1, "B": 0}
        ),
        prompt_field="orig_instruction",
        names=_names("orig_response_A", "orig_response_B", "orig_preference"),
    ),
)
