"""The tables and pictures of a comparison -> README.md, between two marks: `write_frontier.py [FOLDER]`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from dpo_kit.comparison.tables import markdown_tables

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "frontier"
BEGIN, END = "<!-- written by make frontier -->", "<!-- end of what make frontier wrote -->"


def with_comparison(text: str, folder: Path) -> str:
    """The page with a comparison's figures between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    shown = [f"![{name}](docs/frontier/{name}.png)" for name in ("frontier", "convergence")]
    parts = [shown[0], markdown_tables(folder), shown[1]]
    return before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after


def main(folder: Path) -> None:
    """Copy the pictures beside the docs and rewrite README.md."""
    page = ROOT / "README.md"
    written = page.with_suffix(".writing")
    written.write_text(with_comparison(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name in ("frontier.png", "convergence.png"):
        shutil.copyfile(folder / name, PICTURES / name)
    os.replace(written, page)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/frontier"))
