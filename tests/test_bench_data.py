"""The benchmark of the data path, on a file of a few pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_small_run_writes_its_page(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--pairs", "300", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["first"]["pairs"] == found["second"]["pairs"] == 300
    assert found["first"]["kept"] > 290
    assert 0 < found["rate"]["characters"] < 10**6
    page = (tmp_path / "data.md").read_text()
    assert "300 pairs" in page
    assert "% of the tokenizer's own rate" in page


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from data_file import write_pairs\n"
        "for name, seed in (('a', 1), ('b', 1), ('c', 2)): write_pairs(Path(sys.argv[1]) / name, 50, seed)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=ROOT / "benchmarks")
    a, b, c = ((tmp_path / name).read_text(encoding="utf-8") for name in "abc")
    assert a == b != c
    rows = [json.loads(line) for line in a.splitlines()]
    assert len({row["chosen"] for row in rows}) > 45
