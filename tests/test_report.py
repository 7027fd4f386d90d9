"""The report: run folders as a run writes them go in, a page and pictures come out."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpo_kit.errors import InputError
from dpo_kit.report import read_run, write_comparison, write_report
from dpo_kit.report.story import remarks

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
image = pytest.importorskip("PIL.Image")

HOSTILE = "<script>alert(1)</script> {{ 7*7 }} {% raw %} \" onload='x' &amp; \x00 \ud800"
SPEED = {"train_runtime": 132.4, "pairs_per_second": 209.7, "peak_memory_bytes": 812 * 2**20}
SUMMARY = SPEED | {
    "tokens_saved_share": 0.314,
    "eval/accuracy": 0.716,
    "eval/accuracy_ceiling": 0.748,
    "eval/reward_before": -0.112,
    "eval/reward_after": 1.936,
    "eval/kl": 4.83,
}


class Page(HTMLParser):
    """A parsed page: its tags, its attributes by name, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = defaultdict(list)
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes[name].append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    margin = 0.01 * step
    return {
        "step": step,
        "epoch": step / 50,
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": 0.2 * margin,
        "rewards/rejected": -0.8 * margin,
        "rewards/accuracies": 0.5 + 0.002 * step,
        "rewards/margins": margin,
        "logps/chosen": -48.0 + 0.02 * step,
        "logps/rejected": -47.0 - 0.08 * step,
        "learning_rate": 1e-4 * (1 - step / 100),
        "grad_norm": 2.0 + math.sin(step),
        "pairs_per_second": 200.0 + math.cos(step),
        "somebody/elses_key": "any value",
    } | changes


def evaluation_line(step: int, **changes: Any) -> dict[str, Any]:
    keys = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    line = training_line(step)
    return {"step": step} | {f"eval_{key}": line[key] for key in keys} | changes


def lines_of_a_run(steps: int = 100) -> list[dict[str, Any]]:
    lines = [evaluation_line(0)]
    for step in range(1, steps + 1):
        lines.append(training_line(step))
        if step % 25 == 0:
            lines.append(evaluation_line(step))
    return lines


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **files: Any) -> Path:
    """A run folder; `summary`, `recipe`, `samples` replace what it holds by default, None leaves it out."""
    sample = {"prompt": "The film", "before": " was dull", "after": " was a joy", "reward_after": 2.5}
    recipe = {"loss": {"name": "dpo", "beta": 0.1}, "train": {"seed": 0}}
    content = {"summary": SUMMARY, "recipe": recipe, "samples": [sample]} | files
    text = {
        "metrics.jsonl": as_lines(lines_of_a_run() if lines is None else lines),
        "environment.json": json.dumps({"versions": {"torch": "2.13.0"}, "device": "cpu"}),
        "summary.json": content["summary"] and json.dumps(content["summary"]),
        "recipe.yaml": content["recipe"] and yaml.safe_dump(content["recipe"]),
        "samples.jsonl": content["samples"] and as_lines(content["samples"]),
    }
    folder.mkdir(parents=True)
    for name, written in text.items():
        if written is not None:
            (folder / name).write_text(written)
    return folder


def as_lines(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").iterdir()}


def test_the_page_shows_the_figures_and_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my-run")
    before = {path.name for path in run.iterdir()}
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")

    assert "<title>my-run</title>" in page.source
    figures = "0.716|ceiling 0.748|−0.112 → 1.936|4.830|209.7|31.4 %|812 MiB|2 min 12 s"
    for figure in figures.split("|"):
        assert figure in page.text
    assert (
        "Held-out accuracy rose from 0.500 at step 0 to 0.700 at step 100; label noise allows 0.748"
        in page.text
    )
    assert " was a joy" in page.text
    for detail in ("reward 2.500", "beta: 0.1", "torch: 2.13.0"):
        assert detail in page.text

    assert not {"script", "link", "iframe", "base"} & set(page.tags)
    assert not page.attributes["href"]
    assert not re.search(r"url\(|@import|https?://", page.source)
    embedded = {
        base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in page.attributes["src"]
    }
    assert embedded == {path.read_bytes() for path in (run / "plots").iterdir()}
    assert {path.name for path in run.iterdir()} == before | {"report.html", "plots"}


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_report(run)
    assert pictures(run) == {"loss", "accuracy", "margins", "rewards", "logps", "optimiser", "speed"}
    for path in (run / "plots").iterdir():
        assert path.stat().st_size < 80_000
        pixels = np.asarray(image.open(path).convert("RGB")).astype(int)
        assert pixels.shape == (456, 768, 3)
        coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 100).sum()
        assert 300 < coloured < 0.2 * pixels.size / 3, path.name


