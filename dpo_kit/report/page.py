"""Write report.html and plots/*.png for one run, or for several side by side.

A page is one file: pictures inside it as data URIs, styles inline, no script, nothing fetched. Prompts,
replies and recipes are hostile text: every value goes through jinja2's autoescape, none is marked safe.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.disk import writing
from dpo_kit.errors import InputError
from dpo_kit.report.pictures import Picture, comparison_pictures, pictures
from dpo_kit.report.run_folder import Run, read_run
from dpo_kit.report.story import remarks
from dpo_kit.report.summary import as_text, cards, number, other_figures, recipe_differences, summary_table
from dpo_kit.report.words import words_of

SAMPLES_SHOWN = 40


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn, ready for an <img>."""

    name: str
    title: str
    uri: str

    @classmethod
    def of(cls, name: str, title: str, png: bytes) -> Drawn:
        return cls(name, title, "data:image/png;base64," + base64.b64encode(png).decode())


def write_report(run: Path | str) -> Path:
    """Write RUN/report.html and RUN/plots/*.png, and return the page's path.

    Raises InputError where RUN is not a run folder, a file in it cannot be read, or the `report` extra
    is not installed.
    """
    require_extra()
    record = read_run(run)
    words = words_of([record])
    drawn = _draw(pictures(words), [record], [record.name])
    shown = record.samples[:SAMPLES_SHOWN]
    environment = record.environment
    html = render(
        "page.html.j2",
        title=record.name,
        cards=cards(record),
        remarks=remarks(record),
        notes=record.notes,
        examples=words.examples,
        pictures=drawn,
        sampled=any(picture.name == "samples" for picture in drawn),
        samples=[_sample_cells(sample) for sample in shown],
        sample_count=len(record.samples),
        summary=[*summary_table([record]), *other_figures([record])],
        recipe=record.recipe_text,
        environment=None if environment is None else _yaml(environment),
    )
    return write_page(record.path / "report.html", html, drawn)


def write_comparison(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write OUT/report.html and OUT/plots/*.png with the runs overlaid, and return the page's path.

    Runs of the same name are called by as much of their path as tells them apart. Raises InputError as
    write_report does, for fewer than two runs, for a run given twice, and where OUT is itself a run.
    """
    require_extra()
    from dpo_kit.report import plots

    out = Path(out)
    if len(runs) < 2:
        raise InputError("a comparison needs two runs", mend="Name two or more run folders.")
    if (out / "metrics.jsonl").exists():
        raise InputError(
            "is a run folder, whose own report would be overwritten", file=out, mend="Name another folder."
        )
    records = [read_run(run) for run in runs]
    labels = _labels(records)
    words = words_of(records)
    drawn = _draw(comparison_pictures(words), records, labels)
    html = render(
        "comparison.html.j2",
        title="Comparison of " + " and ".join([", ".join(labels[:-1]), labels[-1]]),
        runs=[
            {"label": label, "colour": colour, "remarks": remarks(record), "notes": record.notes}
            for label, colour, record in zip(labels, plots.run_colours(len(records)), records, strict=True)
        ],
        examples=words.examples,
        pictures=drawn,
        sampled=any(picture.name == "samples" for picture in drawn),
        summary=summary_table(records),
        others=other_figures(records),
        differences=recipe_differences(records),
    )
    return write_page(out / "report.html", html, drawn)


def require_extra() -> None:
    """Raises `InputError` where what pages are made with is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a report needs {error.name}, which is not installed", mend="pip install dpo-kit[report]"
        ) from error


def _labels(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the runs' paths that are all different."""
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError("the run is named twice", file=path, mend="Name each run once.")
    for depth in range(1, max(len(path.parts) for path in paths)):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _draw(wanted: Sequence[Picture], runs: Sequence[Run], labels: Sequence[str]) -> dict[Drawn, bytes]:
    from dpo_kit.report import plots

    drawn = {}
    for picture in wanted:
        png = plots.draw(picture, runs, labels)
        if png is not None:
            drawn[Drawn.of(picture.name, picture.title, png)] = png
    return drawn


def _sample_cells(sample: dict[str, Any]) -> dict[str, str]:
    cells = {key: _reply_text(sample.get(key)) for key in ("prompt", "before", "after")}
    for key in ("reward_before", "reward_after"):
        value = sample.get(key)
        cells[key] = number(value) if isinstance(value, int | float) else ""
    return cells


def _reply_text(value: Any) -> str:
    """A prompt or reply as text; messages as `role: content`, one after the other."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
        return "\n".join(f"{as_text(m['role'])}: {as_text(m['content'])}" for m in value)
    return as_text(value)


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def render(template: str, *, folders: Sequence[Path] = (), **values: Any) -> str:
    """The template, which may extend those of reports, filled in; `folders` hold templates of one's own."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(page: Path, html: str, drawn: dict[Drawn, bytes]) -> Path:
    """Write the page, and its pictures into `plots` beside it."""
    with writing("the report", page, mend="Make room, or write it elsewhere."):
        (page.parent / "plots").mkdir(parents=True, exist_ok=True)
        for picture, png in drawn.items():
            write_whole(page.parent / "plots" / f"{picture.name}.png", png)
        # JSON can hold half a surrogate pair, which UTF-8 cannot: it is shown by its number.
        write_whole(page, html.encode("utf-8", "backslashreplace"))
    return page


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
