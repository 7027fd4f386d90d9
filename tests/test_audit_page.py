"""The page of an audit: whole in one file, harmless whatever the data say, and drawn from what is there."""

import json
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from pair_files import write

from dpo_kit.audit import Audit, Finding, inspect_pairs
from dpo_kit.audit.page import write_audit
from dpo_kit.audit.pictures import draw_pictures
from dpo_kit.audit.words import cost_rows, languages_in_words, visible
from dpo_kit.errors import InputError
from dpo_kit.pairs.statistics import Gatherer
from dpo_kit.pairs.tally import short_places

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>\x1b[31m $x$ {{ 7*7 }}"
ROWS = [
    {"prompt": f"Question {i}", "chosen": "yes " * (i + 1), "rejected": "no " * (2 * i % 7 + 1)}
    for i in range(40)
]
FIGURES = {
    "tokens": {
        "lengths": {
            part: {"percentiles": {"50": 3}, "histogram": {"edges": [1, 2, 4, 8], "counts": [1, 5, 2]}}
            for part in ("prompt", "chosen", "rejected")
        },
        "stay": {"128": 3, "512": 8},
    },
    "shallow": {
        "length_rule": {
            "longer_chosen": 0.7,
            "interval": [0.6, 0.8],
            "by_difference": [
                {"from": 1, "to": 9, "share": 0.4, "count": 5},
                {"from": 10, "to": 90, "share": 0.9, "count": 5},
            ],
        },
        "model": {"accuracy": 0.73, "interval": [0.7, 0.8], "pairs": 40},
        "features": [
            {"name": HOSTILE, "coefficient": -1.5, "accuracy": 0.3, "differs": 0.5},
            {"name": "bold", "coefficient": 0.4, "accuracy": 0.6, "differs": 0.5},
        ],
    },
    "cost": {"batch_size": 8, "distinct": 600, "separate": 1000, "padded": 3000, "saved_share": 0.4},
    "languages": {
        "scripts": {side: {"Latin": 0.7, HOSTILE: 0.3} for side in ("prompt", "chosen", "rejected")},
        "languages_guessed": {side: {"English": 0.999, "French": 0.001} for side in ("prompt", "chosen")},
    },
    "duplicates": {"rows_per_prompt": {"1": 30, "2-3": 5}},
}


class Page(HTMLParser):
    """A parsed page: its tags, attributes by name, and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], defaultdict(list), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes[name].append(value or "")

    def handle_data(self, data):
        self.text += data


def audited(folder):
    """Of a file with rows that cannot be used, with every figure that is drawn, and a hostile finding."""
    rows = [
        *ROWS,
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        {"prompt": "x", "chosen": "", "rejected": "a"},
        {"prompt": "x", "chosen": "", "rejected": "b"},
    ]
    found = inspect_pairs(write(folder / "rows.jsonl", *rows))
    found.figures |= FIGURES
    places = tuple(f"{folder}/rows.jsonl:{line}" for line in range(1, 21))
    example = {"place": places[0], "chosen": HOSTILE, "rejected": "x" * 9000}
    found.findings = [Finding(f"hostile/{HOSTILE}", "error", 20, 40, HOSTILE, HOSTILE, places, (example,))]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An audit, and the page of its folder."""
    folder = tmp_path_factory.mktemp("audit")
    audit = audited(folder)
    return audit, write_audit(audit, folder / "out", title=HOSTILE)


def test_the_page_runs_and_fetches_nothing_and_escapes_what_the_data_say(written):
    page = Page(written[1])
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(uri.startswith("data:image/png;base64,") for uri in page.attributes["src"])
    assert page.attributes["href"]
    assert all((written[1].parent / link).is_file() for link in page.attributes["href"])
    assert page.tags.count("img") == len(page.attributes["src"])
    # In <title> and heading, and of the finding in its name, sentence, advice and example.
    assert page.text.count("<script>alert('x')</script>") == 6
    assert page.text.count("{{ 7*7 }}") == 6
    assert "\x1b" not in page.text


def test_the_page_says_what_was_found_and_left_out(written):
    text = " ".join(Page(written[1]).text.split())
    for words in (
        "Rows read 43", "Pairs made 40", "20 of 40", "Saved by the tree 40.0 %",
        "Guessed without reading 73.0 %",
        "chosen and rejected are the same", "rows.jsonl:41", "x" * 1400,
    ):  # fmt: skip
        assert words in text
    assert "x" * 1600 not in text


def test_the_folder_has_the_json_the_pictures_and_the_rows(written):
    audit, page = written
    out = page.parent
    assert {path.name for path in out.iterdir()} == {"audit.html", "audit.json", "plots", "rows"}
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(audit.to_dict()))
    assert {path.stem for path in (out / "plots").iterdir()} == {
        "lengths", "longer", "shallow", "left_out", "stay", "cost", "scripts", "rows_per_prompt",
    }  # fmt: skip
    identical = (out / "rows" / "identical.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in identical] == [{"source": f"{out.parent}/rows.jsonl:41"}]
    (hostile,) = (path for path in (out / "rows").iterdir() if path.name.startswith("hostile_"))
    sources = [json.loads(line)["source"] for line in hostile.read_text().splitlines()]
    assert sources == list(audit.findings[0].places)


def test_every_picture_copes_without_its_figures(tmp_path):
    audit = audited(tmp_path)
    audit.figures.clear()
    names = {picture.name for picture in draw_pictures(audit)}
    assert names == {"lengths", "left_out"}
    assert not draw_pictures(Audit())
    for name in FIGURES:
        audit.figures = {name: {}}
        assert {picture.name for picture in draw_pictures(audit)} == names


def test_findings_of_one_name_have_their_own_files_and_those_without_rows_none(tmp_path):
    findings = [
        Finding("odd", "note", 1, 1, "Set `x: 1` and ```.", "", ("a:1",)),
        Finding("odd", "note", 2, 3, "", "", ("a:2", "a:3")),
        Finding("whole", "note", 7, 9, "", ""),
    ]
    page = Page(write_audit(Audit(findings=findings), tmp_path / "out", title="rows"))
    assert page.attributes["href"] == ["rows/odd.jsonl", "rows/odd-2.jsonl"]
    assert len((tmp_path / "out/rows/odd-2.jsonl").read_text().splitlines()) == 2
    assert "2 of 3" in page.text
    assert "7 of 9" not in page.text
    assert page.tags.count("code") == 1
    assert "Set x: 1 and ```." in page.text


def test_several_sources_and_held_out_data_are_told_apart(tmp_path):
    bad = {"prompt": "x", "chosen": "a", "rejected": "a"}
    one, two = (write(tmp_path / f"{name}.jsonl", *ROWS, *[bad] * n) for name, n in (("one", 1), ("two", 2)))
    held_out = write(tmp_path / "held.jsonl", ROWS[0], bad, bad, bad)
    found = inspect_pairs([one, two], held_out=held_out)
    assert [each["counts"] for each in found.to_dict()["sources"]] == [{"identical": 1}, {"identical": 2}]
    text = " ".join(Page(write_audit(found, tmp_path / "out", title="rows")).text.split())
    assert f"{two} 2, {one} 1" in text
    assert f"{held_out} (held out)" in text
    assert len((tmp_path / "out/rows/held_out-identical.jsonl").read_text().splitlines()) == 3


def test_an_audit_of_nothing_usable_has_a_page(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"prompt": "x", "chosen": "a", "rejected": "a"})
    text = Page(write_audit(inspect_pairs(source), tmp_path / "out", title="rows")).text
    assert "no check had rows to look at" in text


