"""Pairs made by the policy itself: replies to prompts, labelled by a reward (`candidates` in a recipe).

As in the controlled experiment of the DPO paper (arXiv 2305.18290, section 6.1 and appendix C.1): all
pairs of the replies to a prompt. What is written are ordinary files of pairs and of prompts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dpo_kit.errors import InputError
from dpo_kit.evaluation.rewards import load_reward
from dpo_kit.evaluation.sampling import Prompt, load_prompts, sample_replies
from dpo_kit.measurement import Say
from dpo_kit.models import load_model
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import write_text
from dpo_kit.tokenizer import load_tokenizer

TRAIN_FILE, HELD_OUT_FILE, PROMPTS_FILE = "train.jsonl", "heldout.jsonl", "prompts.jsonl"


def check_candidates(recipe: Recipe) -> None:
    """Refuse what would stop `make_pairs`: sources without enough prompts, a reward that does not load.

    Raises:
        InputError: naming the key.
    """
    _deal_prompts(recipe)
    _load_reward(recipe)


def make_pairs(recipe: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Sample, label, and write train.jsonl, heldout.jsonl and prompts.jsonl, unless they are there.

    Args:
        recipe: its `model` is what replies are sampled from.
        folder: where the files go.
        say: gets lines of progress.

    Returns:
        Figures for summary.json, among them seconds and tokens spent.
    """
    section = recipe.candidates
    assert section is not None
    figures_file = folder / "figures.json"
    if figures_file.exists():
        return dict(json.loads(figures_file.read_text()))
    train, held_out, evaluation = _deal_prompts(recipe)
    reward = _load_reward(recipe)
    policy = load_model(recipe.model.path or {}, getattr(torch, recipe.model.dtype))
    tokenizer = load_tokenizer(str(recipe.model.tokenizer or recipe.model.path))
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(section.seed)
    figures: dict[str, Any] = {}
    for name, prompts in ((TRAIN_FILE, train), (HELD_OUT_FILE, held_out)):
        say(f"sampling {section.per_prompt} replies to each of {len(prompts)} prompts for {name}")
        drawn = sample_replies(
            policy,
            tokenizer,
            prompts,
            samples=section.per_prompt,
            max_new_tokens=section.max_new_tokens or recipe.eval.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            batch_size=section.batch_size,
            seed=section.seed,
            chat_template_kwargs=recipe.data.chat_template_kwargs,
        )
        values = reward([s.prompt for s in drawn], [s.reply for s in drawn])
        rows: list[dict[str, Any]] = []
        for start in range(0, len(drawn), section.per_prompt):
            part = range(start, start + section.per_prompt)
            replies = [(drawn[i].reply, values[i]) for i in part]
            rows += pairs_of(drawn[start].prompt, replies, rng if section.labels == "bradley_terry" else None)
        _write(folder / name, rows)
        figures[f"candidates/{name.removesuffix('.jsonl')}_pairs"] = len(rows)
    _write(folder / PROMPTS_FILE, [{"prompt": prompt} for prompt in evaluation])
    write_text(figures_file, json.dumps(figures))
    return figures


def pairs_of(
    prompt: Prompt, replies: Sequence[tuple[str, float]], rng: random.Random | None
) -> list[dict[str, Any]]:
    """All pairs of (reply, reward) of a prompt; ties, equal and empty replies make none.

    The better reply is chosen, or, with `rng`, one drawn by Bradley-Terry: P(first) = sigmoid(r1 - r2).
    """
    rows = []
    for (first, first_reward), (second, second_reward) in combinations(replies, 2):
        margin = first_reward - second_reward
        if margin == 0 or first == second or not first.strip() or not second.strip():
            continue
        takes_first = rng.random() < 1 / (1 + math.exp(-margin)) if rng is not None else margin > 0
        chosen, rejected = (first, second) if takes_first else (second, first)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(row | {"margin": round(margin if takes_first else -margin, 6)})
    return rows


def _deal_prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Distinct prompts for training pairs, for held-out pairs and to evaluate on."""
    section = recipe.candidates
    assert section is not None
    found = list({json.dumps(p): p for source in section.source for p in load_prompts(source)}.values())
    random.Random(section.seed).shuffle(found)
    counts = (section.prompts, section.held_out, section.evaluation)
    if len(found) < sum(counts):
        raise InputError(
            f"{sum(counts)} distinct prompts are asked for and {len(found)} are there",
            field="candidates.prompts",
            mend="Ask for fewer, or name more sources.",
        )
    train, held_out = counts[0], counts[0] + counts[1]
    return found[:train], found[train:held_out], found[held_out : sum(counts)]


def _load_reward(recipe: Recipe) -> Any:
    assert recipe.candidates is not None
    if recipe.candidates.reward is not None:
        return load_reward(recipe.candidates.reward, field="candidates.reward")
    assert recipe.eval.reward is not None
    return load_reward(recipe.eval.reward)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