def test_the_drawn_line_follows_the_data(tmp_path: Path) -> None:
    """A learning rate that falls on a line is a line of blue pixels that falls, at constant slope."""
    run = write_run(tmp_path / "run", [{"step": s, "learning_rate": 1.0 - s / 100} for s in range(101)])
    write_report(run)
    pixels = np.asarray(image.open(run / "plots" / "optimiser.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 100
    columns = np.flatnonzero(blue.any(axis=0))
    heights = np.array([np.flatnonzero(blue[:, column]).mean() for column in columns])
    slope, offset = np.polyfit(columns, heights, 1)
    assert slope > 0.3
    assert np.abs(heights - (slope * columns + offset)).max() < 2.5
    assert len(columns) > 500


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    sample = {"prompt": HOSTILE, "before": [{"role": "user", "content": HOSTILE}], "after": HOSTILE}
    files = {"summary": {"eval/note": HOSTILE}, "recipe": {"path": "<script>alert(2)</script>"}}
    run = write_run(tmp_path / "<b>$x_{run}$ {{ 7*7 }}", samples=[sample], **files)
    page = Page(write_report(run))
    shown = HOSTILE.replace("\ud800", "\\ud800")
    assert page.text.count(shown) == 4
    assert f"user: {shown}" in page.text
    assert "<script>alert(2)</script>" in page.text
    assert not {"script", "b"} & set(page.tags)
    assert not page.attributes["onload"]

    other = write_run(tmp_path / "_other $", recipe={"path": "{{ 7*7 }}"})
    page = Page(write_comparison([run, other], tmp_path / "out"))
    assert "script" not in page.tags
    assert re.search(r"<script>alert\(2\)</script>\s*\{\{ 7\*7 }}", page.text)


def test_a_stopped_run_still_has_its_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary=None, samples=None, recipe=None)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 101, "loss": 0.4, "note": "é'.encode()[:-1])
    text = Page(write_report(run)).text
    assert "The last line of metrics.jsonl (line 106) is cut" in text
    assert "There is no summary.json" in text
    assert "0.700 at step 100" in text
    assert read_run(run).curve("loss")[0][-1] == 100


def test_lines_logged_again_after_resuming_replace_the_old_ones(tmp_path: Path) -> None:
    old = [training_line(step, loss=1.0) for step in range(1, 61)]
    new = [training_line(step, loss=2.0) for step in range(51, 56)]
    record = read_run(write_run(tmp_path / "run", old + new))
    steps, losses = record.curve("loss")
    assert steps.tolist() == list(range(1, 56))
    assert losses.tolist() == [1.0] * 50 + [2.0] * 5
    assert any("step 51" in note and "10 lines" in note for note in record.notes)


def test_a_run_that_logs_less_has_fewer_pictures(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 3.0 - 0.01 * step, "mean_token_accuracy": 0.4} for step in range(1, 41)]
    run = write_run(tmp_path / "sft", [*lines, {"step": 40, "train_loss": 2.8}], summary={"eval/kl": None})
    text = Page(write_report(run)).text
    assert pictures(run) == {"loss"}
    assert "Training loss fell from 2.955 over the first fifth to 2.635 over the last fifth" in text
    assert "KL to the reference" not in text.split("Details")[0]

    nothing_known = write_run(tmp_path / "odd", [{"step": 0, "custom": 1}], summary=None)
    assert "no metric that is known" in Page(write_report(nothing_known)).text


