"""The registered shapes as a table: what each is called, what it looks like, and what it is of."""

from __future__ import annotations

from typing import Any

from dpo_kit.pairs.formats.registry import FORMATS, Format

_KINDS = {
    "pairs": "a pair",
    "unpaired": "a labelled reply",
    "lists": "a ranked list",
    "scored": "a scored reply",
}
_COLUMNS = ("format", "a row is", "fields", "what it is", "judgements")


def shapes() -> list[dict[str, Any]]:
    """A dict for each registered shape, in the order of the registry."""
    return [_shape(form) for form in FORMATS.values()]


def markdown() -> str:
    """The table as docs/data.md has it."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for shape in shapes():
        fields = ", ".join(f"`{name}`" for name in shape["fields"])
        judgements = ", ".join(f"`{name}`" for name in shape["judgements"])
        rows.append(
            (f"`{shape['name']}`", _KINDS[shape["kind"]], fields, _cell(shape["about"]), judgements or "-")
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shape(form: Format) -> dict[str, Any]:
    return {
        "name": form.name,
        "about": form.about,
        "kind": form.kind.name,
        "fields": list(form.fields),
        "optional": list(form.optional),
        "judgements": list(form.judgements),
    }


def _cell(text: str) -> str:
    """Text that ends no cell, and that is no HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
