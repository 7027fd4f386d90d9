"""The report on the metrics of this kit's objectives: their pictures, their words, and their warnings."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import (
    BOTH_FALL,
    SPEED,
    Page,
    evaluation_line,
    pictures,
    training_line,
    warnings_of,
    write_run,
)

from dpo_kit.metrics import DisplacementWatch
from dpo_kit.report import pictures as declared
from dpo_kit.report import read_run, write_comparison, write_report
from dpo_kit.report.summary import summary_table
from dpo_kit.report.words import ANY, words_of

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

OLD = {"loss", "accuracy", "margins", "rewards", "logps", "optimiser", "speed"}


def pair_line(step: int, **changes: Any) -> dict[str, Any]:
    margin = 0.01 * step
    return training_line(
        step,
        **{
            "logratios/chosen": -0.1 * step,
            "logratios/rejected": -0.3 * step,
            "logratios/chosen_per_token": -0.005 * step,
            "displaced": 0.006 * step,
            "gradient_weight": 1 / (1 + np.exp(margin)),
            "saturated": 0.004 * step,
            "rewards/accuracies_chosen_longer": 0.5 + 0.003 * step,
            "rewards/accuracies_chosen_shorter": 0.5 + 0.002 * step,
            "rewards/margins_chosen_longer": margin,
            "rewards/margins_chosen_shorter": 0.5 * margin,
        }
        | changes,
    )


def without(line: dict[str, Any], *starts: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(starts)}


def reward_model_line(step: int) -> dict[str, Any]:
    return without(pair_line(step), "logps", "logratios", "displaced") | {"rewards/mean": 0.1}


def unpaired_line(step: int) -> dict[str, Any]:
    lacks = "rewards/margins", "rewards/accuracies_", "displaced", "gradient_weight", "saturated"
    return without(pair_line(step), *lacks)


def list_line(step: int) -> dict[str, Any]:
    lacks = "rewards/margins_", "rewards/accuracies_", "displaced", "gradient_weight", "saturated"
    return without(pair_line(step), *lacks) | {"rewards/top1": 0.4}


def one_sided_line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "logps/chosen": -40.0, "logratios/chosen": -1.0}


def run_of(folder: Path, line: Callable[[int], dict[str, Any]], **files: Any) -> Path:
    return write_run(folder, [line(step) for step in range(1, 101)], **files)


IMPLICIT = "implicit rewards"


@pytest.mark.parametrize(
    ("line", "drawn", "words"),
    [
        (
            lambda s: pair_line(s, entropy=2.0, top1=0.5),
            OLD | {"lengths", "logratios", "teaching", "tokens"},
            ("pairs", "chosen", "rejected", IMPLICIT),
        ),
        (
            reward_model_line,
            OLD - {"logps"} | {"lengths", "teaching"},
            ("pairs", "chosen", "rejected", "rewards"),
        ),
        (
            unpaired_line,
            OLD - {"margins"} | {"logratios"},
            ("replies", "desirable", "undesirable", IMPLICIT),
        ),
        (list_line, OLD | {"logratios"}, ("lists", "best", "worst", IMPLICIT)),
        (one_sided_line, {"loss", "logps", "logratios"}, ("replies", "trained on", "others", IMPLICIT)),
    ],
)
def test_a_run_has_the_pictures_of_what_it_logged_and_its_words(
    tmp_path: Path,
    line: Callable[[int], dict[str, Any]],
    drawn: set[str],
    words: tuple[str, str, str, str],
) -> None:
    run = run_of(tmp_path / "run", line, summary=SPEED)
    text = Page(write_report(run)).text
    assert pictures(run) == drawn
    for path in (run / "plots").iterdir():
        assert path.stat().st_size < 80_000
        assert image.open(path).size == (768, 456)

    found = words_of([read_run(run)])
    assert (found.examples, found.chosen, found.rejected, found.rewards) == words
    for phrase in (f"{words[0]} per second", f"{words[0].capitalize()} per second", f"held-out {words[0]}."):
        assert phrase in text
    panels = [panel for p in declared.pictures(found) if p.name in drawn for panel in p.panels]
    labels = " ".join([*(p.ylabel for p in panels), *(s.label for p in panels for s in p.series)])
    assert bool(re.search("chosen|rejected|pairs", labels)) == (words[1] == "chosen")


def test_runs_of_two_kinds_side_by_side_have_words_that_fit_both(tmp_path: Path) -> None:
    pairs, unpaired = (run_of(tmp_path / line.__name__, line) for line in (pair_line, unpaired_line))
    assert words_of([read_run(pairs), read_run(unpaired)]) == ANY
    assert words_of([read_run(pairs), read_run(pairs)]).chosen == "chosen"
    page = Page(write_comparison([pairs, unpaired], tmp_path / "out"))
    assert "held-out examples." in page.text
    assert {"logratios", "teaching", "lengths", "margins"} <= pictures(tmp_path / "out")


def test_the_reference_is_a_line_at_zero_among_the_log_ratios(tmp_path: Path) -> None:
    from dpo_kit.report.plots import draw

    run = read_run(run_of(tmp_path / "run", pair_line))
    rows = {}
    for picture in declared.pictures(words_of([run])):
        if picture.name in ("logratios", "logps"):
            png = draw(picture, [run], ["run"])
            assert png is not None
            pixels = np.asarray(image.open(io.BytesIO(png)).convert("RGB")).astype(int)
            rows[picture.name] = (np.abs(pixels - (0x6B, 0x72, 0x80)).max(axis=2) < 25).sum(axis=1).max()
    assert rows["logratios"] > 500
    assert rows["logps"] < 100


def test_the_summary_names_what_the_reference_took(tmp_path: Path) -> None:
    took = {"reference_runtime": 75.2, "reference_computed": 12_800}
    run = read_run(run_of(tmp_path / "run", pair_line, summary=SPEED | took))
    table = dict(summary_table([run]))
    assert table["Time of the reference's log-probs"] == ["1 min 15 s"]
    assert table["Reference sequences computed"] == ["12,800"]


@pytest.mark.parametrize("end", [-0.4, -0.95, -1.05, -2.0])
def test_the_page_and_the_trainer_agree_on_displacement(tmp_path: Path, end: float) -> None:
    """Log-probs fall in all of them: it is the trainer's limit on how far that counts."""
    lines = [
        pair_line(s, **{"logratios/chosen_per_token": end * min(1, s / 50), "logps/chosen": -48 - s})
        for s in range(1, 101)
    ]
    watch = DisplacementWatch()
    said = [watch.advice(line) for line in lines]
    page = BOTH_FALL in warnings_of(write_run(tmp_path / "run", lines))
    assert page == any(said) == (end < -1)


