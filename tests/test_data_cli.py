"""`dpo-kit data` from the command line: what is printed, what is written, and the exit status."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pair_files import write

from dpo_kit.audit.findings import SEVERITIES, Audit, Finding
from dpo_kit.audit.inspection import inspect_pairs
from dpo_kit.audit.reading import findings_of_reading
from dpo_kit.audit.show import objections, print_audit
from dpo_kit.cli import main
from dpo_kit.cli_options import mapping_of
from dpo_kit.errors import InputError
from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.formats.registry import FORMATS

ROWS = [{"prompt": f"Question {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(20)]
SAME = {"prompt": "x", "chosen": " same", "rejected": " same"}


def run(*arguments):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in ("data", *arguments)])
    return left.value.code or 0


def flat(text):
    """The text without the frames and line ends that a terminal's width decides on."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def odd(tmp_path):
    """20 pairs and two rows that cannot be used, lines 21 and 22."""
    return write(tmp_path / "odd.jsonl", *ROWS, SAME, {**SAME, "chosen": ""})


def test_inspect_says_what_it_read_and_what_it_left_out(odd, capsys):
    assert run("inspect", odd) == 0
    said = flat(capsys.readouterr().out)
    assert "explicit_prompt 22 20 20" in said
    assert "1 chosen and rejected are the same [identical]" in said
    assert "odd.jsonl:21" in said.replace(" ", "")
    assert "distinct prompts: 20" in said


def test_inspect_prints_one_json_object_and_keeps_its_keys(odd, capsys):
    assert run("inspect", odd, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"kind", "read", "kept", "made", "counts", "sources", "problems", "ignored", "statistics"} <= set(
        found
    )
    assert (found["read"], found["kept"], found["counts"]) == (
        22,
        20,
        {"identical": 1, "empty_completion": 1},
    )
    assert {"findings", "figures"} <= set(found)


def test_strict_is_exit_status_1_and_says_why_last(odd, tmp_path, capsys):
    assert run("inspect", odd, "--strict", "--json") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("strict: 2 rows cannot be used")
    json.loads(printed.out)
    clean = write(
        tmp_path / "clean.jsonl", *[{**row, "chosen": f" no, {i}!"} for i, row in enumerate(ROWS[:3])]
    )
    assert run("inspect", clean, "--strict", "--strict-level", "error") == 0
    assert run("inspect", clean, "--strict", "--strict-level", "bad") == 2
    assert "unknown level 'bad'" in capsys.readouterr().err


def test_held_out_data_are_accounted_for_and_objected_to(odd, tmp_path, capsys):
    clean = write(tmp_path / "clean.jsonl", *ROWS)
    held_out = write(tmp_path / "held.jsonl", {**ROWS[0], "prompt": "new"}, SAME, {**SAME, "chosen": ""})
    assert run("inspect", clean, "--eval", held_out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    held = found["held_out"]
    assert (held["kind"], held["read"], held["kept"]) == ("pairs", 3, 1)
    assert held["counts"] == {"identical": 1, "empty_completion": 1}
    assert held["sources"][0]["file"] == str(held_out)
    assert held["statistics"]["distinct_prompts"] == 1
    assert (found["read"], found["kept"]) == (20, 20)
    assert run("inspect", clean, "--eval", held_out) == 0
    said = flat(capsys.readouterr().out)
    assert "explicit_prompt 3 1 1" in said
    assert "[identical, held out]" in said
    assert run("inspect", clean, "--eval", held_out, "--strict", "--strict-level", "error") == 1
    assert "2 held-out rows cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", 0),
        ("--overlong", "nonsense"),
        ("--max-length", -5),
        ("--tokenizer", "./nowhere"),
        ("--model", "./nowhere"),
    ],
)
def test_a_wrong_option_is_exit_status_2_and_named_as_it_is_typed(odd, capsys, option, value):
    others = ["--tokenizer", "./nowhere"] if option == "--model" else []
    assert run("inspect", odd, option, value, *others) == 2
    said = flat(capsys.readouterr().err)
    assert f"field '{'--tokenizer' if others else option}'" in said
    assert "model.tokenizer" not in said


def test_out_on_a_file_is_refused_before_anything_is_read(odd, tmp_path, capsys):
    assert run("inspect", tmp_path / "not_there.jsonl", "--out", odd) == 2
    assert f"{odd}: field '--out': this is a file" in flat(capsys.readouterr().err)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_printed_whatever_files_are_called_and_stdout_can_take(tmp_path, encoding):
    name = os.fsdecode(b"caf\xc3\xa9-\xff.jsonl")
    file = write(tmp_path / name, *ROWS)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for form in (["--json"], []):
        done = subprocess.run(
            [sys.executable, "-m", "dpo_kit", "data", "inspect", file, *form],
            capture_output=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        if form:
            assert json.loads(done.stdout)["sources"][0]["file"] == str(file)


def test_a_long_look_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "a.jsonl", *ROWS * 10)
    monkeypatch.setattr("dpo_kit.audit.inspection._PULSE", 0.0)
    assert run("inspect", file) == 0
    assert "read 65 rows" in capsys.readouterr().err
    assert run("inspect", file, "--json") == 0
    assert "read" not in capsys.readouterr().err