def test_an_earlier_audit_leaves_nothing_behind_and_other_files_stay(tmp_path):
    out = tmp_path / "out"
    (out / "rows").mkdir(parents=True)
    (out / "rows" / "mine.jsonl").write_text("x")
    places = Finding("odd", "note", 1, 1, "", "", ("a:1",))
    write_audit(Audit(findings=[places]), out, title="rows")
    assert {path.name for path in (out / "rows").iterdir()} == {"mine.jsonl", "odd.jsonl"}
    (out / "rows" / "mine.jsonl").unlink()
    (out / "notes.txt").write_text("x")
    write_audit(Audit(findings=[replace(places, name="new")]), out, title="rows")
    assert [path.name for path in (out / "rows").iterdir()] == ["new.jsonl"]
    assert (out / "notes.txt").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="this is a file"):
        write_audit(Audit(), tmp_path / "file", title="rows")


@pytest.mark.parametrize("kind", ["unpaired", "lists"])
def test_other_kinds_have_pages_too(kind, tmp_path):
    rows = {
        "unpaired": [{"prompt": f"p{i}", "completion": "x" * (i + 1), "label": i % 2} for i in range(6)],
        "lists": [
            {"prompt": f"p{i}", "completions": ["a", "bb", "c"], "scores": [3, 2, 1]} for i in range(3)
        ],
    }[kind]
    options = {"shape": "lists"} if kind == "lists" else {}
    found = inspect_pairs(write(tmp_path / "rows.jsonl", *rows), **options)
    page = Page(write_audit(found, tmp_path / "out", title="rows"))
    assert page.tags.count("img") >= 1


def test_lengths_are_counted_in_bins_that_hold_all_of_them():
    gatherer = Gatherer()
    audit = inspect_rows(
        gatherer, [{"prompt": "p" * n, "chosen": "c" * (3 * n), "rejected": "r"} for n in (1, 5, 99)]
    )
    for part, longest in (("prompt", 99), ("chosen", 297), ("rejected", 1)):
        histogram = audit.histograms[part]
        assert sum(histogram.counts) == 3
        assert len(histogram.counts) == len(histogram.edges) - 1
        assert histogram.edges[0] == 1
        assert histogram.edges[-1] > longest
    assert audit.histograms["rejected"].counts[0] == 3


def inspect_rows(gatherer, rows):
    from dpo_kit.pairs.kinds import PAIRS

    for row in rows:
        gatherer.add(row, PAIRS)
    return gatherer.statistics(PAIRS)


def test_words():
    assert short_places(["a:1", "a:2 (row 7)", "b:row 3", "b:row 4"]) == "a:1, :2 (row 7), b:row 3, :row 4"
    assert visible("a\tb\n\x07\x9b‮") == "a\tb\n\\x07\\x9b\\u202e"
    model = {"seconds": [30.0, 90.0], "flops": 2e12, "memory": {"weights": 2**31}, "uncounted": ["Conv"]}
    assert cost_rows({"model": model}) == [
        ("least arithmetic of an epoch", "2 TFLOP"),
        ("time of an epoch, estimated", "30.0 s to 1 min 30 s"),
        ("memory: weights", "2.00 GiB"),
        ("layers whose arithmetic is not counted", "Conv"),
    ]
    assert cost_rows({}) == []
    shares = {"English": 0.6, "French": 0.2, "unknown": 0.2}
    audit = Audit(figures={"languages": {"languages_guessed": {"prompt": shares, "chosen": shares}}})
    assert languages_in_words(audit) == "English 75%, French 25%"
