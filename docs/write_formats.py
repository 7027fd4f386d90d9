"""The table of registered shapes of data -> docs/data.md, between two marks (`make docs`)."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_kit.pairs.formats.table import markdown

PAGE = Path(__file__).parent / "data.md"
BEGIN, END = "<!-- written by make docs: formats -->", "<!-- end of formats -->"


def with_table(text: str) -> str:
    """The page with today's table in its place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    written = PAGE.with_suffix(".writing")
    written.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(written, PAGE)
