"""Recipes of runs that take a second and yet do all that a run does; and what they are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import make_model
from pair_files import write

from dpo_kit.tokenizer import train_byte_level_bpe

_TEXT = "the film was good and other bad actors never moved a single long scene of this quiet story"
WORDS = _TEXT.split(" ")


def text(start: int, step: int, words: int) -> str:
    return " ".join(WORDS[(start + step * place) % len(WORDS)] for place in range(words))


def make_world(folder: Path) -> Path:
    """policy/, train.jsonl, heldout.jsonl, prompts.jsonl, corpus.txt and reward.py."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [text(i, 1 + i % 5, 8 + i % 7) + f" {i}." for i in range(60)]
    tokenizer = train_byte_level_bpe(corpus, 300)
    tokenizer.save_pretrained(folder / "policy")
    fields = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    make_model("llama", **fields).save_pretrained(folder / "policy")
    rows = [
        {"prompt": text(i // 2, 3, 3 + i % 4), "chosen": " " + text(i, 2, 2 + i % 6), "rejected": f" bad {i}"}
        for i in range(54)
    ]
    write(folder / "train.jsonl", *rows[:44])
    write(folder / "heldout.jsonl", *rows[44:])
    write(folder / "prompts.jsonl", *({"prompt": text(i, 4, 3)} for i in range(3)))
    (folder / "corpus.txt").write_text("\n".join(corpus))
    (folder / "reward.py").write_text("def reward(text):\n    return len(set(text)) / 10\n")
    return folder


def recipe_of(name: str, world: Path, folder: Path) -> dict[str, Any]:
    """A recipe of `VARIANTS` whose run and reference lie in a folder of its own."""
    content: dict[str, Any] = {
        "model": {"path": f"{world}/policy"},
        "data": {"train": [f"{world}/train.jsonl"], "eval": [f"{world}/heldout.jsonl"]},
        "reference": {"mode": "cached", "cache_dir": f"{folder}"},
        "loss": {"name": "dpo", "beta": 0.3},
        "train": {
            "output_dir": f"{folder}/run",
            "batch_size": 4,
            "max_steps": 9,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "tokens_per_micro_batch": 60,
            "seed": 1,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "eval": {
            "prompts": f"{world}/prompts.jsonl",
            "max_new_tokens": 4,
            "reward": f"{world}/reward.py:reward",
            "every": 4,
        },
        "report": {"enabled": False},
    }
    for section, values in VARIANTS[name](world).items():
        content[section] = content.get(section, {}) | values
    return content


def _start(world: Path) -> dict[str, Any]:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # fmt: skip
    candidates = {"source": [f"{world}/corpus.txt"], "prompts": 8, "held_out": 3, "evaluation": 3,
                  "per_prompt": 3, "batch_size": 3, "prefix_tokens": [2, 5]}  # fmt: skip
    sft = {"corpus": [f"{world}/corpus.txt"], "vocabulary": 300, "max_length": 24}
    sft["train"] = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    return {
        "model": {"path": None, "config": config},
        "data": {"train": [], "eval": []},
        "sft": sft,
        "candidates": candidates,
        "eval": {"prompts": None},
        "train": {"max_steps": 5},
    }


VARIANTS: dict[str, Any] = {
    "plain": lambda world: {"report": {"enabled": True}},
    "quick": lambda world: {"train": {"max_steps": 5, "eval_steps": 2}},
    "start": _start,
    "lora": lambda world: {
        "model": {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}},
        "loss": {"name": "beta_dpo"},
    },
    # Lines of metrics that reach over a checkpoint.
    "moving": lambda world: {
        "reference": {"mode": "moving", "update_every": 3},
        "train": {"logging_steps": 3, "logging_first_step": False},
    },
}
