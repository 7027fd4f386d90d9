"""The comparison of methods: its runs as processes, its tables, reward at matched KL."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from families import make_model
from pair_files import write

from dpo_kit.comparison.costs import write_costs
from dpo_kit.comparison.execute import recipe_digest
from dpo_kit.comparison.frontier import load_comparison, run_frontier
from dpo_kit.comparison.matched import (
    best_by_halves,
    interval,
    mixtures_at,
    resampled,
    write_matched,
)
from dpo_kit.comparison.record import Record
from dpo_kit.comparison.results import write_frontier, write_runs
from dpo_kit.comparison.runs import output_folder, runs_of
from dpo_kit.comparison.tables import markdown_tables
from dpo_kit.errors import InputError
from dpo_kit.tokenizer import train_byte_level_bpe

WORDS = ["was", "and", "but", "not", "so", "one"]
FRONTIER = ["method", "setting", "seed", "step", "reward", "kl", "seconds", "tokens", "run"]
PROMPTS = ["the film", "the other", "one was", "so"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, pairs, prompts, a reward, and a recipe that compares methods on them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_byte_level_bpe(["the film was good and the other one was bad"] * 3, 280)
    tokenizer.save_pretrained(folder / "lm")
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(folder / "lm")
    pairs = [
        {"prompt": prompt, "chosen": f" {word} good", "rejected": f" {word} bad"}
        for prompt in PROMPTS
        for word in WORDS
    ]
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    (folder / "reward.py").write_text("def reward(text):\n    return text.count('o') - len(text) / 10\n")
    recipe = {
        "model": {"path": str(folder / "lm")},
        "data": {"train": str(folder / "pairs.jsonl"), "cache_dir": str(folder / "tokens")},
        "train": {
            "batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "eval_strategy": "no",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "eval": {
            "prompts": str(folder / "prompts.jsonl"),
            "every": 2,
            "max_new_tokens": 8,
            "reward": f"{folder / 'reward.py'}:reward",
        },
        "frontier": {
            "output_dir": str(folder / "frontier"),
            "workers": 2,
            "kl_levels": [1e-4, 1e4],
            "methods": {
                "dpo": {"label": "DPO", "sweep": {"loss.beta": [0.1]}},
                "ft": {
                    "label": "Preferred-FT",
                    "set": {"loss": {"name": "sft"}},
                    "sweep": {"train.learning_rate": [1e-2, 1e30]},
                },
                "broken": {"label": "Broken", "set": {"data.train": [str(folder / "later.jsonl")]}},
            },
            "quick": {
                "frontier.output_dir": str(folder / "quick"),
                "frontier.methods.dpo.sweep": {"loss.beta": [5]},
                "train.max_steps": 2,
            },
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run(world, *overrides):
    """(what run_frontier returns, the lines it said)."""
    said = []
    found = run_frontier(world / "recipe.yaml", list(overrides), quick=False, say=said.append)
    return found, said


def cells(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def compared(world):
    """A comparison that was carried out, with one run that diverged and one that failed."""
    return *run(world), world / "frontier"


def test_every_run_is_carried_out_and_told_how_it_ended(compared):
    found, said, folder = compared
    assert not list((folder / "runs").glob("*.1")), "nothing was there to be put aside"
    outcomes = {row["run"]: row["outcome"] for row in found["runs"]}
    assert outcomes == {
        "dpo-beta=0.1-seed0": "done",
        "ft-learning_rate=0.01-seed0": "done",
        "ft-learning_rate=1e+30-seed0": "diverged",
        "broken-seed0": "failed",
    }
    assert found["failed"] == ["broken-seed0"]
    problems = {row["run"]: row["problem"] for row in found["runs"]}
    assert "not finite" in problems["ft-learning_rate=1e+30-seed0"]
    assert "later.jsonl" in problems["broken-seed0"]
    assert sum(line.startswith("[") for line in said) == 4
    assert any("[4/4]" in line for line in said)
    assert "broken-seed0" in markdown_tables(folder)


def test_what_was_measured_stands_in_the_tables(compared):
    _, _, folder = compared
    lines = cells(folder / "frontier.csv")
    assert lines[0] == FRONTIER
    assert lines[1][:4] == ["sft", "", "0", "0"]
    assert [line[3] for line in lines if line[0] == "dpo"] == ["0", "2", "4"]
    record = Record(folder)
    for point in record.points:
        replies = record.replies(point)
        assert [reply["prompt"] for reply in replies] == PROMPTS
        assert point.reward == pytest.approx(np.mean([reply["reward"] for reply in replies]))
        assert point.kl == pytest.approx(np.mean([reply["kl"] for reply in replies]))
    by_run = {point.run: point for point in record.points}
    dpo, ft = by_run["dpo-beta=0.1-seed0"], by_run["ft-learning_rate=0.01-seed0"]
    # Both replies against the chosen ones alone; what the reference takes is shared.
    assert dpo.kl > 0
    assert dpo.tokens > ft.tokens
    costs = cells(folder / "costs.csv")
    figures = ["runs", "seconds", "tokens", "tokens_sampled", "peak_memory_bytes", "reward", "kl"]
    assert costs[0][:9] == ["method", "label", *figures]
    assert [line[:3] for line in costs[1:]] == [
        ["dpo", "DPO", "1"],
        ["ft", "Preferred-FT", "1"],
        ["broken", "Broken", "0"],
        ["reference", "Reference's log-probs", "1"],
    ]
    matched = cells(folder / "matched.csv")
    assert matched[0][:7] == ["method", "label", "kl", "reward", "low", "high", "run"]
    # All paths begin at KL 0, and none comes near the other level.
    assert [bool(line[3]) for line in matched[1:]] == [True, True, False, False, False, False]


def test_going_on_runs_what_is_not_finished_and_nothing_else(world, compared):
    folder = compared[2]
    # One run was killed, one failed for want of its data, and left a folder of another recipe.
    (folder / "runs" / "dpo-beta=0.1-seed0" / "summary.json").unlink()
    write(world / "later.jsonl", *({"prompt": p, "chosen": " good", "rejected": " bad"} for p in PROMPTS * 2))
    (folder / "runs" / "broken-seed0").mkdir()
    (folder / "runs" / "broken-seed0" / "metrics.jsonl").write_text("")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/[sd]*.json")}
    known = cells(folder / "frontier.csv")
    found, said = run(world, "frontier.methods.broken.set.train.max_steps=2")
    assert len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sum(line.startswith("[") for line in said) == 2
    assert {row["outcome"] for row in found["runs"]} == {"done", "diverged"}
    assert found["failed"] == []
    # The run that was repeated came out as before, in less: what the reference gives is known by now.
    again = cells(folder / "frontier.csv")
    assert [line[:6] for line in again[: len(known)]] == [line[:6] for line in known]
    assert again[-1][3] == "2"
    assert (folder / "runs" / "broken-seed0.1" / "metrics.jsonl").exists()


def test_another_comparison_in_the_folder_is_refused(world, compared):
    with pytest.raises(InputError, match=r"train.max_steps.* 4 and would go on with 5.*output_dir"):
        run(world, "train.max_steps=5")


def test_the_quick_form_is_set_before_the_recipe_is_checked(world):
    quick = load_comparison(world / "recipe.yaml", ["train.max_steps=3"], quick=True)
    assert output_folder(quick) == world / "quick"
    assert quick.train["max_steps"] == 3
    assert [r.setting for r in runs_of(quick, world / "quick") if r.method == "dpo"] == ["beta=5"]
    with pytest.raises(InputError, match="quick form"):
        load_comparison(Path("recipes/small-world.yaml"), [], quick=True)


@pytest.mark.parametrize(
    ("override", "field"),
    [("eval.reward=null", "eval.reward"), ("eval.prompts=null", "eval.prompts"), ("eval.top_p=0.9", "eval")],
)
def test_what_cannot_be_measured_is_refused_at_once(world, override, field):
    with pytest.raises(InputError, match=field):
        run(world, override, f"frontier.output_dir={world / 'nothing'}")
    assert not (world / "nothing").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(world, tmp_path, number):
    content = yaml.safe_load((world / "recipe.yaml").read_text())
    del content["frontier"]
    content["train"] |= {"max_steps": 10**6, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    place, log = str(tmp_path / "run.yaml"), str(tmp_path / "log")
    script = (
        "from pathlib import Path; from dpo_kit.comparison.execute import Job, carry_out; "
        f"carry_out([Job('run', 'train', Path({place!r}), Path({log!r}))], 1, print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_for(
        lambda: (tmp_path / "log").exists() and "training on the pairs" in (tmp_path / "log").read_text()
    )
    child = int(children.read_text())
    os.kill(parent.pid, number)
    assert parent.wait(20) == (143 if number == signal.SIGTERM else -number)
    wait_for(lambda: not Path(f"/proc/{child}").exists())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_that_was_cut_gives_what_it_measured(world, tmp_path):
    recipe = load_comparison(world / "recipe.yaml", [], quick=False)
    runs = runs_of(recipe, tmp_path)[:1]
    runs[0].folder.mkdir(parents=True)
    lines = [
        {"step": 0, "eval_reward": 0.5, "eval_kl": 0.0, "seconds": 0.0, "tokens": 0},
        {"step": 1, "loss": 0.7},
        {"step": 2, "eval_reward": 9.0, "eval_kl": 9.0, "seconds": 1.0, "tokens": 10},
        {"step": 2, "eval_reward": 1.0, "eval_kl": 2.5, "seconds": 1.5, "tokens": 10},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "eval_rew'
    (runs[0].folder / "metrics.jsonl").write_text(text)
    write_frontier(tmp_path, runs)
    write_runs(tmp_path, runs, {})
    assert (tmp_path / "frontier.csv").read_text().splitlines()[1:] == [
        "sft,,0,0,0.5,0.0,0,0,dpo-beta=0.1-seed0",
        "dpo,beta=0.1,0,0,0.5,0.0,0.0,0,dpo-beta=0.1-seed0",
        "dpo,beta=0.1,0,2,1.0,2.5,1.5,10,dpo-beta=0.1-seed0",
    ]
    row = cells(tmp_path / "runs.csv")[1]
    assert row[5:9] == ["unfinished", "2", "1.0", "2.5"]


def test_costs_by_hand(world, tmp_path):
    recipe = load_comparison(world / "recipe.yaml", ["frontier.methods.dpo.seeds=[0,1]"], quick=False)
    resolved = json.loads(json.dumps(recipe.resolved(recipe.training_config())))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    figures = {
        "dpo-beta=0.1-seed1": {"train_runtime": 8, "reference_runtime": 0, "tokens": 60},
        "dpo-beta=0.1-seed0": {"train_runtime": 10, "reference_runtime": 2, "tokens": 100},
        "ft-learning_rate=0.01-seed0": {"train_runtime": 50, "tokens": 30, "tokens_sampled": 7},
    }
    for run_ in runs_of(recipe, tmp_path):
        if run_.name in figures:
            run_.folder.mkdir(parents=True)
            summary = figures[run_.name] | {"recipe": recipe_digest(run_.recipe), "peak_memory_bytes": 4}
            (run_.folder / "summary.json").write_text(json.dumps(summary))
            end = {"step": 4, "eval_reward": summary["tokens"] / 10, "eval_kl": summary["train_runtime"]}
            write(run_.folder / "metrics.jsonl", end)
    (tmp_path / "start" / "sft").mkdir(parents=True)
    write(tmp_path / "start" / "sft" / "figures.json", {"sft/runtime": 5.5})
    (tmp_path / "reward_model").mkdir()
    write(tmp_path / "reward_model" / "summary.json", {"train_runtime": 3, "tokens": 11})
    write_costs(tmp_path)
    assert (tmp_path / "costs.csv").read_text().splitlines()[1:] == [
        "dpo,DPO,2,10.0,80.0,,4.0,10.0,10,1.0,0",
        "ft,Preferred-FT,1,50.0,30.0,7.0,4.0,3.0,50,5.0,0",
        "broken,Broken,0,,,,,,,,0",
        "sft,SFT,1,5.5,,,,,,,",
        "reward_model,Reward model,1,3.0,11,,,,,,",
    ]


KLS = np.array([0.0, 2.0, 6.0, 4.0])
REWARDS = np.array([[0.0, 0.0], [2.0, 4.0], [6.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # KL 0 and 6, 0 and 4, 2 and 6 (a quarter of the way), 2 and 4
        (3.0, [[3.0, 0.0], [0.75, 0.75], [3.0, 3.0], [1.5, 2.5]]),
        (5.0, [[5.0, 0.0], [5.0, 1.0], [3.5, 0.5]]),
        (1.0, [[1.0, 2.0], [1.0, 0.0], [0.25, 0.25]]),
        (0.0, np.zeros((4, 2))),
        (6.5, np.zeros((0, 2))),  # never there: nothing is extrapolated
    ],
)
def test_mixtures_by_hand(level, expected):
    rewards, ends = mixtures_at(level, KLS, REWARDS)
    np.testing.assert_allclose(rewards, expected)
    assert all(KLS[low] <= level <= KLS[high] for low, high in ends)
    assert len(ends) == len(rewards)


def test_an_evaluation_without_numbers_is_no_end_of_a_mixture():
    rewards = REWARDS.copy()
    rewards[2, 0] = math.nan
    assert mixtures_at(5.0, KLS, rewards)[1] == []
    assert mixtures_at(1.0, KLS, rewards)[1] == [(0, 1), (0, 3)]


def test_what_is_best_on_one_half_is_measured_on_the_other():
    one = np.ones((1, 4))
    lucky = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert best_by_halves(lucky, one) == 0.0
    assert best_by_halves(np.vstack([lucky, [2.0, 2.0, 2.0, 6.0]]), one) == 3.0
    # Prompts 0 and 2 choose the first (2 against 1); on prompt 1, which counts thrice, that has 5. Prompt 1
    # chooses it too, and on 0 and 2 it has 2. Together (5 x 3 + 2 x 2) / 5.
    candidates = np.array([[3.0, 5.0, 1.0, 9.0], [1.0, 0.0, 1.0, 0.0]])
    assert best_by_halves(candidates, np.array([[1.0, 3.0, 1.0, 0.0]])) == pytest.approx(19 / 5)


def test_the_best_of_many_that_are_alike_is_no_better_than_one():
    noise = np.random.default_rng(0).normal(size=(200, 100))
    assert noise.mean(axis=1).max() > 0.2
    found = [best_by_halves(noise[i : i + 50], np.ones((1, 100)))[0] for i in range(0, 200, 50)]
    assert abs(np.mean(found)) < 0.1


def test_intervals_are_those_of_a_mean():
    values = np.random.default_rng(1).normal(size=200)
    found = interval(best_by_halves(values[None], resampled(200)))
    assert found.value == pytest.approx(values.mean())
    wide = 1.96 * values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - wide, abs=0.15 * wide)
    assert found.high == pytest.approx(values.mean() + wide, abs=0.15 * wide)


def test_differences_are_resampled_together(compared):
    """Two methods of the same replies, one a constant better: no uncertainty is in the difference."""
    _, _, folder = compared
    place = folder / "runs" / "ft-learning_rate=0.01-seed0"
    other = folder / "runs" / "dpo-beta=0.1-seed0"
    kept = {path: path.read_bytes() for path in [folder / "frontier.csv", *place.glob("evaluations/*")]}
    try:
        rows = [line for line in cells(folder / "frontier.csv") if line[8] == other.name and line[0] == "dpo"]
        shifted = [["ft", "", *row[2:4], float(row[4]) - 0.5, *row[5:8], place.name] for row in rows]
        with open(folder / "frontier.csv", "w", newline="") as file:
            csv.writer(file).writerows([FRONTIER, *rows, *shifted])
        for path in other.glob("evaluations/*"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            write(place / "evaluations" / path.name, *(x | {"reward": x["reward"] - 0.5} for x in lines))
        write_matched(folder)
        row = cells(folder / "matched.csv")[2]
        assert row[0] == "ft"
        np.testing.assert_allclose([float(cell) for cell in row[7:]], 0.5, atol=1e-9)
        assert float(row[4]) < float(row[3]) < float(row[5])
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
