"""A YAML file as nested dictionaries, with the line of every key; knows nothing of what a recipe may say.

It may be somebody else's: no tag makes anything but plain values, and aliases cannot make it explode.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.errors import InputError
from dpo_kit.shown_text import holds_secret

# Values of a file with its aliases written out, and its characters. A recipe has hundreds, and thousands.
_MOST_VALUES = 100_000
_MOST_CHARACTERS = 1 << 20
_LONGEST_NUMBER = 1000
# Of a plain value without a tag; !!python/object and its kind are none of these.
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)


class _Loader(yaml.SafeLoader):
    """YAML with the floats that people write (1e-6), and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int | None]]:
    """A YAML file's content, and the line of each dotted key.

    Raises:
        InputError: as `parse_yaml`; or no such file, a key that stands twice, or no mapping at the top.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"the recipe cannot be read: {getattr(error, 'strerror', None) or error}", file=path
        ) from None
    lines: dict[str, int | None] = {}
    content = parse_yaml(text, path, lines)
    if not isinstance(content, dict):
        raise InputError("a recipe is a mapping of sections", file=path, mend="See recipes/ for examples.")
    return content, lines


def parse_yaml(text: str, file: str | Path | None = None, lines: dict[str, int | None] | None = None) -> Any:
    """The plain values that a YAML text says.

    Args:
        text: of one document.
        file: named in errors.
        lines: gets the line of each dotted key, and a key that stands twice is refused; None: neither.

    Raises:
        InputError: no YAML, a tag, or aliases that contain themselves or stand for too much.
    """
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"the YAML has more than {_MOST_CHARACTERS:,} characters", file=file)
    try:
        node = yaml.compose(text, _Loader)
        if node is not None:
            _values_of(node, {}, file)
            if lines is not None:
                _collect_lines(node, "", lines, file)
        # A SafeLoader, which makes plain values only.
        return yaml.load(text, _Loader)  # nosec B506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = mark.line + 1 if mark else None
        raise InputError(f"this is not YAML: {problem}", file=file, line=line) from None
    except RecursionError:
        raise InputError("the YAML is nested too deeply to be read", file=file) from None
    except ValueError as error:
        # A date that there is not, an integer of thousands of digits.
        raise InputError(f"the YAML cannot be read: {error}", file=file) from None


def _values_of(node: yaml.Node, known: dict[int, int], file: str | Path | None) -> int:
    """How many values a node stands for, with its aliases written out; 0 in `known` while it is counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise _refused("an alias contains itself", node, file)
        return known[id(node)]
    if node.tag not in _TAGS:
        # PyYAML has the tag of the specification in its long form.
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _refused(f"the tag {tag} is not read", node, file, "Write the value plainly, without a tag.")
    if node.tag.endswith((":int", ":float")) and len(node.value) > _LONGEST_NUMBER:
        # 1:1:1:... is a number to base 60, and takes the square of its length.
        raise _refused(f"a number of more than {_LONGEST_NUMBER} characters", node, file)
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    count = 1 + sum(_values_of(part, known, file) for part in inner)
    if count > _MOST_VALUES:
        raise _refused(f"aliases make more than {_MOST_VALUES:,} values of this", node, file)
    known[id(node)] = count
    return count


def _refused(problem: str, node: yaml.Node, file: str | Path | None, mend: str | None = None) -> InputError:
    return InputError(problem, file=file, line=node.start_mark.line + 1, mend=mend)


def _collect_lines(
    node: yaml.Node | None, prefix: str, lines: dict[str, int | None], file: str | Path | None
) -> None:
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


def check_texts(value: Any, key: str = "") -> None:
    """Refuse secrets, and characters that no file name can hold, in every text of nested values.

    Raises:
        InputError: with the dotted key.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            check_texts(str(name), key)
            check_texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            check_texts(inner, key)
    elif isinstance(value, str):
        if holds_secret(value):
            raise InputError(
                "this holds a key or a password, and recipes are copied into run folders",
                field=key,
                mend="Keep it in the environment ($HF_TOKEN, $OPENAI_API_KEY).",
            )
        try:
            ends_early = b"\0" in os.fsencode(value)
        except UnicodeEncodeError:
            ends_early = True
        if ends_early:
            raise InputError("there is a character in it that no file name can hold", field=key)


def apply_override(content: dict[str, Any], override: str) -> str:
    """Set `key.path=value` in nested dictionaries; returns the dotted key."""
    key, sign, value = override.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise InputError(f"'{override}' is not key.path=value", mend="For example train.max_steps=10")
    try:
        parsed = parse_yaml(value)
    except InputError as error:
        raise InputError(f"the value is not YAML: {error.problem}", field=key, mend=error.mend) from None
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