LENGTH, SATURATED = "favoured for their length", "are saturated"


def held_out(longer: float, shorter: float) -> Callable[[int], dict[str, float]]:
    """Accuracies of the strata at step 100, on the way from a coin's."""
    return lambda s: {
        "eval_rewards/accuracies_chosen_longer": 0.5 + (longer - 0.5) * s / 100,
        "eval_rewards/accuracies_chosen_shorter": 0.5 + (shorter - 0.5) * s / 100,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [(held_out(0.9, 0.7), "long"), (held_out(0.6, 0.8), "short"), (held_out(0.9, 0.8), None)],
)
def test_strata_of_length_that_differ_are_told(
    tmp_path: Path, change: Callable[[int], dict[str, float]], said: str | None
) -> None:
    lines = [evaluation_line(step, **change(step)) for step in (0, 50, 100)]
    text = warnings_of(write_run(tmp_path / "run", lines))
    assert (LENGTH in text) == (said is not None)
    assert said is None or f"{said} replies are {LENGTH}" in text


@pytest.mark.parametrize(("share", "expected"), [(0.7, True), (0.4, False)])
def test_a_batch_that_teaches_little_is_told(tmp_path: Path, share: float, expected: bool) -> None:
    lines = [pair_line(s, saturated=share * min(1, s / 50), eval_saturated=0.0) for s in range(1, 101)]
    text = warnings_of(write_run(tmp_path / "run", lines))
    assert (SATURATED in text) == expected
    if expected:
        assert "70.0 % of the training pairs are saturated over the last fifth" in text


def test_a_panel_in_a_comparison_keeps_what_it_is() -> None:
    """The zero line and the bounds of a share are there for training and for held-out examples."""
    by_name = {picture.name: picture for picture in declared.comparison_pictures(ANY)}
    for name in ("logratios", "logratios_eval"):
        first, second = by_name[name].panels
        assert (first.zero, second.share) == (True, True)
        assert replace(first, series=()).height > second.height
