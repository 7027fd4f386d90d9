"""Texts from data, names and recipes are shown as texts: on pages, in the terminal, in YAML and JSON.

A page with hostile texts must have the very elements and attributes that it has with harmless ones.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from frontier_folder import write_comparison_folder
from hostile import TEXTS, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_files import write
from test_audit_page import FIGURES
from test_frontier_page import change_table
from test_hostile_models import recipe
from test_report import SUMMARY, write_run
from tiny_runs import make_world

from dpo_kit.audit.findings import Finding
from dpo_kit.audit.inspection import inspect_pairs
from dpo_kit.audit.page import write_audit
from dpo_kit.audit.show import print_audit
from dpo_kit.cli_options import print_json, say
from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs
from dpo_kit.recipe import Recipe
from dpo_kit.report import write_comparison, write_report
from dpo_kit.shown_text import visible
from dpo_kit.yaml_file import parse_yaml

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PIECES = st.sampled_from(
    [*TEXTS, *"<>&\"'`/=!-{}%#$\\[]", "<p", "-->", "]]>", "&#x3c;", "&quot", "\x00", "\r"]
)
HOSTILE = st.lists(PIECES | st.text(max_size=4), min_size=1, max_size=6).map("".join)
FEW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def exactly(path: Path) -> str:
    """A file's text with its own line ends."""
    return path.read_bytes().decode()