def test_a_long_run_is_still_a_small_page(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(20_000, 2))
    lines = [{"step": s, "loss": a, "pairs_per_second": b} for s, (a, b) in enumerate(noise.tolist())]
    samples = [{"prompt": f"prompt-{i:03d}", "before": "b", "after": "a"} for i in range(50)]
    run = write_run(tmp_path / "long", lines, samples=samples)
    text = Page(write_report(run)).text
    assert all(path.stat().st_size < 80_000 for path in (run / "plots").iterdir())
    assert "The first 40 of 50" in text
    assert re.findall(r"prompt-\d+", text)[-1] == "prompt-039"


def test_values_that_are_not_finite_are_gaps_and_are_told(tmp_path: Path) -> None:
    lines = [training_line(s, loss=math.nan if s in (7, 9) else 0.5) for s in range(1, 41)]
    run = write_run(tmp_path / "run", lines, summary=SUMMARY | {"train_runtime": math.inf})
    text = Page(write_report(run)).text
    assert "The loss is not finite at step 7." in text
    assert "Infinity" in text


BOTH_FALL = "making both less likely"
PAST_BEST = "below its best"


def warnings_of(run: Path) -> str:
    return "\n".join(remark.text for remark in remarks(read_run(run)) if remark.warning)


@pytest.mark.parametrize(
    ("change", "warning", "expected"),
    [
        (lambda s: {"eval_logps/chosen": -48.0 - 0.05 * s}, BOTH_FALL, True),
        (lambda s: {"eval_logps/chosen": -48.0 + 0.05 * s}, BOTH_FALL, False),
        (lambda s: {"eval_logps/chosen": -48.0 - s, "eval_rewards/margins": -s / 100}, BOTH_FALL, False),
        (lambda s: {"eval_rewards/accuracies": {50: 0.75, 100: 0.72}.get(s, 0.6)}, PAST_BEST, True),
        (lambda s: {"eval_rewards/accuracies": {50: 0.735, 100: 0.72}.get(s, 0.6)}, PAST_BEST, False),
    ],
)
def test_warnings_come_when_due_and_only_then(
    tmp_path: Path, change: Callable[[int], dict[str, float]], warning: str, expected: bool
) -> None:
    lines = [evaluation_line(step, **change(step)) for step in (0, 25, 50, 75, 100)]
    text = warnings_of(write_run(tmp_path / "run", lines))
    assert (warning in text) == expected
    if expected and warning == PAST_BEST:
        assert "ended at 0.720, 0.030 below its best of 0.750 at step 50" in text


@pytest.mark.parametrize(("fall", "expected"), [(1.0, False), (20.0, True)])
def test_a_training_curve_warns_only_beyond_its_noise(tmp_path: Path, fall: float, expected: bool) -> None:
    chosen = [-48 - fall * s / 100 + 4 * (-1) ** s for s in range(101)]
    lines = [training_line(s, **{"logps/chosen": chosen[s]}) for s in range(1, 101)]
    assert (BOTH_FALL in warnings_of(write_run(tmp_path / "run", lines))) == expected


def test_the_running_mean_is_centred_and_knows_gaps() -> None:
    from dpo_kit.report.plots import running_mean

    values = np.arange(36.0)
    values[10] = np.nan
    mean, window = running_mean(values)
    assert window == 3
    assert mean[0] == pytest.approx((0 + 1) / 2)
    assert mean[5] == pytest.approx(5)
    assert mean[9] == pytest.approx((8 + 9) / 2)
    assert math.isnan(mean[10])
    assert mean[35] == pytest.approx((34 + 35) / 2)
    assert running_mean(np.array([4.0, 8.0]))[0].tolist() == [4.0, 8.0]


