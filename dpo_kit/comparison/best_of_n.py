"""Best-of-N: of N replies of the policy, the one that the learned reward likes best; nothing is trained.

All values of N share one pool of replies to each evaluation prompt, and what is reported for each is the
expectation over all its subsets of N replies (`subset_weights`), so that the curve has little noise.
draws/round-K.json in the run folder keeps the pool, one reply to every prompt each, for a run that is
stopped; the true reward of the replies that are taken is what the other methods are measured by.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.errors import InputError
from dpo_kit.evaluation import Reward, load_reward, sample_replies
from dpo_kit.json_lines import write_lines
from dpo_kit.measurement import Samples, Say, evaluation_file
from dpo_kit.recipe import Recipe
from dpo_kit.run import load_start
from dpo_kit.run_folder import digest_recipe, peak_memory_bytes, write_text
from dpo_kit.run_output import RunResult, write_origin
from dpo_kit.start import make_start, started

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """One reply to every prompt, P in all, as draws/round-K.json has them.

    Attributes:
        pool: digest of what decides the replies and their rewards.
        replies: [P] texts.
        tokens: [P] of each reply, its end token among them.
        learned: [P] learned rewards.
        rewards: [P] true rewards.
        sampling_seconds, scoring_seconds: what drawing them took, and the learned reward.
        positions: of prompts and replies: so many through the policy, and so many through the reward model.
    """

    pool: str
    replies: list[str]
    tokens: list[int]
    learned: list[float]
    rewards: list[float]
    sampling_seconds: float
    scoring_seconds: float
    positions: int


def subset_weights(learned: Sequence[float], n: int) -> Array:
    """How likely each of M replies is the best of N of them, all subsets of N being equally likely.

    The reply of rank r from below (1 to M) is the best of C(r - 1, N - 1) of the C(M, N) subsets; replies
    that are equally good share what is theirs. The mean of the true rewards with these weights is the
    unbiased estimate with the least variance of the expected true reward of Best-of-N.

    Args:
        learned: [M] rewards by which the best is chosen.
        n: N, 1 to M.

    Returns:
        [M], at least 0, with sum 1.

    Raises:
        ValueError: N is out of range.
    """
    size = len(learned)
    if not 1 <= n <= size:
        raise ValueError(f"the best of {n} out of {size} replies cannot be told")
    of_rank = np.array([math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)])
    values, group, counts = np.unique(np.asarray(learned), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    shares = np.add.reduceat(of_rank, last - counts) / counts
    assert len(shares) == len(values)
    return shares[group]


def best_of_n_kl(n: int) -> float:
    """KL of Best-of-N from the policy, in nats: log N - (N - 1) / N.

    The value where no two replies are alike (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3); else an
    upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def run_best_of_n(recipe: Recipe, *, say: Say = print) -> RunResult:
    """Measure Best-of-N for every N of `recipe.best_of_n`; goes on where an earlier run was stopped.

    The run folder has the files of a run, but no model. A line of metrics.jsonl is one N, as its step:
    `seconds` and `tokens` are what it takes to draw N replies to each evaluation prompt and, where N > 1, to
    score them by the learned reward, whose mean over the replies taken is `eval_learned_reward`.

    Args:
        recipe: its policy before any preference step is what replies are drawn from, and its reward model
            (`reward_model.path`, or one that is trained in the run folder) what chooses among them.
        say: gets lines of progress.

    Raises:
        InputError: no evaluation prompts, no true reward, or samples that are not of the policy itself.
    """
    config = recipe.training_config()
    folder, resolved = Path(str(config.output_dir)), recipe.resolved(config)
    recipe_digest = digest_recipe(resolved)
    if (known := _finished(folder, recipe_digest)) is not None:
        say(f"the run in {folder} is finished")
        return RunResult(folder, known)
    folder.mkdir(parents=True, exist_ok=True)
    if started(recipe, folder) is not recipe:
        make_start(recipe, folder, say)
        recipe = started(recipe, folder)
    samples = _samples(recipe)
    learned_path = trained_reward_model(recipe, folder / "reward_model", say)
    learned = load_reward(f"model:{learned_path}", field="reward_model.path")
    policy, tokenizer = load_start(recipe)
    policy = policy.to(config.device).eval()  # type: ignore[arg-type]
    samples.check_lengths(policy, tokenizer)
    environment = write_origin(folder, resolved, config, policy, {})
    pool = _digest([environment["model"]["sha256"], str(learned_path), samples.prompts, _drawn_as(recipe)])
    rounds = _draw(samples, learned, policy, tokenizer, folder, pool, say)
    figures = _report(samples, rounds, folder)
    figures |= {"peak_memory_bytes": peak_memory_bytes(config.device), "recipe": recipe_digest}
    write_text(folder / "summary.json", json.dumps(figures, indent=2))
    return RunResult(folder, figures)


def _finished(folder: Path, recipe_digest: str) -> dict[str, Any] | None:
    """The summary of a run of this very recipe."""
    summary = folder / "summary.json"
    found = json.loads(summary.read_text()) if summary.exists() else {}
    return found if found.get("recipe") == recipe_digest else None


