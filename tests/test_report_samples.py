"""The report on runs that measured samples on the way, and on PPO runs: pictures, words, tiles, warnings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, as_lines, pictures, training_line, warnings_of, write_run

from dpo_kit.report import read_run, write_comparison, write_report
from dpo_kit.report.story import remarks
from dpo_kit.report.words import ANY, ROLLOUTS, words_of

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

PPO_PICTURES = {"samples", "reward_kl", "rollouts", "rollouts_kl", "ppo_losses", "ppo_updates", "optimiser"}
SUMMARY = {
    "train_runtime": 300.0,
    "tokens": 31_400_000,
    "tokens_sampled": 262_144,
    "peak_memory_bytes": 900 * 2**20,
    "eval/reward_before": 0.4,
    "eval/reward_after": 2.1,
    "eval/kl": 9.8,
}


def measured(step: int, seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A line of a measurement of samples, as a run logs it."""
    kl = 0.1 * step
    reward = 0.4 + 2 * (1 - math.exp(-kl / 4))
    line = {"step": step, "eval_reward": reward, "eval_kl": kl, "eval_reply_tokens": 20.0}
    return line | {"seconds": seconds * step, "tokens": 10_000 * step} | changes


def ppo_line(step: int, **changes: Any) -> dict[str, Any]:
    """A line that TRL's PPO logs."""
    return {
        "step": step,
        "objective/kl": 0.08 * step,
        "objective/entropy": 60.0,
        "objective/scores": 0.02 * step,
        "objective/rlhf_reward": 0.015 * step,
        "objective/non_score_reward": -0.005 * step,
        "loss/policy_avg": -0.01 + 0.001 * math.sin(step),
        "loss/value_avg": 0.5 * math.exp(-step / 40),
        "policy/approxkl_avg": 0.002,
        "policy/clipfrac_avg": 0.05,
        "val/ratio": 1.0 + 0.01 * math.sin(step),
        "objective/kl_coef": 0.05,
        "lr": 3e-4 * (1 - step / 100),
    } | changes


def ppo_lines(**changes: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [measured(0, 3.0)]
    for step in range(1, 101):
        lines.append(ppo_line(step, **changes))
        if step % 20 == 0:
            lines.append(measured(step, 3.0))
    return lines


def dpo_lines() -> list[dict[str, Any]]:
    return [measured(0), *(training_line(s) for s in range(1, 101)), *(measured(s) for s in (100,))]


def sampled(fall: float, count: int = 40) -> list[dict[str, Any]]:
    """Samples whose reward falls by `fall`, give or take 0.5."""
    return [
        {"prompt": f"p{i}", "before": "b", "after": "a", "reward_before": 1.0}
        | {"reward_after": 1.0 - fall + 0.5 * (-1) ** i}
        for i in range(count)
    ]


def test_a_ppo_run_has_its_pictures_tiles_and_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ppo", ppo_lines(), summary=SUMMARY, samples=sampled(-1.7))
    page = Page(write_report(run))
    assert pictures(run) == PPO_PICTURES
    assert words_of([read_run(run)]) == ROLLOUTS
    for tile in ("0.400 → 2.100", "5 min 0 s", "31.4 M", "262,144 sampled to learn from", "900 MiB"):
        assert tile in page.text
    assert "Training score of rollouts, by the reward that PPO learns from, rose from 0.2" in page.text
    assert "rose from 0.400 to 2.100, at a KL of 9.800 nats" in page.text
    assert "Reward and KL are those of samples on held-out prompts." in page.text
    before_details = page.text.split("Details")[0].split("What happened")[1]
    assert not re.search(r"\bpairs?\b|chosen|rejected|margin|[Aa]ccuracy", before_details)
    assert "Look into this" not in page.text


def test_a_run_of_pairs_that_measured_samples_shows_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "dpo", dpo_lines(), summary=SUMMARY)
    page = Page(write_report(run))
    assert {"samples", "reward_kl", "loss", "margins"} <= pictures(run)
    assert not {"rollouts", "ppo_losses"} & pictures(run)
    assert "Reward and KL are those of samples" in page.text


def test_the_path_pairs_each_reward_with_the_kl_of_its_line(tmp_path: Path) -> None:
    lines = [measured(0), training_line(1), measured(20), measured(40, eval_kl=None), measured(60)]
    kls, rewards = read_run(write_run(tmp_path / "run", lines)).curve("eval_reward", "eval_kl")
    assert kls.tolist() == [0.0, 2.0, 6.0]
    assert rewards.tolist() == [measured(step)["eval_reward"] for step in (0, 20, 60)]


