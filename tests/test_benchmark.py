"""The speed benchmark: both sides do the same, the work is counted right, unequal losses report no speed."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit.packing import PairTokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import results
import speed
import workload

TINY = ["--layers=2", "--hidden=64", "--vocabulary=512", "--data=generated", "--pairs=4", "--batch-size=2"]
TINY += ["--threads=1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both sides on a tiny model, each in its own process."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed (the ppo extra)")
    out, threads = tmp_path_factory.mktemp("speed") / "results.json", torch.get_num_threads()
    try:
        status = speed.main([*TINY, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    return status, json.loads(out.read_text())


def test_both_sides_train_the_same(measured):
    status, found = measured
    assert status == 0
    ours, theirs = (found["runs"][side][0] for side in ("dpo_kit", "trl-1.12"))
    assert len(ours["steps"]) == len(theirs["steps"]) == 2
    assert ours["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert ours["steps"][1]["loss"] != pytest.approx(math.log(2), abs=1e-8)
    assert found["agreement"]["largest_relative_differences"]["grad_norm"] < 1e-3
    assert found["speed"]["against"]["trl-1.12"]["time_ratio"] == theirs["seconds"] / ours["seconds"]
    assert min(ours["peak_memory_bytes"], theirs["peak_memory_bytes"]) > 10**8
    assert (
        found["work"]["distinct_tokens"] < found["work"]["separate_tokens"] < found["work"]["padded_tokens"]
    )


def test_unequal_losses_report_no_speed(measured, monkeypatch, capsys, tmp_path):
    _, found = measured
    doctored = copy.deepcopy(found["runs"])
    doctored["dpo_kit"][0]["steps"][1]["loss"] *= 1.01
    monkeypatch.setattr(speed, "run_side", lambda side, *_: doctored[side][0])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "results.json"
    assert speed.main([*TINY, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "did not compute the same" in printed
    assert "loss 1.0e-02" in printed
    assert "limit" not in printed.lower()
    assert "seconds" not in out.read_text()


@pytest.mark.parametrize("steps", [[], [{"loss": 1.0}], [{"loss": 1.0}, {"loss": math.nan}]])
def test_missing_steps_and_nan_are_differences(steps):
    complete = {"steps": [{"loss": 1.0}, {"loss": 1.0}]}
    assert results.largest_differences({"steps": steps}, complete, ["loss"]) == {"loss": math.inf}


def test_work_by_hand():
    pair = PairTokens(np.array([1, 2, 3]), chosen=np.array([4, 5]), rejected=np.array([4, 6, 7]))
    found = workload.count_work([pair], 8, workload.model_fields(layers=1, hidden=64, vocabulary=100))
    # Tree: 1 2 3 4, then 5, then 6 7; they see 1+2+3+4, 5 and 5+6 tokens. Matrices of one layer: four of
    # 64 x 64 and three of 64 x 170; the head 64 x 100.
    assert found == workload.Work(
        distinct_tokens=7,
        separate_tokens=11,
        padded_tokens=12,
        predictions=4,
        flops=2 * 4 * (7 * 49024 + 4 * 6400 + 26 * 2 * 64),
    )


def test_bad_input_is_refused(tmp_path, capsys):
    assert speed.main(["--data", str(tmp_path / "none.jsonl"), "--only", "dpo_kit"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert speed.main(["--data", "generated", "--hidden", "100", "--only", "dpo_kit"]) == 2
    assert "--hidden" in capsys.readouterr().err
