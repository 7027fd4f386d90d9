"""Tables of losses, shapes of data and what goes with what -> pages, between marks (`make docs`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dpo_kit.losses.table import markdown as objectives
from dpo_kit.matrix import markdown as matrix
from dpo_kit.pairs.formats.table import markdown as formats

ROOT = Path(__file__).parent.parent
TABLES = {
    "objectives": (ROOT / "README.md", objectives),
    "formats": (ROOT / "docs" / "data.md", formats),
    "matrix": (ROOT / "docs" / "matrix.md", matrix),
}


def with_table(text: str, name: str, markdown: Callable[[], str]) -> str:
    """The page with today's table between its marks."""
    begin, end = f"<!-- written by make docs: {name} -->", f"<!-- end of {name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page has no lines {begin} and {end}")
    return f"{before}{begin}\n\n{markdown()}\n\n{end}{after}"


if __name__ == "__main__":
    for name, (page, markdown) in TABLES.items():
        written = page.with_suffix(".writing")
        written.write_text(with_table(page.read_text(encoding="utf-8"), name, markdown), encoding="utf-8")
        os.replace(written, page)