def test_the_learning_rate_goes_by_both_of_its_names(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", ppo_lines()))
    assert run.curve("learning_rate")[1].tolist() == run.curve("lr")[1].tolist() != []


def test_dpo_and_ppo_side_by_side(tmp_path: Path) -> None:
    dpo = write_run(tmp_path / "dpo", dpo_lines(), summary=SUMMARY | {"tokens": 2_000_000})
    ppo = write_run(tmp_path / "ppo", ppo_lines(), summary=SUMMARY)
    assert words_of([read_run(dpo), read_run(ppo)]) == ANY
    page = Page(write_comparison([dpo, ppo], tmp_path / "out"))
    shared = {"samples", "samples_seconds", "samples_tokens", "reward_kl"}
    assert shared | {"rollouts", "loss", "optimiser"} <= pictures(tmp_path / "out")
    table = re.sub(r"<[^>]*>|\s+", " ", page.source.split("Final figures")[1].split("What differs")[0])
    for row in (
        r"Mean reward of samples, before\s+0\.400\s+0\.400",
        r"Mean reward of samples, after\s+2\.100\s+2\.100",
        r"KL to the reference \(nats\)\s+9\.800\s+9\.800",
        r"Training time\s+5 min 0 s\s+5 min 0 s",
        r"Tokens computed\s+2 M\s+31\.4 M",
        r"Peak memory\s+900 MiB\s+900 MiB",
    ):
        assert re.search(row, table), row


@pytest.mark.parametrize(("fall", "expected"), [(0.5, True), (0.05, False), (-1.0, False)])
def test_samples_that_got_worse_beyond_chance_are_told(tmp_path: Path, fall: float, expected: bool) -> None:
    """The standard error of 40 differences of ±0.5 is 0.08."""
    text = warnings_of(write_run(tmp_path / "run", ppo_lines(), samples=sampled(fall)))
    assert ("The samples got worse" in text) == expected
    if expected:
        assert "fell by 0.500 ± 0.160 (two standard errors over 40 prompts), while the score" in text
        assert "the true reward does not" in text


def test_replies_to_one_prompt_count_as_one(tmp_path: Path) -> None:
    """Of 40 replies to 10 prompts whose rewards move together, the error is that of 10."""
    samples = [
        {**line, "prompt": f"p{i}", "reward_before": 1.0, "reward_after": 0.75 + 0.5 * (-1) ** i}
        for i in range(10)
        for line in sampled(0.0, 4)
    ]
    assert "The samples got worse" not in warnings_of(
        write_run(tmp_path / "few", ppo_lines(), samples=samples)
    )
    samples = [{**line, "prompt": f"p{i}"} for i, line in enumerate(samples)]
    many = write_run(tmp_path / "many", ppo_lines(), samples=samples)
    assert "The samples got worse" in warnings_of(many)


def test_worse_samples_of_a_run_without_scores_blame_no_score(tmp_path: Path) -> None:
    text = warnings_of(write_run(tmp_path / "run", dpo_lines(), samples=sampled(0.5)))
    assert "The samples got worse" in text
    assert "score" not in text


def test_a_reward_that_was_higher_on_the_way_is_a_fact(tmp_path: Path) -> None:
    rewards = {0: 0.4, 20: 1.5, 40: 2.5, 60: 2.0}
    lines = [measured(step, eval_reward=reward) for step, reward in rewards.items()]
    said = " ".join(remark.text for remark in remarks(read_run(write_run(tmp_path / "run", lines))))
    assert "highest on the way, at step 40: 2.500, at a KL of 4.000 nats; at step 60" in said
    rising = [measured(step) for step in rewards]
    said = " ".join(remark.text for remark in remarks(read_run(write_run(tmp_path / "other", rising))))
    assert "on the way" not in said


def test_a_ppo_run_that_lost_its_numbers_says_which(tmp_path: Path) -> None:
    lines = [ppo_line(s, **{"loss/value_avg": math.nan} if s == 7 else {}) for s in range(1, 41)]
    assert "The value loss is not finite at step 7." in warnings_of(write_run(tmp_path / "run", lines))


def test_an_unfinished_ppo_run_still_has_its_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [ppo_line(1)], summary=None, samples=None, recipe=None)
    (run / "metrics.jsonl").write_text(as_lines([ppo_line(1)]) + '{"step": 2, "obj')
    assert "has not finished" in Page(write_report(run)).text