def test_runs_side_by_side(tmp_path: Path) -> None:
    recipe = {"loss": {"name": "dpo", "beta": 0.1}, "data": {"train": ["a.jsonl"]}, "train": {"seed": 0}}
    first = write_run(tmp_path / "a" / "run", recipe=recipe)
    other = recipe | {"loss": {"name": "unlikelihood", "alpha": 0.25}}
    second = write_run(tmp_path / "b" / "run", recipe=other, summary={"eval/accuracy": 0.688, "extra": 7})
    out = tmp_path / "new" / "comparison"
    page = Page(write_comparison([first, second], out))

    assert "Comparison of a/run and b/run" in page.text
    assert page.tags.count("h3") == 2
    cells = re.sub(r"<[^>]*>|\s+", " ", page.source.split("Final figures")[1].split("<figure>")[0])
    assert re.search(r"Held-out accuracy\s+0.716\s+0.688", cells)
    assert re.search(r"Training time\s+2 min 12 s\s+–", cells)
    assert re.search(r"extra\s+–\s+7\b", cells)
    assert re.search(r"loss.name\s+dpo\s+unlikelihood", cells)
    assert re.search(r"loss.beta\s+0.1\s+–", cells)
    assert re.search(r"loss.alpha\s+–\s+0.25", cells)
    assert not re.search(r"a\.jsonl|train\.seed", cells)

    assert {"loss", "loss_eval", "accuracy_eval", "logps", "optimiser", "speed"} <= pictures(out)
    for path in (out / "plots").iterdir():
        pixels = np.asarray(image.open(path).convert("RGB")).astype(int)
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (np.abs(pixels - colour).max(axis=2) < 12).any(), path.name
    assert not (first / "report.html").exists()


def test_a_comparison_refuses_what_makes_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    other = write_run(tmp_path / "other")
    with pytest.raises(InputError, match="needs two runs"):
        write_comparison([run], tmp_path / "out")
    with pytest.raises(InputError, match="named twice"):
        write_comparison([run, tmp_path / "other" / ".." / "run"], tmp_path / "out")
    with pytest.raises(InputError, match="would be overwritten"):
        write_comparison([run, other], run)
    with pytest.raises(InputError, match="cannot be written"):
        write_comparison([run, other], run / "recipe.yaml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "metrics.jsonl",
            b'{"step": 1}\n\n{"step": 2,\n{"step": 3}\n',
            r"metrics\.jsonl:3: not a JSON object",
        ),
        ("metrics.jsonl", b'{"step": 1}\n[2]\n{"step": 3}\n', r"metrics\.jsonl:2: not a JSON object"),
        ("metrics.jsonl", b"", "no metrics"),
        ("metrics.jsonl", b'{"step": 1, "lo', "no metrics"),
        ("metrics.jsonl", b'{"loss": 1}\n', r"metrics\.jsonl:1: field 'step'"),
        ("metrics.jsonl", b'{"step": 1.5}\n', r"metrics\.jsonl:1: field 'step'"),
        ("metrics.jsonl", b'{"step": NaN}\n', r"metrics\.jsonl:1: field 'step'"),
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "loss": "low"}\n', r"metrics\.jsonl:2: field 'loss'"),
        ("summary.json", b'{"eval/kl": ', r"summary\.json: not JSON"),
        ("summary.json", b"[1]", r"summary\.json: expected a JSON object"),
        ("environment.json", b"\xff", r"environment\.json: not JSON"),
        ("recipe.yaml", b"loss:\n  name: dpo\n beta: 1\n", r"recipe\.yaml:3: this is not YAML"),
        ("recipe.yaml", b"- dpo\n", r"recipe\.yaml: expected a mapping"),
        ("samples.jsonl", b"nonsense\n{}\n", r"samples\.jsonl:1: not a JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()
    assert not (run / "plots").exists()


def test_what_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install dpo-kit\[report\]"):
        write_report(run)


def test_importing_the_report_imports_neither_matplotlib_nor_jinja2() -> None:
    code = "import sys, dpo_kit.report; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_numbers_and_units_are_those_people_read() -> None:
    from dpo_kit.report.summary import duration, memory, number

    numbers = (0.71634, -48.04, 209.71, 12345.6, 3e-5, 0.0, 1500, math.nan)
    words = ["0.716", "−48.0", "209.7", "12,346", "3.00e−05", "0", "1,500", "nan"]
    assert [number(value) for value in numbers] == words
    times = ["5.2 s", "1 min 0 s", "2 min 12 s", "1 h 2 min"]
    assert [duration(seconds) for seconds in (5.23, 59.99, 132.4, 3723)] == times
    assert [memory(size) for size in (812 * 2**20, 3 * 2**29)] == ["812 MiB", "1.50 GiB"]