class Page(HTMLParser):
    """A parsed page: what it is built of, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.built: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(exactly(path))
        self.close()
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.built.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.built.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.built.append(("comment",))

    def handle_pi(self, data: str) -> None:
        self.built.append(("instruction",))

    def unknown_decl(self, data: str) -> None:
        self.built.append(("declaration",))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(text: str) -> str:
    """As a page has it: half a surrogate pair by its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_name(text: str) -> str:
    """As much of a text as a folder may be called."""
    kept = re.sub(r"[/\x00\ud800-\udfff]", "", text).encode()[:150].decode(errors="ignore")
    return f"x{kept}"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold no text of data but names, and take long."""
    monkeypatch.setattr("dpo_kit.report.page._draw", lambda *_: {})
    monkeypatch.setattr("dpo_kit.audit.pictures.draw_pictures", lambda *_: {})
    monkeypatch.setattr("dpo_kit.comparison.page.draw", lambda *_: [])


def write_report_of(folder: Path, text: str, name: str) -> Path:
    """The report of a run whose every text is this one."""
    shutil.rmtree(folder, ignore_errors=True)
    messages = [{"role": text, "content": text}]
    samples = [
        {"prompt": text, "before": text, "after": text, "reward_after": 1.0},
        {"prompt": messages, "before": [*messages, {"role": "user", "content": 3}], "after": {"x": text}},
    ]
    found = write_run(
        folder / name,
        samples=samples,
        recipe={"loss": {"name": text}, "train": {f"k{text}": [text]}},
        summary=SUMMARY | {f"k{text}": 1, "other": text},
    )
    (found / "environment.json").write_text(json.dumps({"versions": {"torch": text}, "device": text}))
    return found


@FEW
@given(text=HOSTILE)
def test_a_report(text: str, tmp_path: Path, no_pictures: None) -> None:
    harmless = Page(write_report(write_report_of(tmp_path / "a", "word", "name")))
    path = write_report_of(tmp_path / "b", text, as_name(text))
    page = Page(write_report(path))
    assert page.built == harmless.built
    assert page.text.count(written(text)) >= 5
    assert exactly(path / "recipe.yaml") in page.text
    assert as_name(text) in page.text


@FEW
@given(text=HOSTILE)
def test_a_comparison_of_runs(text: str, tmp_path: Path, no_pictures: None) -> None:
    pages = []
    for word, names in (("word", ("one", "two")), (text, (as_name(text), as_name(f"2{text}")))):
        folder = tmp_path / str(len(pages))
        shutil.rmtree(folder, ignore_errors=True)
        runs = [write_report_of(folder / str(i), word, name) for i, name in enumerate(names)]
        (runs[0] / "recipe.yaml").write_text(yaml.safe_dump({"train": {f"k{word}": word}}))
        pages.append(Page(write_comparison(runs, folder / "out")))
    assert pages[0].built == pages[1].built
    assert written(text) in pages[1].text


@FEW
@given(text=HOSTILE)
def test_an_audit(text: str, tmp_path: Path, no_pictures: None) -> None:
    pages = []
    for word in ("word", text):
        folder = tmp_path / str(len(pages))
        folder.mkdir(exist_ok=True)
        rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "r", f"k{word}": word} for i in range(3)]
        rows.append(rows[0] | {"chosen": "r"})
        audit = inspect_pairs(write(folder / f"{as_name(word)}.jsonl", *rows))
        audit.figures |= FIGURES
        example = {"place": word, f"k{word}": word}
        said = word.replace("`", "").replace("\n", "")  # backticks are for code
        audit.findings = [Finding(f"f{word}", "error", 2, 4, said, said, (f"{word}:1",), (example,))]
        pages.append(Page(write_audit(audit, folder / "out", title=word)))
        assert not [path for path in (folder / "out" / "rows").iterdir() if path.suffix != ".jsonl"]
        shown = io.StringIO()
        from rich.console import Console

        print_audit(audit, Console(file=shown, width=10_000))
        assert not CONTROLS.search(shown.getvalue())
    assert pages[0].built == pages[1].built
    assert visible(text) in pages[1].text  # of the title
    assert not CONTROLS.search(pages[1].text)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison_folder(tmp_path_factory.mktemp("comparison") / "all")


@settings(FEW, max_examples=3)
@given(text=HOSTILE)
def test_a_frontier(text: str, comparison: Path, tmp_path: Path, no_pictures: None) -> None:
    from dpo_kit.comparison.page import write_page

    pages = []
    for word in ("word", text):
        folder = tmp_path / f"frontier-{len(pages)}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(comparison, folder)
        for path in (folder / "runs").glob("*/evaluations/*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            # Prompts stay apart, or they would be one.
            path.write_text(
                "".join(
                    json.dumps(x | {"reply": word, "prompt": f"{word}{x['prompt']}"}) + "\n" for x in lines
                )
            )
        content = yaml.safe_load((folder / "recipe.yaml").read_text())
        content["frontier"]["methods"]["dpo"]["label"] = word
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        cell = re.sub(r"[\x00\ud800-\udfff]", "", f"w{word}")
        words = {"setting": cell, "label": cell, "outcome": "failed", "problem": cell}
        change_table(folder / "runs.csv", lambda row, words=words: row | words)
        change_table(folder / "costs.csv", lambda row, cell=cell: row | {"label": cell})
        pages.append(Page(write_page(folder)))
    assert pages[0].built == pages[1].built


def test_a_run_of_a_comparison_is_no_path(comparison: Path, tmp_path: Path) -> None:
    from dpo_kit.comparison.page import write_page

    folder = shutil.copytree(comparison, tmp_path / "all")
    change_table(folder / "runs.csv", lambda row: row | {"run": "../../elsewhere"})
    with pytest.raises(InputError, match="a run's name is no path"):
        write_page(folder)


def test_names_in_pictures(tmp_path: Path) -> None:
    """matplotlib reads mathematics between dollars, and stops at what it cannot read."""
    texts = ["$x_{$ \\frac{1 $$", "<b>&amp;[red]", "a\u202eb\x1b[31m\n$\\badcommand$"]
    runs = [write_report_of(tmp_path / str(i), text, as_name(f"{i}{text}")) for i, text in enumerate(texts)]
    write_report(runs[0])
    write_comparison(runs, tmp_path / "out")
    assert list((tmp_path / "out" / "plots").glob("*.png"))


# The terminal


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_said_steers_no_terminal(text: str, tmp_path: Path, capsys) -> None:
    say(f"{text}")
    rows = [{f"p{text}": text, "chosen": text, "rejected": f"r{text}"}, {"prompt": text, "chosen": [text]}]
    path = write(tmp_path / f"{as_name(text)}.jsonl", *rows)
    run("data", "inspect", path)
    run("data", "convert", path, tmp_path / "out.jsonl")
    run("train", path)
    run("train", tmp_path / "no-recipe", f"{text}=1")
    said = capsys.readouterr()
    assert not CONTROLS.search(said.out + said.err)
    assert "Traceback" not in said.err


def test_markup_is_text(capsys) -> None:
    say("[bold red]loud[/] [/]")
    assert "[bold red]loud[/] [/]" in capsys.readouterr().err


def test_json_in_a_terminal_is_ascii(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_json({"text": "\x9b31m \u202e é"})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown) == {"text": "\x9b31m \u202e é"}


def test_a_run_with_hostile_names_and_texts(tmp_path: Path, capsys) -> None:
    world = make_world(tmp_path / "world")
    name = as_name("-rf $x_{$ <b>'\"& [red] \x1b[31m {{ 7*7 }} \u202e !!python/name:os.system")
    texts = [text[:60] for text in TEXTS if not re.search(r"[\ud800-\udfff]", text)]
    rows = [{"prompt": f"the {text}", "chosen": f" good {text}", "rejected": " bad"} for text in texts]
    data = write(world / f"{name}.jsonl", *rows)
    prompts = write(world / f"p{name}.jsonl", *({"prompt": row["prompt"]} for row in rows))
    path = recipe(tmp_path, world)
    content = yaml.safe_load(path.read_text())
    content["data"] = {"train": [str(data)], "max_length": None}
    content["train"]["output_dir"] = str(tmp_path / name)
    content["eval"] = {"prompts": str(prompts), "max_new_tokens": 4}
    content["report"] = {"enabled": True}
    path.write_text(yaml.safe_dump(content))
    assert run("train", path) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert not CONTROLS.search(re.sub("\r", "", said.out + said.err))
    folder = tmp_path / name
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["train"] == [str(data)]
    assert Recipe.load(folder / "recipe.yaml").data.train == [str(data)]
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    template = {tag for tag, *_ in Page(write_report(write_run(tmp_path / "plain"))).built}
    page = Page(folder / "report.html")
    assert {tag for tag, *_ in page.built} <= template
    assert "<script>alert(1)</script>" in page.text


# YAML and JSON


def nested(levels: int, opening: str) -> str:
    """Aliases of aliases: nine times as much on each level."""
    lines = [f"a0: &a0 {opening}"]
    for level in range(1, levels):
        inner = ", ".join(f"k{i}: *a{level - 1}" for i in range(9))
        lines.append(f"a{level}: &a{level} {{{inner}}}")
    return "\n".join(lines)


def merged(levels: int) -> str:
    """The same with merge keys."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{inner}]}}")
    return "\n".join(lines)


