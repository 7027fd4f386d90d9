"""Pictures and page of a comparison: everything measured is in them or told, and no claim is too large."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from frontier_folder import LEVELS, METHODS, PROMPTS, START, write_comparison_folder

from dpo_kit.comparison.findings import central_level, lead, times
from dpo_kit.comparison.page import write_page
from dpo_kit.comparison.pictures import MARKERS, convergence, draw, envelope, frontier, look
from dpo_kit.comparison.record import Record
from dpo_kit.errors import InputError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
image = pytest.importorskip("PIL.Image")

HOSTILE = "<script>alert(1)</script> $x$ {{ 7*7 }} \" onload='x'"


class Page(HTMLParser):
    """A parsed page: its tags, attributes by name, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = defaultdict(list)
        self.text = ""
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        for name, value in attrs:
            self.attributes[name].append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison_folder(tmp_path_factory.mktemp("comparison") / "all")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_page(folder))


def texts(figure) -> str:
    """All words in a figure, without line ends."""
    from matplotlib.text import Text

    return " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())


def change_table(path: Path, change) -> None:
    """Rewrite a table, each row (a dictionary) through `change`; None leaves it out."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in map(change, reader) if row is not None]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)


def test_the_pictures_are_those_of_a_readme(folder: Path) -> None:
    assert [path.name for path in draw(folder)] == ["frontier.png", "convergence.png"]
    for name, width in (("frontier", 1080), ("convergence", 1440)):
        path = folder / f"{name}.png"
        assert path.stat().st_size < 300_000
        assert image.open(path).size[0] == width


def test_every_method_is_in_the_pictures_with_a_look_of_its_own(folder: Path) -> None:
    record = Record(folder)
    assert record.methods == list(METHODS)
    looks = {(look(record, m)["color"], look(record, m)["marker"]) for m in METHODS}
    assert len(looks) == len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 9
    assert len(set(MARKERS)) == len(MARKERS)
    for figure, missing in ((frontier(record), ()), (convergence(record), ("best_of_n",))):
        handles = " ".join(" ".join(t.get_text().split()) for t in figure.legends[0].get_texts())
        for key, method in METHODS.items():
            assert (method.label in handles) == (key not in missing)
    assert "Best-of-N trains nothing" in texts(convergence(record))


def test_what_lies_outside_the_axes_is_counted(folder: Path) -> None:
    """Each point of the data is within the axes or in the sentence below them."""
    record = Record(folder)
    figure = frontier(record)
    (low, high), (bottom, top) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert (low, high) == (0, 1.25 * max(LEVELS))
    words = texts(figure)
    for method in record.methods:
        points = record.of(method)
        inside = [p for p in points if p.kl <= high and bottom <= p.reward <= top]
        told = re.search(rf"{re.escape(record.label(method))}: ([^;.]*) of {len(points)}", words)
        counts = sum(map(int, re.findall(r"(\d+) (?:beyond|below)", told.group(1)))) if told else 0
        assert len(inside) + counts == len(points), method
    assert "Log-ratio (naive): 6 beyond KL 25 (up to 212) of 7" in words


def test_lost_numbers_are_counted_too(folder: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(folder, tmp_path / "lost")
    change_table(
        lost / "frontier.csv",
        lambda row: row | ({"reward": "nan"} if (row["method"], row["step"]) == ("rloo", "120") else {}),
    )
    assert "RLOO: 1 that are no numbers of 7" in texts(frontier(Record(lost)))


def test_axes_hold_everything_where_nothing_is_far(tmp_path: Path) -> None:
    record = Record(write_comparison_folder(tmp_path / "near", without=("log_ratio", "unlikelihood")))
    assert "Not within" not in texts(frontier(record))


def test_an_envelope_has_the_points_that_none_beats_at_a_lower_kl(folder: Path) -> None:
    record = Record(folder)
    points = record.of("dpo")
    found = envelope(record, "dpo")
    assert found[0] is record.start
    for point in points:
        beaten = any(o.kl <= point.kl and o.reward >= point.reward and o is not point for o in points)
        assert (point in found) == (not beaten and point.reward > START)
    assert [point.step for point in envelope(record, "best_of_n")] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert envelope(record, "log_ratio") == [record.start]
    assert "never above the SFT policy" in texts(frontier(record))


def test_the_lead_says_who_is_highest_and_by_how_much(folder: Path) -> None:
    record = Record(folder)
    assert central_level(record) == 10
    said = " ".join(lead(record))
    dpo, ppo_gt = (record.matched(10)[method].reward.value for method in ("dpo", "ppo_gt"))
    assert said.startswith("At a KL of 10 nats from the SFT policy, DPO has the highest mean true reward")
    assert f"measured: {dpo:+.2f} [{dpo - 0.2:+.2f}, {dpo + 0.2:+.2f}] (the SFT policy: +0.40)" in said
    assert f"It lies above PPO-GT (by {dpo - ppo_gt:+.2f} [" in said
    assert "not to be told apart from" not in lead(record)[1]
    assert "A run of PPO-GT, with RL the highest measured at that KL, takes 7.8 times the time and 15" in said
    assert "what is made once for all runs is left out of both (SFT, candidates and reward model)" in said
    assert lead(record)[-1].startswith("Intervals are 95%, over prompts alone: each setting was run once")


def test_the_lead_follows_the_numbers_the_other_way(tmp_path: Path) -> None:
    heights = {"dpo": 1.0, "ppo_gt": 2.4, "ppo": 1.1}
    record = Record(write_comparison_folder(tmp_path / "other", heights))
    said = " ".join(lead(record))
    assert "PPO-GT has the highest mean true reward" in said
    assert "DPO has the highest" not in said.replace("PPO-GT has the highest", "")
    assert re.search(r"DPO has \+1\.\d\d \[.*?\]\. It lies below PPO-GT \(by \+1\.\d\d \[\+", said)
    assert re.search(r"it is not to be told apart from [^;]*PPO \(by", said)
    below = sum(1 for level in LEVELS for e in record.matched(level).values() if e.below and e.below.high < 0)
    assert f"below it {times(below)}" in said
    assert below > 2


def test_no_winner_is_named_where_nobody_meets(tmp_path: Path) -> None:
    folder = write_comparison_folder(tmp_path / "few")
    change_table(folder / "matched.csv", lambda row: row | dict.fromkeys(("reward", "low", "high"), ""))
    assert lead(Record(folder)) == [
        "No two methods have reached the same KL yet, so there is nothing to compare."
    ]
    text = Page(write_page(folder)).text
    assert "nothing to compare" in text
    assert "has the highest" not in text


def test_the_page_is_whole_and_needs_nothing_else(page: Page, folder: Path) -> None:
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(uri.startswith("data:image/png;base64,") for uri in page.attributes["src"])
    assert page.tags.count("img") == 2
    assert not re.search(r"url\(|@import|https?://", page.source)
    links = page.attributes["href"]
    assert len(links) >= 2 * len(list((folder / "runs").glob("*/")))
    assert all((folder / unquote(link)).exists() for link in links)
    for method in METHODS.values():
        assert page.text.count(method.label) >= 4
    for words in ("24 of 24", f"each on {PROMPTS} prompts", "Reward model shared", "5 min 10 s", "name: dpo"):
        assert words in page.text


def test_the_table_marks_the_best_and_those_beside_it(page: Page, folder: Path) -> None:
    record = Record(folder)
    for level in LEVELS:
        best = max(record.matched(level).values(), key=lambda each: each.reward.value)
        assert f"<b>{best.reward.value:+.2f}</b>" in page.source
    signs = [
        (e.below.low <= 0 <= e.below.high, e.below.high < 0)
        for level in LEVELS
        for e in record.matched(level).values()
        if e.below
    ]
    cells = page.source.split("Reward at matched KL")[1].split("</table>")[0]
    assert (cells.count("≈"), cells.count("▲")) == tuple(map(sum, zip(*signs, strict=True)))


def test_samples_are_of_all_methods_at_the_same_prompts(page: Page) -> None:
    part = page.text.split("Samples at a KL of about 10")[1].split("Where it went wrong")[0]
    for i in range(6):
        assert f"This film {i}" in part
    assert "This film 6" not in part
    assert part.count("was seen by dpo-beta=0.1-seed0 at 40.") == 6
    for method in METHODS.values():
        assert len(re.findall(rf"{re.escape(method.label)} KL \d", part)) == 6


def test_runs_that_went_wrong_are_shown(page: Page, folder: Path) -> None:
    part = page.text.split("Where it went wrong")[1].split("Runs Method")[0]
    assert re.search(
        r"Log-ratio \(naive\) 1 of 1 runs of the method mean reward −2\.\d\d at step 120, at a KL of 212",
        part,
    )
    assert "was seen by log_ratio-seed0 at 120." in part
    assert "DPO" not in part


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_comparison_folder(tmp_path / "<b>x $y$")
    for path in (folder / "runs").glob("*/evaluations/*.jsonl"):
        lines = [json.loads(line) | {"reply": HOSTILE} for line in path.read_text().splitlines()]
        lines[0]["prompt"] = HOSTILE
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["frontier"]["methods"]["dpo"]["label"] = HOSTILE
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    change_table(
        folder / "runs.csv",
        lambda row: row | {"setting": HOSTILE, "label": HOSTILE, "outcome": "failed", "problem": HOSTILE},
    )
    change_table(folder / "costs.csv", lambda row: row | {"label": HOSTILE})
    page = Page(write_page(folder))
    assert not {"script", "b x"} & set(page.tags)
    assert not page.attributes["onload"]
    shown = " ".join(HOSTILE.split())
    # In the findings, tables, samples (6 prompts, 10 rows each) and runs.
    assert page.text.count(shown) > 60 + 24


def test_an_unfinished_comparison_has_its_page(folder: Path, tmp_path: Path) -> None:
    part = shutil.copytree(folder, tmp_path / "part")
    late = ("ppo", "rloo", "best_of_n", "ppo_gt_trl")
    for name in ("frontier", "matched", "costs"):
        change_table(part / f"{name}.csv", lambda row: None if row["method"] in late else row)
    (part / "costs.csv").unlink()
    shutil.rmtree(part / "runs" / "log_ratio-seed0" / "evaluations")
    broken = {"outcome": "diverged", "problem": "the loss is not finite at step 40"}
    gone = dict.fromkeys(("step", "reward", "kl"), "") | {"outcome": "unfinished"}
    change_table(
        part / "runs.csv",
        lambda row: row | (gone if row["method"] in late else broken if row["method"] == "log_ratio" else {}),
    )
    text = Page(write_page(part)).text
    assert "10 of 24 runs have not finished" in text
    assert "Nothing has been measured yet of PPO, PPO-GT (TRL's settings), RLOO, Best-of-N." in text
    assert "diverged the loss is not finite at step 40" in text
    assert "13 of 24" in text


def test_a_comparison_that_has_only_begun(folder: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    with pytest.raises(InputError, match="no comparison here"):
        write_page(begun)
    shutil.copy(folder / "recipe.yaml", begun)
    assert draw(begun) == []
    assert "nothing to compare" in Page(write_page(begun)).text


def test_a_broken_table_is_named(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    change_table(broken / "frontier.csv", lambda row: row | {"kl": "far"})
    with pytest.raises(InputError, match=r"frontier\.csv:2.*'kl'.*not a number: 'far'"):
        draw(broken)


def test_error_bars_are_standard_errors_over_prompts(folder: Path) -> None:
    record = Record(folder)
    point = record.of("dpo")[-1]
    rewards = np.array([reply["reward"] for reply in record.replies(point)])
    figure = frontier(record)
    spans = [
        segment[1, 1] - segment[0, 1]
        for collection in figure.axes[0].collections
        for segment in collection.get_segments()
    ]
    assert len(rewards) == PROMPTS
    # The invented replies differ between policies by a constant alone.
    assert spans == pytest.approx([2 * rewards.std(ddof=1) / PROMPTS**0.5] * len(spans))
    assert len(spans) > 40
