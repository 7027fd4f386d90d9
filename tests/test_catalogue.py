"""The catalogue of public sets, and how its names and the folders and files of hub sets are sources."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from dpo_kit.errors import InputError
from dpo_kit.pairs import read_pairs
from dpo_kit.pairs.catalogue import CATALOGUE, PublicSet, find
from dpo_kit.pairs.formats import FORMATS
from dpo_kit.pairs.sources import find_sources
from tests.pair_files import error_of, write

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-rlhf"


def names(*sources: str | Path) -> list[str]:
    return [source.name for source in find_sources(list(sources))[0]]


def test_table_6_of_the_llama_2_paper() -> None:
    table = {entry.name: entry.comparisons for entry in CATALOGUE if entry.comparisons}
    assert table == {
        "hh-helpful": 122_387,
        "hh-harmless": 43_966,
        "openai-summarize": 176_625,
        "openai-webgpt": 13_333,
        "stackexchange": 1_038_480,
        "stanford-shp": 74_882,
        "synthetic-gptj": 33_139,
    }


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_an_entry_is_whole_and_its_name_is_a_source(entry: PublicSet) -> None:
    assert FORMATS[entry.format].kind.name == entry.kind
    assert all((entry.licence, entry.citation, entry.about))
    assert names(entry.name) == [entry.source]
    assert entry.source == f"hf://{entry.hub}" + (f"@{entry.split}" if entry.split else "")
    assert json.loads(json.dumps(entry.to_dict()))["source"] == entry.source
    assert [each.name for each in CATALOGUE].count(entry.name) == 1


def test_names_with_a_split(tmp_path: Path) -> None:
    assert names("HH-Harmless@test") == ["hf://Anthropic/hh-rlhf#harmless-base@test"]
    assert error_of("oasst1@train").exit_status == 2


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nectar"
    folder.mkdir()
    write(folder / "a.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert names("nectar") == ["nectar/a.jsonl"]
    with pytest.raises(InputError, match="no such file"):
        find_sources(Path("ultrafeedback"))


def test_misspelt_names_get_the_nearest() -> None:
    assert "Did you mean 'ultrafeedback' of the catalogue" in str(error_of("ultrafedback"))
    assert "Did you mean 'hh-harmless' of the catalogue" in str(error_of("hh-harmles@test"))
    assert "catalogue" not in str(error_of("no/such/file.jsonl"))
    assert find("Nectar").name == "nectar"
    with pytest.raises(InputError, match="Did you mean 'helpsteer2'"):
        find("helpster2")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out as Anthropic/hh-rlhf is."""
    for part, word in (("harmless-base", "No"), ("helpful-base", "Yes")):
        (tmp_path / "hh" / part).mkdir(parents=True)
        for split, rows in (("train", 3), ("test", 2)):
            with gzip.open(tmp_path / "hh" / part / f"{split}.jsonl.gz", "wt", encoding="utf-8") as out:
                for i in range(rows):
                    sides = [f"\n\nHuman: {i}?\n\nAssistant: {word} {side}" for side in ("a", "b")]
                    out.write(json.dumps({"chosen": sides[0], "rejected": sides[1]}) + "\n")
    return tmp_path / "hh"


@pytest.mark.parametrize(
    ("part", "split", "rows", "word"),
    [("harmless-base", "test", 2, " No a"), ("helpful-base", "train", 3, " Yes a")],
)
def test_one_folder_of_a_hub_set(hub: Path, part: str, split: str, rows: int, word: str) -> None:
    source = f"hf://{hub}#{part}@{split}"
    pairs, report = read_pairs(source)
    assert [pair["chosen"] for pair in pairs] == [word] * rows
    assert (pairs[0]["source"], report.sources[0].format) == (f"{source}:row 1", "hh")


def test_one_file_of_a_hub_set_is_read_as_files_are(hub: Path) -> None:
    (pairs, _) = read_pairs(f"hf://{hub}#helpful-base/test.jsonl.gz")
    assert [pair["chosen"] for pair in pairs] == [" Yes a"] * 2
    assert pairs[1]["source"] == f"{hub}/helpful-base/test.jsonl.gz:2"
    assert "holds: test.jsonl.gz, train.jsonl.gz" in str(error_of(f"hf://{hub}#helpful-base/dev.jsonl.gz"))
    assert "Write hf://a/b#c.jsonl" in str(error_of("hf://a/b/config#c.jsonl"))
    assert "the split is not given" in str(error_of(f"hf://{hub}#helpful-base"))
    assert "cannot be loaded" in str(error_of(f"hf://{hub}#no-such-folder@train"))


def test_a_set_with_a_loading_script_says_where_its_rows_are(hub: Path) -> None:
    (hub / "hh.py").write_text("raise SystemExit\n")
    assert "refs/convert/parquet" in str(error_of(f"hf://{hub}@train"))


@pytest.mark.skipif(not HH.is_dir(), reason="the real data of ../shared/data is not here")
def test_the_real_folder_as_a_hub_set(tmp_path: Path) -> None:
    shutil.copytree(HH, tmp_path / "hh", copy_function=shutil.copyfile)
    found = read_pairs(f"hf://{tmp_path}/hh#harmless-base@test", invalid="drop")[0]
    known = read_pairs(HH / "harmless-base" / "test.jsonl.gz", invalid="drop")[0]
    assert [pair["chosen"] for pair in found] == [pair["chosen"] for pair in known]
    assert len(found) == 2303