BROKEN_YAML = {
    "a: 1\nb: !!python/object/apply:os.mkdir [it-ran]": (2, "tag !!python/object/apply:os.mkdir"),
    "a: !!python/name:os.system": (1, "tag !!python/name:os.system"),
    "a:\n  - !!binary aGk=": (2, "tag !!binary"),
    "? !own x\n: 1": (1, "tag !own"),
    nested(12, "{x: 1}"): (6, "aliases make more than"),
    merged(12): (6, "aliases make more than"),
    "a: &a [1, *a]": (1, "an alias contains itself"),
    "a: &a {b: *a}": (1, "an alias contains itself"),
    "[" * 1_000: (None, "nested too deeply"),
    "a: 2024-13-45": (None, "month must be"),
    "a: " + "9" * 5000: (1, "a number of more than"),
    # To base 60, which takes the square of the length.
    "a: " + ":".join(["1"] * 200_000): (1, "a number of more than"),
    "a: \x1b[31m": (None, "not YAML"),
}


@pytest.mark.parametrize("text", BROKEN_YAML, ids=lambda text: visible(text[:24]))
def test_hostile_yaml(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    line, problem = BROKEN_YAML[text]
    began = time.monotonic()
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        parse_yaml(text, "file.yaml")
    assert (caught.value.file, caught.value.line) == ("file.yaml", line)
    (tmp_path / "r.yaml").write_text(text)
    assert run("train", "r.yaml") == 2
    if text.startswith("[["):
        return  # what PyYAML takes seconds for
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(text)
    assert run("report", folder) == 2
    if "\n" not in text and "\x1b" not in text:
        assert run("train", "r.yaml", f"train.{text.replace(': ', '=', 1)}") == 2
    assert time.monotonic() - began < 20
    assert not (tmp_path / "it-ran").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_aliases_that_are_few_are_read() -> None:
    assert parse_yaml("a: &a {x: 1e-3}\nb: [*a, *a]\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1e-3},
        "b": [{"x": 1e-3}] * 2,
        "c": {"x": 1e-3, "y": 2},
    }


@pytest.mark.parametrize("key", ["model.path", "train.output_dir", "data.train"])
@pytest.mark.parametrize("value", ['"a\\0b"', '"a\\uD800b"'])
def test_characters_that_no_file_name_holds(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: x}\ndata: {train: [y]}\n")
    with pytest.raises(InputError, match="no file name can hold") as caught:
        Recipe.load(path, [f"{key}={value}"])
    assert caught.value.field == key


@pytest.mark.parametrize("depth", [300, 900, 5_000, 100_000])
@pytest.mark.parametrize("field", ["prompt", "chosen", "tools", "extra"])
def test_json_that_is_nested_deeply(depth: int, field: str, tmp_path: Path, capsys) -> None:
    """Refused or read: never a crash of the interpreter, which would end this process."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c", field: "HERE"}
    for name, opening, closing in (("list", "[", "]"), ("object", '{"a":', "}")):
        text = json.dumps(row).replace('"HERE"', opening * depth + "1" + closing * depth)
        for suffix in ("jsonl", "json"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_text(f"{text}\n" if suffix == "jsonl" else f"[{text}]")
            assert run("data", "inspect", path) in (0, 2)
            assert run("data", "convert", path, tmp_path / "out.jsonl") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_files_of_a_run_that_are_nested_deeply(tmp_path: Path, capsys) -> None:
    for name in ("summary.json", "environment.json", "metrics.jsonl", "samples.jsonl"):
        folder = write_run(tmp_path / name)
        (folder / name).write_text("[" * 100_000 + "\n" + '{"step": 1}\n')
        assert run("report", folder) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_rows_that_no_column_can_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a\x00\ud800", "chosen": "b", "rejected": "c"})
    with pytest.raises(InputError):
        load_pairs(path)
