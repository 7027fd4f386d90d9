"""The table of registered losses -> README.md, between two marks (`make docs`)."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_kit.losses.table import markdown

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- written by make docs: objectives -->", "<!-- end of objectives -->"


def with_table(text: str) -> str:
    """The README with today's table in its place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    written = README.with_suffix(".writing")
    written.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(written, README)
