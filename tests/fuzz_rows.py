"""Good rows of every built-in format; marks in texts: «P» a prompt's, «A» the best reply's, «B» the next"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GoodRow:
    """A row as it lies on disk, and the keys of what it says of its replies (and whose place matters)."""

    row: dict[str, Any]
    judges: tuple[str, ...] = ()


ASK = [{"role": "user", "content": "Name «P» it."}]
BEST, NEXT = [[{"role": "assistant", "content": f"It is «{letter}»."}] for letter in "AB"]
HH = "\n\nHuman: Name «P» it.\n\nAssistant: It is «{}»."
TURNS = [{"from": "human", "value": "Name «P» it."}]

GOOD: dict[str, list[GoodRow]] = {
    "explicit_prompt": [
        GoodRow({"prompt": "Name «P» it.", "chosen": " «A».", "rejected": " «B»."}),
        GoodRow({"prompt": ASK, "chosen": BEST, "rejected": NEXT, "tools": [{}], "prompt_id": 1}),
        GoodRow({"prompt": "Name «P» it.", "chosen": ASK + BEST, "rejected": ASK + NEXT, "score_chosen": 2}),
        GoodRow({"prompt": "Name «P» it.", "chosen": BEST[0], "rejected": NEXT[0]}),
        GoodRow({"system": "«P»", "prompt": "«P»", "chosen": "«A»", "rejected": "«B»"}),
        GoodRow({"system_prompt": "«P»", "prompt": ASK, "chosen": ASK + BEST, "rejected": ASK + NEXT}),
    ],
    "implicit_prompt": [
        GoodRow({"chosen": ASK + BEST, "rejected": ASK + NEXT}),
        GoodRow({"chosen": ASK + BEST, "rejected": ASK + NEXT, "system": "«P»"}),
        GoodRow(
            {
                "chosen": [*TURNS, {"from": "gpt", "value": "«A»"}],
                "rejected": [*TURNS, {"from": "gpt", "value": "«B»"}],
            }
        ),
    ],
    "hh": [GoodRow({"chosen": HH.format("A"), "rejected": HH.format("B")})],
    "sharegpt": [
        GoodRow({"conversations": TURNS, "chosen": {"from": "gpt", "value": "«A»"}, "rejected": "«B»"}),
        GoodRow({"conversations": TURNS, "chosen": "«A»", "rejected": "«B»", "system": "«P» Be brief."}),
    ],
    "unpaired": [
        GoodRow({"prompt": "Name «P» it.", "completion": " «A»", "label": True}, ("label",)),
        GoodRow({"prompt": ASK, "completion": ASK + BEST, "label": 0}, ("label",)),
        GoodRow({"prompt": "«P»", "completion": "«A»", "label": "True", "system": ""}, ("label",)),
    ],
    "unpaired_messages": [GoodRow({"messages": ASK + BEST, "label": False}, ("label",))],
    "ranked": [
        GoodRow({"prompt": "«P»", "completions": ["«B»", "«A»", "«C»"], "scores": [1, 2, 0.5]}, ("scores",)),
        GoodRow({"prompt": ASK, "completions": [NEXT, BEST], "ranks": [2, 1]}, ("ranks",)),
    ],
    "alpaca": [
        GoodRow({"instruction": "«P»", "input": "more «P»", "chosen": "«A»", "rejected": "«B»"}),
        GoodRow({"instruction": "«P»", "input": "", "system": "«P»", "chosen": "«A»", "rejected": "«B»"}),
        GoodRow({"instruction": "«P»", "history": [["«P»", "«P»"]], "chosen": "«A»", "rejected": "«B»"}),
    ],
    "alpaca_kto": [GoodRow({"instruction": "«P»", "output": "«A»", "kto_tag": True}, ("kto_tag",))],
    "rated_responses": [
        GoodRow(
            {"system": "«P»", "instruction": "«P»", "chosen_response": "«A»", "rejected_response": "«B»"}
        ),
        GoodRow(
            {"instruction": "«P»", "chosen_response": "«A»", "rejected_response": "«B»"}
            | {"chosen_rating": 5, "rejected_rating": 1.5},
            ("chosen_rating", "rejected_rating"),
        ),
    ],
    "orca_dpo": [GoodRow({"system": "«P»", "question": "«P»", "chosen": "«A»", "rejected": "«B»"})],
    "orca_dpo_input": [GoodRow({"system": "", "input": "«P»", "chosen": "«A»", "rejected": "«B»"})],
    "nemo_aligner": [
        GoodRow(
            {"prompt": "«P»", "chosen_response": "«A»", "rejected_response": "«B»", "system": "«P»"}
            | {"chosen_reward": "4", "rejected_reward": 1},
            ("chosen_reward", "rejected_reward"),
        )
    ],
    "query_responses": [
        GoodRow(
            {"query": "«P»", "response": "«A»", "rejected_response": "«B»"}
            | {"system": "«P»", "history": [["«P»", "«P»"]]}
        )
    ],
    "swift": [GoodRow({"messages": ASK + BEST, "rejected_response": "«B»", "system": "«P»"})],
    "swift_conversations": [GoodRow({"messages": ASK + BEST, "rejected_messages": ASK + NEXT})],
    "several_chosen": [
        GoodRow({"prompt": "«P»", "chosen": ["«A»", "«A»!"], "rejected": ["«B»", "«C»"], "num_correct": 2})
    ],
    "scored_response": [GoodRow({"prompt": "«P»", "response": "«A»", "score": "0.5"}, ("score",))],
    "scored_completion": [GoodRow({"prompt": ASK, "completion": BEST, "score": 2}, ("score",))],
    "safety_labels": [
        GoodRow({"prompt": "«P»", "response": "«A»", "is_safe": True, "category": {}}, ("is_safe",))
    ],
    "align_anything": [
        GoodRow(
            {"question": "«P»", "response_1": "«B»", "response_2": "«A»", "overall_response": 2},
            ("overall_response",),
        )
    ],
    "oasst": [
        GoodRow(
            {
                "message_id": "x",
                "message_tree_id": "x",
                "role": "prompter",
                "text": "«P»",
                "replies": [
                    {"message_id": "b", "role": "assistant", "text": "«B»", "rank": 1, "replies": []},
                    {"message_id": "a", "role": "assistant", "text": "«A»", "rank": 0},
                ],
            },
            ("rank", "role", "deleted"),
        )
    ],
    "question": [GoodRow({"question": "«P»", "chosen": "«A»", "rejected": "«B»"})],
    "question_responses": [
        GoodRow({"question": "«P»", "response_chosen": "«A»", "response_rejected": "«B»"}),
        GoodRow(
            {"system": "«P»", "history": [["«P»", "«P»"]], "question": "«P»"}
            | {"response_chosen": "«A»", "response_rejected": "«B»"}
        ),
    ],
    "stack_exchange_paired": [
        GoodRow({"question": "«P»", "response_j": "«A»", "response_k": "«B»", "qid": 1})
    ],
    "step_dpo": [
        GoodRow({"prompt": "«P»", "initial_reason_steps": "Steps. ", "chosen": "«A»", "rejected": "«B»"})
    ],
    "openai_preference": [
        GoodRow(
            {"input": {"messages": ASK, "tools": [], "parallel_tool_calls": True}}
            | {"preferred_output": BEST, "non_preferred_output": NEXT}
        )
    ],
    "safe_rlhf": [
        GoodRow(
            {"prompt": "«P»", "response_0": "«B»", "response_1": "«A»"}
            | {"better_response_id": 1, "safer_response_id": 0},
            ("better_response_id",),
        )
    ],
    "shp": [
        GoodRow(
            {"history": "«P»", "human_ref_A": "«A»", "human_ref_B": "«B»"}
            | {"labels": 1, "score_A": 9, "score_B": 4},
            ("labels", "score_A", "score_B"),
        )
    ],
    "summarize_from_feedback": [
        GoodRow(
            {"info": {"post": "«P»", "title": "«P»", "subreddit": "«P»", "article": None}}
            | {"summaries": [{"text": "«B»", "policy": "ref"}, {"text": "«A»"}], "choice": 1},
            ("choice",),
        ),
        GoodRow(
            {"info": {"article": "«P»"}, "summaries": [{"text": "«A»"}, {"text": "«B»"}], "choice": 0},
            ("choice",),
        ),
    ],
    "webgpt": [
        GoodRow(
            {"question": {"full_text": "«P»", "id": "x"}, "answer_0": "«B»", "answer_1": "«A»"}
            | {"score_0": -0.5, "score_1": 0.5},
            ("score_0", "score_1"),
        )
    ],
    "pandalm": [
        GoodRow(
            {"instruction": "«P»", "input": "«P»", "response1": "«A»", "response2": "«B»"}
            | {"annotator1": 1, "annotator2": 0, "annotator3": 1},
            ("annotator1", "annotator2", "annotator3"),
        )
    ],
    "alpaca_farm": [
        GoodRow(
            {"instruction": "«P»", "input": "", "output_1": "«B»", "output_2": "«A»", "preference": 1.9},
            ("preference",),
        )
    ],
    "helpsteer2_preference": [
        GoodRow(
            {"prompt": "«P»\n<extra_id_1>Assistant\n«P»\n<extra_id_1>User\n«P»", "response_1": "«A»"}
            | {"response_2": "«B»", "preference_strength": -2},
            ("preference_strength",),
        )
    ],
    "helpsteer3_preference": [
        GoodRow(
            {"context": ASK, "response1": "«B»", "response2": "«A»", "overall_preference": 3},
            ("overall_preference",),
        )
    ],
    "prometheus_preference": [
        GoodRow(
            {"orig_instruction": "«P»", "orig_response_A": "«B»", "orig_response_B": "«A»"}
            | {"orig_preference": "B"},
            ("orig_preference",),
        )
    ],
    "chatbot_arena": [
        GoodRow(
            {"conversation_a": ASK + NEXT, "conversation_b": ASK + BEST, "winner": "model_b", "turn": 1},
            ("winner", "turn"),
        )
    ],
    "chatbot_arena_kaggle": [
        GoodRow(
            {"prompt": '["«P»"]', "response_a": '["«A»"]', "response_b": '["«B»"]'}
            | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            ("winner_model_a", "winner_model_b", "winner_tie"),
        )
    ],
    "parallel_lists": [
        GoodRow({"query": "«P»", "response": ["«B»", "«A»"], "score": [1, 2.5]}, ("score",)),
        GoodRow({"instruction": "«P»", "generations": ["«A»", "«B»", "«C»"], "ranks": [1, 2, 3]}, ("ranks",)),
        GoodRow(
            {"system_prompt": "«P»", "instruction": "«P»", "generations": ["«A»", "«B»"], "ratings": [5, 1]},
            ("ratings",),
        ),
    ],
    "ultrafeedback": [
        GoodRow(
            {
                "instruction": "«P»",
                "completions": [
                    {"response": f"«{letter}»", "overall_score": score, "fine-grained_score": score}
                    for letter, score in (("B", 6), ("A", "8"), ("C", 2.5))
                ],
            },
            ("overall_score",),
        )
    ],
    "helpsteer": [
        GoodRow(
            {"prompt": "«P»", "response": "«A»", "helpfulness": 4}
            | dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2),
            ("helpfulness",),
        )
    ],
    "nectar": [
        GoodRow(
            {
                "prompt": "\n\nHuman: «P»\n\nAssistant: ",
                "answers": [{"answer": "«B»", "rank": 2.0}, {"answer": "«A»", "rank": 1}],
            },
            ("rank",),
        )
    ],
    "nemo": [
        GoodRow(
            {
                "context": ASK,
                "completions": [{"rank": 1, "completion": NEXT}, {"rank": 0, "completion": BEST}],
            },
            ("rank",),
        )
    ],
    "stack_exchange": [
        GoodRow(
            {"question": "«P»", "answers": [{"text": "«B»", "pm_score": 1}, {"text": "«A»", "pm_score": 4}]},
            ("pm_score",),
        )
    ],
    "scored_texts": [
        GoodRow(
            {"input": "«P»", "output": [{"score": 2, "text": "«A»"}, {"score": 1, "text": "«B»"}]}, ("score",)
        )
    ],
    "comparison": [GoodRow({"instruction": "«P»", "input": "«P»", "output": ["«A»", "«B»"]})],
    "oasst_tree": [
        GoodRow(
            {
                "message_tree_id": "x",
                "prompt": {
                    "role": "prompter",
                    "text": "«P»",
                    "replies": [
                        {"role": "assistant", "text": "«B»", "rank": 1, "replies": []},
                        {"role": "assistant", "text": "«A»", "rank": 0},
                    ],
                },
            },
            ("rank", "role", "deleted"),
        )
    ],
    "messages_and_replies": [
        GoodRow({"messages": ASK, "chosen": BEST[0], "rejected": NEXT[0]}),
        GoodRow({"messages": ASK, "chosen": BEST, "rejected": NEXT}),
    ],
    "context_turns": [
        GoodRow(
            {"context": [{"role": "human", "text": "«P»"}]}
            | {"chosen": {"role": "assistant", "text": "«A»"}}
            | {"rejected": {"role": "assistant", "text": "«B»"}}
        )
    ],
    "ultrainteract": [GoodRow({"trajectory": TURNS, "chosen": "«A»", "rejected": "«B»"})],
    "sharegpt_kto": [
        GoodRow({"conversations": [*TURNS, {"from": "gpt", "value": "«A»"}], "kto_tag": True}, ("kto_tag",))
    ],
}
