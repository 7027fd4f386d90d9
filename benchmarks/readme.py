"""The tables and pictures of a benchmark's page -> the project's README, unedited, between two marks."""

from __future__ import annotations

import re
from pathlib import Path

from runner import HERE, write_whole

README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by make bench -->", "<!-- end of what make bench wrote -->"


def embed(page: Path, readme: Path = README) -> None:
    """Replace what stands between the marks by the page without its title and details.

    Raises:
        ValueError: the README has no such marks.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {BEGIN} and {END}")
    results = page.parent.relative_to(readme.parent)
    shown = page.read_text(encoding="utf-8").partition("\n## Details")[0].partition("\n")[2].strip()
    shown = re.sub(r"(!\[[^]]*\]\()", rf"\g<1>{results.as_posix()}/", shown)
    write_whole(readme, f"{before}{BEGIN}\n{shown}\n{END}{after}")