def test_lost_columns_and_contradicting_scores_are_findings(tmp_path):
    rows = [{**row, "score_chosen": i % 2, "score_rejected": 1} for i, row in enumerate(ROWS[:4])]
    file = write(tmp_path / "a.jsonl", *rows)
    found = inspect_pairs(file)
    (margins,) = (finding for finding in found.findings if finding.name == "margin_not_positive")
    assert margins.severity == "warning"
    assert found.figures["margins"]["not_positive"] == margins.count == len(margins.places)
    account = SimpleNamespace(
        sources=[SimpleNamespace(file="a.jsonl", read=9, lost_columns={"context": 7})],
        remarks=["two shapes fit."],
        read=9,
    )
    lost, remark = findings_of_reading(account, held_out=False)
    assert (lost.name, lost.severity, lost.count, lost.of) == ("lost_columns", "warning", 7, 9)
    assert "'context' (7 rows)" in lost.sentence
    assert (remark.name, remark.severity, remark.sentence) == ("loading_remark", "warning", "two shapes fit.")


def test_strictness_has_two_levels():
    audit = Audit(findings=[Finding(f"a_{each}", each, 3, 9, "", "") for each in SEVERITIES])
    assert objections(audit) == ["error a_error (3)", "warning a_warning (3)"]
    assert objections(audit, "error") == ["error a_error (3)"]
    with pytest.raises(InputError, match="unknown level 'note'"):
        objections(audit, "note")


def test_a_finding_reads_as_severity_sentence_advice_and_first_places(capsys):
    places = tuple(f"a.jsonl:{line}" for line in range(1, 6))
    print_audit(
        Audit(
            findings=[
                Finding("odd_thing", "warning", 5, 9, "5 rows are [red]odd\x1b[2J.", "Mend them", places)
            ]
        )
    )
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "warning 5 rows are [red]odd\\x1b[2J. Mend them [odd_thing] a.jsonl:1, :2, :3, ..." in flat(said)


def test_a_bad_option_is_named_with_the_nearest(odd, capsys):
    assert run("inspect", odd, "--ties", "hallf") == 2
    assert "Did you mean 'half'?" in flat(capsys.readouterr().err)


def test_convert_takes_the_load_options_and_a_mapping(tmp_path, capsys):
    votes = write(
        tmp_path / "votes.jsonl",
        {"task": {"text": "p"}, "answers": ["a", "b"], "verdict": "B"},
        {"task": {"text": "q"}, "answers": ["a", "b"], "verdict": 0},
        {"task": {"text": "r"}, "answers": ["a", "b"], "verdict": "A"},
    )
    maps = ["prompt=task.text", "first=answers[0]", "second=answers[1]", "preference=verdict"]
    maps += ["values.first=A", "values.second=B", "values.tie=C,0"]
    options = [part for each in maps for part in ("--map", each)]
    assert run("convert", votes, tmp_path / "pairs.jsonl", *options, "--ties", "half") == 0
    made = [
        (row["prompt"], row["chosen"], row.get("weight")) for row in read_pairs(tmp_path / "pairs.jsonl")[0]
    ]
    assert made == [("p", "b", None), ("q", "a", 0.5), ("q", "b", 0.5), ("r", "a", None)]
    assert "wrote 4 rows" in capsys.readouterr().err


def test_convert_stops_at_unusable_rows_unless_told_to_drop_them(odd, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    assert run("convert", odd, out) == 2
    assert not out.exists()
    assert run("convert", odd, out, "--invalid", "drop", "--json") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 20
    assert len(read_pairs(out)[0]) == 20


def test_convert_takes_several_sources(tmp_path):
    first, second = (write(tmp_path / f"{i}.jsonl", ROWS[i]) for i in range(2))
    assert run("convert", first, second, tmp_path / "both.jsonl") == 0
    assert [row["prompt"] for row in read_pairs(tmp_path / "both.jsonl")[0]] == ["Question 0", "Question 1"]


def test_split_writes_two_files(tmp_path, capsys):
    source, train, held_out = (
        write(tmp_path / "in.jsonl", *ROWS),
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
    )
    assert run("split", source, "--train", train, "--eval", held_out, "--eval-prompts", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train"]["rows"], found["eval"]["rows"], found["eval"]["prompts"]) == (16, 4, 4)
    sides = [{row["prompt"] for row in read_pairs(path)[0]} for path in (train, held_out)]
    assert len(sides[0] | sides[1]) == 20
    again = tmp_path / "c.jsonl"
    arguments = ("--eval", again, "--eval-prompts", 4, "--seed", 5)
    assert run("split", source, "--train", tmp_path / "d.jsonl", *arguments) == 0
    assert {row["prompt"] for row in read_pairs(again)[0]} != sides[1]


def test_formats_tells_every_shape(capsys):
    assert run("formats", "--json") == 0
    found = {shape["name"]: shape for shape in json.loads(capsys.readouterr().out)["formats"]}
    assert found.keys() == FORMATS.keys()
    assert found["explicit_prompt"]["fields"] == ["prompt", "chosen", "rejected"]
    assert run("formats", "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(found)
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert run("formats") == 0
    assert "explicit_prompt" in capsys.readouterr().out


def test_list_tells_the_catalogue(capsys):
    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)["data_sets"]
    assert {entry["format"] for entry in found} <= FORMATS.keys()
    assert run("list") == 0
    said = capsys.readouterr().out
    assert all(entry["name"] in said for entry in found)


def test_what_map_gives():
    assert mapping_of([]) is None
    given = ["prompt=a.b[0]", "chosen=x=y", "values.first=A,1", "values.tie=null", "values.second=true"]
    values = {"first": ["A", "1", 1], "tie": ["null", None], "second": ["true", True]}
    assert mapping_of(given) == {"prompt": "a.b[0]", "chosen": "x=y", "values": values}
    for wrong, problem in ((["prompt"], "expected field=path"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(InputError, match=problem):
            mapping_of(wrong)
