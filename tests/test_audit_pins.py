"""What `make lint` says of pip-audit's report: a service that is silent is no clean bill, nor a failure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / ".ci" / "audit_pins.py"
CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3", "4"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.fixture(scope="module")
def pins():
    spec = importlib.util.spec_from_file_location("audit_pins", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([CLEAN, UNKNOWN], 0, "1 of 2 packages judged, 0 vulnerable"),
        ([CLEAN, BAD], 1, "b 2: CVE-1, mended in 3, 4"),
        ([UNKNOWN, UNKNOWN], 0, "skipped, since the advisory service does not answer"),
        ([], 0, "skipped, since the advisory service does not answer"),
    ],
)
def test_verdict(packages, status, said, pins):
    found, lines = pins.verdict({"dependencies": packages, "fixes": []})
    assert found == status
    assert said in lines[-1]


def test_no_report(pins):
    assert pins.verdict(None)[0] == 0
