"""A YAML file as nested dictionaries, with the line of every key; knows nothing of what a recipe may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML with the floats that people write (1e-6), and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int | None]]:
    """A YAML file's content, and the line of each dotted key.

    Raises:
        InputError: no such file, no YAML, a key that stands twice, or no mapping at the top.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the recipe cannot be read: {getattr(error, 'strerror', None) or error}", file=path
        ) from None
    lines: dict[str, int | None] = {}
    try:
        node = yaml.compose(text, _Loader)
        _collect_lines(node, "", lines, str(path))
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = mark.line + 1 if mark else None
        raise InputError(f"this is not YAML: {problem}", file=path, line=line) from None
    if not isinstance(content, dict):
        raise InputError("a recipe is a mapping of sections", file=path, mend="See recipes/ for examples.")
    return content, lines


def _collect_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int | None], file: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise InputError(
                f"the key stands twice, first in line {lines[name]}", file=file, line=line, field=name
            )
        lines[name] = line
        _collect_lines(value, f"{name}.", lines, file)


def apply_override(content: dict[str, Any], override: str) -> str:
    """Set `key.path=value` in nested dictionaries; returns the dotted key."""
    key, sign, value = override.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise InputError(f"'{override}' is not key.path=value", mend="For example train.max_steps=10")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"the value is not YAML: {error}", field=key) from None
    set_key(content, key, parsed)
    return key


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries.

    Raises:
        InputError: something on the way to it is no section.
    """
    *sections, last = key.split(".")
    place = content
    for part in sections:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise InputError(f"'{part}' is not a section", field=key)
    place[last] = value
