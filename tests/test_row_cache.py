"""Many rows lie in a file that the next loading finds: the same rows, the same account, or made anew."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import datasets
import pytest

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.pairs import (
    LoadOptions,
    arrow_rows,
    load_with_report,
    loading,
    read_pairs,
    register_format,
    row_cache,
)
from dpo_kit.pairs.formats import registry

DROP = LoadOptions(invalid="drop")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small batches, of which two are many."""
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrow_rows, "_BATCH_ROWS", 4)
    monkeypatch.setattr(row_cache, "BATCHES_IN_MEMORY", 1)
    return tmp_path / "cache" / "rows"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list:
    """The loadings that read rows."""
    calls: list = []
    usable_rows = loading.usable_rows
    monkeypatch.setattr(loading, "usable_rows", lambda *given: calls.append(given) or usable_rows(*given))
    return calls


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"p{i}", "chosen": "é" * i + "a", "rejected": "b", "margin": i} for i in range(count)]


def test_the_second_loading_reads_no_row(tmp_path: Path, cache: Path, reads: list) -> None:
    rows = pairs(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[7]["chosen"] = ""
    file = write(tmp_path / "data" / "a.jsonl", rows)
    (tmp_path / "data" / "notes.txt").touch()
    first, report = load_with_report(file.parent, DROP)
    assert len(reads) == 1
    assert (report.read, report.made, report.counts) == (10, 8, {"identical": 1, "empty_completion": 1})
    assert sorted(path.suffix for path in cache.iterdir()) == [".arrow", ".json"]
    again, report_again = load_with_report(file.parent, DROP)
    assert len(reads) == 1
    assert report_again == report
    assert report.ignored == [str(tmp_path / "data" / "notes.txt")]
    plain = read_pairs(file, invalid="drop")[0]
    assert first.to_list() == again.to_list() == plain
    assert first.column_names == ["prompt", "chosen", "rejected", "margin", "source"]


def test_the_second_loading_tells_again_what_was_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", [*pairs(9), {"prompt": "p", "chosen": "a", "rejected": "a"}])
    with caplog.at_level(logging.WARNING, "dpo_kit.pairs"):
        load_with_report(file, DROP)
        load_with_report(file, DROP)
    assert caplog.messages == [f"left out: 1 of 10 rows cannot be used: identical 1 ({file}:10)"] * 2


def test_few_rows_leave_no_file(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(4))
    assert load_with_report(file)[0].to_list() == read_pairs(file)[0]
    assert not cache.exists()


def test_what_changes_the_rows_is_loaded_anew(tmp_path: Path, cache: Path, reads: list) -> None:
    file = write(tmp_path / "a.jsonl", pairs(9))
    load_with_report(file)
    load_with_report(file, LoadOptions(min_margin=0.5))
    assert load_with_report([file, write(tmp_path / "b.jsonl", pairs(9))])[0]["source"][:][-1].endswith(
        "b.jsonl:9"
    )
    write(file, [*pairs(8), {"prompt": "p", "chosen": "new", "rejected": "b"}])
    assert load_with_report(file)[0][8]["chosen"] == "new"
    assert len(reads) == 4
    assert len(list(cache.glob("*.arrow"))) == 4


def test_unusable_rows_stop_the_loading_after_the_whole_pass(tmp_path: Path, cache: Path) -> None:
    rows = [*pairs(9), *[{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2]
    file = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.jsonl:10.* 2 of 11 rows cannot be used"):
            load_with_report(file)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "account", "list"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, cache: Path, reads: list, damage: str) -> None:
    file = write(tmp_path / "a.jsonl", pairs(30))
    expected, report = load_with_report(file)
    expected = expected.to_list()
    (rows,) = cache.glob("*.arrow")
    whole = rows.read_bytes()
    account = rows.with_suffix(".json")
    if damage == "account":
        account.write_bytes(account.read_bytes()[:-5])
    elif damage == "list":
        account.write_text("[]")
    else:
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        rows.unlink()
        rows.write_bytes({"cut": whole[:half], "bit": flipped, "empty": b""}[damage])
    with pytest.warns(DpoKitWarning, match="cache of rows is damaged"):
        again, report_again = load_with_report(file)
    assert (again.to_list(), report_again, len(reads)) == (expected, report, 2)
    assert rows.read_bytes() == whole
    load_with_report(file)
    assert len(reads) == 2


def test_formats_of_the_users_own_are_loaded_anew(
    tmp_path: Path, cache: Path, reads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_OWN", set())
    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))
    monkeypatch.setattr(loading, "FORMATS", registry.FORMATS)
    file = write(tmp_path / "a.jsonl", [{"q": f"p{i}", "good": "a", "bad": "b"} for i in range(9)])
    for answer in ("one", "two"):
        register_format(
            "mine",
            lambda row, answer=answer: {"prompt": row["q"], "chosen": answer, "rejected": row["bad"]},
            fields=("q", "good", "bad"),
        )
        assert set(load_with_report(file)[0]["chosen"]) == {answer}
    assert list(cache.glob("*.arrow")) == []
    standard = write(tmp_path / "b.jsonl", pairs(9))
    reads.clear()
    for _ in range(2):
        load_with_report(standard, LoadOptions(format="explicit_prompt"))
    assert len(reads) == 1


def test_a_mapping_is_part_of_the_key(tmp_path: Path, reads: list) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": f"p{i}", "good": "a", "bad": "b"} for i in range(9)])
    one = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    other = {"prompt": "q", "chosen": "bad", "rejected": "good"}
    for mapping, chosen in ((one, "a"), (other, "b"), (one, "a")):
        assert set(load_with_report(file, LoadOptions(mapping=mapping))[0]["chosen"]) == {chosen}
    assert len(reads) == 2


def test_extras_of_messages_that_come_late(tmp_path: Path) -> None:
    def row(i: int, **extras: str) -> dict:
        return {
            "prompt": [{"role": "user", "content": f"p{i}"}],
            "chosen": [{"role": "assistant", "content": "a", **extras}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }

    plain = write(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    late = write(
        tmp_path / "b.jsonl", [row(i, **{"reasoning_content": "why"} if i == 25 else {}) for i in range(30)]
    )
    assert load_with_report(plain)[0][25]["chosen"] == [{"role": "assistant", "content": "a"}]
    for _ in range(2):
        data = load_with_report(late)[0]
        assert data[0]["chosen"] == [{"role": "assistant", "content": "a", "extras": None}]
        (message,) = data[25]["chosen"]
        assert json.loads(message["extras"]) == {"reasoning_content": "why"}
        assert len(data) == 30


def test_a_loaded_file_can_be_used_by_processes(tmp_path: Path) -> None:
    data = load_with_report(write(tmp_path / "a.jsonl", pairs(30)))[0]
    assert data.cache_files
    doubled = data.map(lambda row: {"prompt": row["prompt"] * 2}, num_proc=2)
    assert doubled["prompt"][:] == [f"p{i}p{i}" for i in range(30)]


def _load(file: str) -> list[dict]:
    datasets.disable_progress_bars()
    return load_with_report(file)[0].to_list()


def test_processes_may_load_at_once(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(200))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        loaded = pool.map(_load, [str(file)] * 8)
    assert all(rows == read_pairs(file)[0] for rows in loaded)
    assert sorted(path.suffix for path in cache.iterdir()) == [".arrow", ".json"]
