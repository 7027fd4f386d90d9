"""Pairs made by the policy itself: replies to prompts, labelled by a reward (`candidates` in a recipe).

As in the controlled experiment of the DPO paper (arXiv 2305.18290, section 6.1 and appendix C.1): all
pairs of the replies to a prompt. What is written are ordinary files of pairs and of prompts. Which prompts
is `prompts`', how replies are drawn `samples_file`'s, what pairs they make `labelling`'s.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo_kit.adapters import put_adapter
from dpo_kit.errors import InputError
from dpo_kit.evaluation.rewards import Reward, load_reward
from dpo_kit.evaluation.sampling import load_prompts
from dpo_kit.json_lines import write_lines
from dpo_kit.labelling import Account, Labelling, by_reward, labelled, read_candidates
from dpo_kit.measurement import Say
from dpo_kit.models import load_model
from dpo_kit.pairs.splitting import normalised
from dpo_kit.pairs.writing import RowWriter
from dpo_kit.prompts import Drawn, Prefixes, draw_prompts
from dpo_kit.recipe import Recipe
from dpo_kit.recipe_sections import CandidatesSection
from dpo_kit.run_folder import write_text
from dpo_kit.samples_file import Sampling, sample_to_file
from dpo_kit.texts import read_prompts
from dpo_kit.tokenizer import load_tokenizer

TRAIN_FILE, HELD_OUT_FILE, PROMPTS_FILE = "train.jsonl", "heldout.jsonl", "prompts.jsonl"


def check_candidates(recipe: Recipe) -> None:
    """Refuse what would stop `make_pairs`: sources without enough prompts, a reward that does not load.

    Where the tokenizer is there already the prompts are drawn; where it is still to be learned on the corpus,
    there are no more prefixes than texts, and these are counted.

    Raises:
        InputError: naming the key.
    """
    named = recipe.model.tokenizer or recipe.model.path
    if named is not None or _section(recipe).prefix_tokens is None:
        options = recipe.tokenizer_options()
        _draw(recipe, load_tokenizer(str(named), **options) if named is not None else None)
    else:
        _require_enough(_distinct_texts(recipe), _wanted(recipe))
    _load_reward(recipe)


def make_pairs(recipe: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Sample, label, and write train.jsonl, heldout.jsonl and prompts.jsonl, unless they are there.

    The replies stay beside them (*.samples.jsonl). Stopped anywhere and called again, it goes on with the
    batch that was not whole, and ends with the same files.

    Args:
        recipe: its `model` is what replies are sampled from.
        folder: where the files go.
        say: gets lines of progress.

    Returns:
        Figures for summary.json, with candidates/ before their names: train_pairs, heldout_pairs; seconds of
        sampling and labelling, tokens (through the policy) and tokens_sampled; replies that were unfinished
        or empty; equal and ties, pairs left out; reward, its mean; and of texts what `Drawn.counts` has.

    Raises:
        InputError: sources, model and settings that do not fit together; or no pair came out.
    """
    section = _section(recipe)
    figures_file = folder / "figures.json"
    if figures_file.exists():
        return dict(json.loads(figures_file.read_text()))
    reward = _load_reward(recipe)
    source = recipe.model.path or recipe.model.config
    assert source is not None
    named = str(recipe.model.tokenizer or recipe.model.path)
    tokenizer = load_tokenizer(named, **recipe.tokenizer_options())
    drawn = _draw(recipe, tokenizer)
    _tell_of(drawn, section, say)
    dtype, seed = getattr(torch, recipe.model.dtype), int(recipe.train.get("seed", 42))
    policy = load_model(source, dtype, seed, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.model.adapter is not None:
        policy = put_adapter(policy, recipe.model.adapter)
    policy.to(recipe.training_config().device)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    totals: dict[str, Any] = {f"texts_{name}": count for name, count in drawn.counts.items()}
    totals |= dict.fromkeys(("seconds", "tokens", "tokens_sampled", "unfinished"), 0)
    account = Account()
    train, held_out = section.prompts, section.prompts + section.held_out
    parts = [(TRAIN_FILE, drawn.prompts[:train]), (HELD_OUT_FILE, drawn.prompts[train:held_out])]
    for number, (name, prompts) in enumerate(parts):
        if not prompts:
            continue
        stem = name.removesuffix(".jsonl")
        say(f"sampling {section.per_prompt} replies to each of {len(prompts):,} prompts for {name}")
        samples, how = folder / f"{stem}.samples.jsonl", _sampling(recipe, number)
        template = recipe.data.chat_template_kwargs
        spent = sample_to_file(
            policy, tokenizer, prompts, samples, how, chat_template_kwargs=template, say=say
        )
        began = time.monotonic()
        totals[f"{stem}_pairs"] = _write_pairs(samples, folder / name, reward, section, number, account)
        spent["seconds"] += time.monotonic() - began
        for key in ("seconds", "tokens", "tokens_sampled", "unfinished"):
            totals[key] += spent[key]
    say(account.summary("pairs"))
    write_lines(folder / PROMPTS_FILE, ({"prompt": prompt} for prompt in drawn.prompts[held_out:]))
    figures = {f"candidates/{key}": value for key, value in (totals | _figures(account)).items()}
    write_text(figures_file, json.dumps(figures))
    del policy
    _free_memory()
    return figures


def _free_memory() -> None:
    """Training comes next, and needs what the model took."""
    gc.collect()
    torch.cuda.empty_cache()


def _section(recipe: Recipe) -> CandidatesSection:
    assert recipe.candidates is not None
    return recipe.candidates


def _wanted(recipe: Recipe) -> int:
    """Prompts to draw; none to evaluate on where `eval.prompts` names them."""
    section = _section(recipe)
    return section.prompts + section.held_out + (section.evaluation if recipe.eval.prompts is None else 0)


def _distinct_texts(recipe: Recipe) -> int:
    """How many the sources have; counted up to as many as are wanted."""
    seen: set[str] = set()
    for text in read_prompts(_section(recipe).source, field="candidates.source"):
        seen.add(normalised(text))
        if len(seen) == _wanted(recipe):
            break
    return len(seen)


def _require_enough(found: int, wanted: int) -> None:
    if found < wanted:
        raise InputError(
            f"{wanted} distinct prompts are asked for and {found} are there",
            field="candidates.prompts",
            mend="Ask for fewer, or name more sources.",
        )


def _draw(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Drawn:
    """Distinct prompts for training pairs, then for held-out pairs, then to evaluate on.

    What `eval.prompts` names is none of them: no method may learn from what it is evaluated on.
    """
    section, given = _section(recipe), recipe.eval.prompts
    prefixes = None
    if section.prefix_tokens is not None:
        assert tokenizer is not None
        prefixes = Prefixes(tokenizer, *section.prefix_tokens, seed=section.seed)
    drawn = draw_prompts(
        section.source,
        _wanted(recipe),
        seed=section.seed,
        prefixes=prefixes,
        without=load_prompts(given) if given is not None else (),
    )
    _require_enough(len(drawn.prompts), _wanted(recipe))
    return drawn


def _tell_of(drawn: Drawn, section: CandidatesSection, say: Say) -> None:
    counts = drawn.counts
    line = f"{len(drawn.prompts):,} prompts of {counts['read']:,} texts"
    if section.prefix_tokens is not None:
        line += f"; {counts['too_short']:,} too short (not more than {section.prefix_tokens[1]} tokens)"
        line += f"; {counts['no_border']:,} without a token's end to cut them at"
    say(f"{line}; {counts['kept_out']:,} kept out since eval.prompts has them")


def _sampling(recipe: Recipe, number: int) -> Sampling:
    """How replies for the first or the second file are drawn."""
    section = _section(recipe)
    return Sampling(
        samples=section.per_prompt,
        max_new_tokens=section.max_new_tokens or recipe.eval.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        batch_size=section.batch_size,
        seed=section.seed + number,
    )


def _write_pairs(
    samples: Path, out: Path, reward: Reward, section: CandidatesSection, number: int, account: Account
) -> int:
    """The pairs of a file of samples; how many."""
    labelling = Labelling(labels=section.labels, seed=section.seed + number)
    with RowWriter(out) as writer:
        for row in labelled(read_candidates([str(samples)]), by_reward(reward), labelling, account):
            # Where it comes from is no part of a pair: another folder's files are the same.
            writer.write({name: value for name, value in row.items() if name != "source"})
        if not writer.rows:
            raise InputError(
                f"no pair came out of the candidates: {account.summary('pairs')}",
                file=samples,
                field="candidates",
                mend="Sample more replies to a prompt, or look at what the reward gives.",
            )
    return writer.rows


def _figures(account: Account) -> dict[str, Any]:
    own = {"same_reply_in_list": "equal", "tie": "ties"}
    left_out = dict.fromkeys(own, 0) | dict(account.left_out)
    found: dict[str, Any] = {own.get(kind, f"left_out_{kind}"): count for kind, count in left_out.items()}
    return found | {"empty": account.empty, "reward": account.mean}


def _load_reward(recipe: Recipe) -> Reward:
    spec = _section(recipe).reward
    if spec is not None:
        return load_reward(spec, field="candidates.reward")
    assert recipe.eval.reward is not None
    return load_reward(recipe.eval.reward)