def _samples(recipe: Recipe) -> Samples:
    samples = Samples.of(recipe)
    if not samples.prompts or samples.reward is None:
        field = "eval.reward" if samples.prompts else "eval.prompts"
        raise InputError("Best-of-N is measured by a true reward on prompts", field=field, mend="Name one.")
    if not samples.has_kl:
        raise InputError(
            "how far Best-of-N is from the policy is known for samples of the policy itself",
            field="eval.temperature",
            mend="Set eval.temperature and eval.top_p to 1.",
        )
    return samples


def _drawn_as(recipe: Recipe) -> list[Any]:
    """What of a recipe decides the replies and their rewards."""
    section = recipe.eval
    settings = [section.reward, section.max_new_tokens, section.batch_size, section.seed]
    return [*settings, recipe.model.tokenizer, recipe.data.chat_template_kwargs]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _draw(
    samples: Samples,
    learned: Reward,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    pool: str,
    say: Say,
) -> list[Round]:
    """As many rounds as the largest N; those that the folder has of this very pool are not drawn again."""
    count = max(samples.recipe.best_of_n.n)
    (folder / "draws").mkdir(exist_ok=True)
    rounds = []
    for number in range(count):
        file = folder / "draws" / f"round-{number}.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if content.get("pool") == pool:
            rounds.append(Round(**content))
            continue
        if number % 16 == 0 or not rounds:
            say(f"drawing reply {number + 1} of {count} to each of {len(samples.prompts)} prompts")
        rounds.append(_draw_round(samples, learned, policy, tokenizer, pool, number))
        write_text(file, json.dumps(asdict(rounds[-1]), ensure_ascii=False))
    return rounds


def _draw_round(
    samples: Samples,
    learned: Reward,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: str,
    number: int,
) -> Round:
    """The first round has the replies that a run draws before training, of one per prompt."""
    section = samples.recipe.eval
    began = time.perf_counter()
    drawn = sample_replies(
        policy,
        tokenizer,
        samples.prompts,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        seed=section.seed + number,
        chat_template_kwargs=samples.recipe.data.chat_template_kwargs,
    )
    sampled = time.perf_counter()
    prompts, replies = [s.prompt for s in drawn], [s.reply for s in drawn]
    liked = learned(prompts, replies)
    scored = time.perf_counter()
    assert samples.reward is not None
    return Round(
        pool=pool,
        replies=replies,
        tokens=[len(s.reply_ids) for s in drawn],
        learned=liked,
        rewards=samples.reward(prompts, replies),
        sampling_seconds=sampled - began,
        scoring_seconds=scored - sampled,
        positions=sum(len(s.prompt_ids) + len(s.reply_ids) for s in drawn),
    )


def _report(samples: Samples, rounds: list[Round], folder: Path) -> dict[str, Any]:
    """Write metrics.jsonl and evaluations/; figures for summary.json."""
    rows = [_measure(samples, rounds, n, folder) for n in sorted(set(samples.recipe.best_of_n.n))]
    write_lines(folder / "metrics.jsonl", rows)
    first, last = rows[0], rows[-1]
    return {
        "steps": last["step"],
        "train_runtime": last["seconds"],
        "tokens": last["tokens"],
        "tokens_sampled": sum(sum(r.tokens) for r in rounds),
        "eval/reward_before": float(np.mean([r.rewards for r in rounds])),
        "eval/reward_after": last["eval_reward"],
        "eval/learned_reward_before": float(np.mean([r.learned for r in rounds])),
        "eval/learned_reward_after": last["eval_learned_reward"],
        "eval/kl": last["eval_kl"],
        "smallest_n": first["step"],
    }


def _measure(samples: Samples, rounds: list[Round], n: int, folder: Path) -> dict[str, Any]:
    """A line of metrics.jsonl; writes evaluations/step-N.jsonl."""
    learned_PM = np.array([r.learned for r in rounds]).T
    weights_PM = np.stack([subset_weights(row, n) for row in learned_PM])
    columns = {"reward": "rewards", "learned_reward": "learned", "reply_tokens": "tokens"}
    expected = {
        name: (weights_PM * np.array([getattr(r, field) for r in rounds]).T).sum(1)
        for name, field in columns.items()
    }
    kl, used = best_of_n_kl(n), rounds[:n]
    lines: list[dict[str, Any]] = []
    for p, best in enumerate(learned_PM[:, :n].argmax(1)):
        line = {
            "prompt": samples.prompts[p],
            "reply": rounds[best].replies[p],
            "tokens": rounds[best].tokens[p],
            "reward": float(expected["reward"][p]),
            "kl": kl,
            "learned_reward": float(expected["learned_reward"][p]),
        }
        # As the other runs have them: as many lines of a prompt as replies are measured.
        lines += [line] * samples.recipe.eval.samples
    place = evaluation_file(folder, n)
    place.parent.mkdir(exist_ok=True)
    write_lines(place, lines)
    scored = n > 1
    return {
        "step": n,
        **{f"eval_{name}": float(values.mean()) for name, values in expected.items()},
        "eval_kl": kl,
        "seconds": sum(r.sampling_seconds + scored * r.scoring_seconds for r in used),
        "tokens": (1 + scored) * sum(r.positions for r in used),
    }
