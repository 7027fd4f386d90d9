"""The speed benchmark: all sides do the same, unequal losses report no speed, finished runs are kept."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import lengths
import loop
import ours
import peers
import presets
import ranked
import readme
import runner
import speed
import workload

from dpo_kit.examples import PairTokens
from dpo_kit.packing import plan_step
from dpo_kit.scoring import sequence_logprobs

TINY = ["--model=tiny", "--work=hh-like", "--pairs=4", "--batch-size=2", "--threads=1"]


def tiny_task(**changes):
    task = workload.Task(model=presets.model_fields("tiny"), work="hh-like", pairs=4, batch_size=2, threads=1)
    return dataclasses.replace(task, **changes)


def run_here(side, task, folder):
    """A side without a process of its own, which takes seconds to start."""
    workload.write_task(task, folder)
    peers.run(side, folder)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(autouse=True)
def _threads_kept():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"dtype": "bf16"}, marks=pytest.mark.slow),
        {"weights": "bf16", "dtype": "bf16"},
        pytest.param({"reference": "precomputed"}, marks=pytest.mark.slow),
        pytest.param({"order": "sorted", "work": "fixed-6-4", "warmup_steps": 1}, marks=pytest.mark.slow),
        {"replies": 3, "pairs": 6, "batch_size": 3, "work": "tldr", "tokens_per_micro_batch": 400},
    ],
    ids=str,
)
def test_all_of_ours_and_the_plain_loop_compute_the_same(changes, tmp_path):
    task = tiny_task(**changes)
    sides = ("dpo_kit", "dpo_kit-within-pairs", "dpo_kit-padded", "dpo_kit-loop", "naive")
    found = {side: run_here(side, task, tmp_path / side) for side in sides}
    naive = found.pop("naive")
    assert len(naive["steps"]) == 2
    assert naive["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5 if task.dtype == "fp32" else 1e-2)
    assert naive["steps"][1]["loss"] != naive["steps"][0]["loss"]
    assert ("precompute_seconds" in naive) == (task.reference == "precomputed")
    for side, run in found.items():
        agreed = compare.agreement([run], [naive], task.dtype)
        assert agreed["agree"], (side, agreed)
        assert ("precompute_seconds" in run) == (task.reference == "precomputed")
        assert run["seconds"] == pytest.approx(sum(run["step_seconds"][task.warmup_steps :]))
        assert run["peak_memory_bytes"] > 10**8


@pytest.mark.parametrize("side", ["trl-1.12", pytest.param("trl-newest", marks=pytest.mark.slow)])
def test_a_peer_in_its_own_process_trains_the_same(side, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "matmul_rates", functools.partial(runner.matmul_rates, seconds=0.0))
    if side == "trl-newest" and not runner.NEWEST.exists():
        pytest.skip("make bench has not set up .venv-trl-newest")
    if side == "trl-1.12" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed (the ppo extra)")
    theirs = runner.Runner(quiet=True).run(side, tiny_task())
    agreed = compare.agreement([run_here("dpo_kit", tiny_task(), tmp_path)], [theirs], "fp32")
    assert agreed["agree"], agreed
    assert agreed["largest_relative_differences"]["grad_norm"] < 1e-4
    assert theirs["versions"]["trl"].startswith(runner.newest_trl() if side == "trl-newest" else "1.12.")
    assert all(rate > 0 for rates in theirs["matmul_rates"] for rate in rates.values())


def made_up_run(seconds, loss=0.7):
    step = {"loss": loss, "grad_norm": 1.0, "logps/chosen": -5.0, "logps/rejected": -6.0}
    return {
        "seconds": seconds,
        "step_seconds": [seconds],
        "setup_seconds": 1.0,
        "peak_memory_bytes": int(seconds * 1e9),
        "steps": [step],
        "versions": {"trl": "1.12.0"},
        "threads": 1,
        "matmul_rates": [{"8 x 8 x 8": 1e9}, {"8 x 8 x 8": 2e9}],
        "others_cores": 0.0,
        "at": "now",
    }


class MadeUp:
    """A runner that has it all already."""

    def __init__(self, runs):
        self.runs = copy.deepcopy(runs)

    def run(self, side, task, repeat=0, profile=False):
        return self.runs[side][repeat % len(self.runs[side])]


def test_medians_ratios_and_share_of_the_limit():
    runs = {"naive": [made_up_run(8.0)], "dpo_kit": [made_up_run(s) for s in (2.0, 9.0, 1.0)]}
    found = compare.compared(runs, "dpo_kit", flops=3_000_000_000, dtype="fp32")
    assert found["limit"] == {"seconds": 1.5, "rate": 2e9, "shape": "8 x 8 x 8"}
    assert found["sides"]["dpo_kit"]["share_of_limit"] == 0.75
    assert found["sides"]["naive"]["against_ours"] == {"time_ratio": 4.0, "memory_ratio": 0.25}


def test_unequal_losses_report_no_speed(monkeypatch, capsys, tmp_path):
    runs = {"naive": [made_up_run(8.0, loss=0.707)], "dpo_kit": [made_up_run(2.0)]}
    monkeypatch.setattr(speed, "Runner", lambda _: MadeUp(runs))
    out = tmp_path / "found.json"
    assert speed.main([*TINY, "--peer=naive", f"--out={out}"]) == 1
    printed = capsys.readouterr().out
    assert "did not compute the same" in printed
    assert "1e-02" in printed
    assert not any(word in printed for word in (" s |", "its time over ours", "Limit"))
    assert "seconds" not in out.read_text()


def test_one_unequal_peer_does_not_silence_the_other():
    runs = {"a": [made_up_run(8.0, loss=0.9)], "b": [made_up_run(4.0)], "dpo_kit": [made_up_run(2.0)]}
    sides = compare.compared(runs, "dpo_kit", flops=1, dtype="fp32")["sides"]
    assert "seconds" not in sides["a"]
    assert sides["b"]["against_ours"]["time_ratio"] == 2.0


@pytest.mark.parametrize("steps", [[], [{"loss": 1.0}], [{"loss": 1.0}, {"loss": math.nan}]])
def test_missing_steps_and_nan_are_differences(steps):
    complete = {"steps": [{"loss": 1.0}, {"loss": 1.0}]}
    assert compare.largest_differences({"steps": steps}, complete, ["loss"]) == {"loss": math.inf}


def test_finished_runs_are_kept_and_only_the_same_run_is_found(monkeypatch, tmp_path):
    started = []

    def one_process(side, folders, *_, **__):
        started.append((side, len(folders)))
        for folder in folders:
            (folder / "result.json").write_text(json.dumps(made_up_run(1.0)))
        return ""

    monkeypatch.setattr(runner, "_peers", one_process)
    monkeypatch.setattr(runner, "_rates", lambda _: {"8 x 8 x 8": 1e9})
    kept = runner.Runner(tmp_path, quiet=True)
    first = kept.run("naive", tiny_task())
    assert runner.Runner(tmp_path, quiet=True).run("naive", tiny_task()) == first
    assert len(started) == 1
    kept.run("naive", tiny_task(), repeat=1)
    kept.run("naive", tiny_task(dtype="bf16"))
    kept.run("dpo_kit", tiny_task())
    assert len(started) == 4
    # Another state of dpo_kit's source: ours is run again, a peer is not.
    monkeypatch.setattr(runner, "sources_digest", lambda: "another")
    kept.run("naive", tiny_task())
    kept.run("dpo_kit", tiny_task())
    assert started[4:] == [("dpo_kit", 1)]
    # Of many tasks only those that are not there yet.
    kept.run_each("naive", [tiny_task(), tiny_task(pairs=2), tiny_task(pairs=6)])
    assert started[5:] == [("naive", 2)]
    kept.forget()
    kept.run("naive", tiny_task())
    assert len(started) == 7


def test_pairs_that_share_nothing_with_others_score_the_same():
    task = tiny_task(replies=3, pairs=6)
    rows = workload.task_rows(task)

    def plan(rows):
        return {"micro_batches": plan_step([PairTokens.from_row(row) for row in rows], 10**6)}

    [shared], [apart] = (made(rows)["micro_batches"] for made in (plan, ours.within_pairs(plan, 512)))
    alone = sum(ranked.tree_tokens([PairTokens.from_row(row)], 1) for row in rows)
    assert apart.num_tokens == alone > shared.num_tokens
    model = peers.load(dataclasses.asdict(task))
    with torch.no_grad():
        found, expected = ({}, {})
        for batch, into in ((apart, found), (shared, expected)):
            both = sequence_logprobs(model, batch).sequences.view(2, -1).T
            into |= dict(zip(batch.sources, both.tolist(), strict=True))
    assert found.keys() == expected.keys() == {row["source"] for row in rows}
    for source, pair in expected.items():
        assert found[source] == pytest.approx(pair, rel=1e-5)


def test_the_plain_loop_pads_nothing_into_its_sums():
    scorer = loop.Naive("cpu")
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9, 10]},
        {"prompt_ids": [11], "chosen_ids": [12, 13], "rejected_ids": [14]},
    ]
    model = peers.load(dataclasses.asdict(tiny_task()))
    with torch.no_grad():
        chosen, rejected, _ = scorer.score(model, scorer.plan(rows)[0])
        logits = model(torch.tensor([[11, 12, 13]])).logits[0].log_softmax(-1)
    assert chosen[1].item() == pytest.approx((logits[0, 12] + logits[1, 13]).item(), rel=1e-5)
    assert rejected.shape == (2,)


def test_lengths_follow_their_source():
    rows = lengths.generated_pairs(lengths.LENGTHS["tldr"], 4001, 100)
    prompts, chosen = (sorted(len(row[name]) for row in rows) for name in ("prompt_ids", "chosen_ids"))
    # arXiv 2410.20305, table 1: median length 416, median prompt over reply 11.14.
    assert prompts[2000] + chosen[2000] == pytest.approx(416, rel=0.03)
    assert prompts[2000] / chosen[2000] == pytest.approx(11.14, rel=0.05)
    assert rows == lengths.generated_pairs(lengths.LENGTHS["tldr"], 4001, 100)


def test_ranked_replies_make_all_their_pairs():
    rows = lengths.generated_pairs(lengths.lengths_of("fixed-5-3"), 12, 100, replies=4)
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 2
    best = tuple(rows[0]["chosen_ids"])
    assert [tuple(row["chosen_ids"]) == best for row in rows] == [True] * 3 + [False] * 9
    assert len({tuple(row[name]) for row in rows for name in ("chosen_ids", "rejected_ids")}) == 8


def test_oasst_pairs_are_of_ranked_assistant_siblings(tmp_path):
    def reply(text, rank, *replies, role="assistant"):
        return {"text": text, "rank": rank, "role": role, "replies": list(replies)}

    later = reply("more", None, reply("x", 1), reply("y", 0), reply("z", None), role="prompter")
    tree = {"prompt": reply("hi", None, reply("b", 1, later), reply("a", 0), reply("c", 2), role="prompter")}
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps(tree) + "\n")
    found = ranked.oasst_pairs(file)
    assert [pair[1:] for pair in found] == [("a", "b"), ("a", "c"), ("b", "c"), ("y", "x")]
    assert found[3][0] == "\n\nHuman: hi\n\nAssistant: b\n\nHuman: more\n\nAssistant: "


def test_tokens_of_shared_pairs_by_hand():
    pairs = [
        PairTokens(*map(torch.Tensor.numpy, map(torch.tensor, ids)))
        for ids in (([1, 2], [3], [4]), ([1, 2], [3], [5, 6]))
    ]
    found = ranked.sharing("two", pairs)
    # Apart: 4 sequences of 3, 3, 3 and 4; each pair alone 4 and 5; together 1 2, 3, 4, 5 6.
    assert {name: found[name] for name in ("separate", "within_pairs", "random", "grouped", "padded")} == {
        "separate": 13, "within_pairs": 9, "random": 6, "grouped": 6, "padded": 16,
    }  # fmt: skip


def test_bad_input_is_refused(tmp_path, capsys):
    assert speed.main(["--work", str(tmp_path / "none.jsonl"), "--only=dpo_kit"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert speed.main(["--work=hh-like", "--hidden=100", "--only=dpo_kit"]) == 2
    assert "--hidden" in capsys.readouterr().err
    assert speed.main(["--work=tldr", "--replies=4", "--pairs=8", "--model=tiny", "--only=dpo_kit"]) == 2
    assert "--pairs" in capsys.readouterr().err


def test_the_readme_gets_the_page_without_title_and_details(tmp_path):
    page, file = tmp_path / "out" / "speed.md", tmp_path / "README.md"
    page.parent.mkdir()
    page.write_text("# Speed\n\n| a |\n\n![Curves](c.png)\n\n## Details\n\nmore\n")
    file.write_text(f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n")
    for _ in range(2):
        readme.embed(page, file)
        inside = "| a |\n\n![Curves](out/c.png)"
        assert file.read_text() == f"above\n{readme.BEGIN}\n{inside}\n{readme.END}\nbelow\n"
    file.write_text("no marks")
    with pytest.raises(ValueError, match="no lines"):
        readme.embed(page, file)
