"""A shape of the user's own, said by a mapping: canonical field -> path into the row (see `paths`).

    {"prompt": "question.text", "completions": "answers[*].text", "scores": "answers[*].votes"}
    {"prompt": "q", "first": "a", "second": "b", "preference": "winner",
     "values": {"first": ["A"], "second": ["B"], "tie": ["both", None]}}

The fields of one of `SHAPES`, and of those that any row of its kind may have. `prompt` is left out where the
replies are whole conversations. Messages may be {role, content} or {from, value}. Nothing is taken from a row
but what the mapping names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.formats.paths import ABSENT, Path, parsed_path
from dpo_kit.pairs.formats.ranked import parallel
from dpo_kit.pairs.formats.registry import Format, Row
from dpo_kit.pairs.formats.turns import as_messages, with_system
from dpo_kit.pairs.formats.values import label, number
from dpo_kit.pairs.kinds import LISTS, PAIRS, SCORED, UNPAIRED, Kind
from dpo_kit.pairs.schema import SCORES, BadRow, UnusablePair, kind_of

SHAPES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (PAIRS, ("chosen", "rejected")),
    (PAIRS, ("first", "second", "preference")),
    (UNPAIRED, ("completion", "label")),
    (LISTS, ("completions", "scores")),
    (LISTS, ("completions", "ranks")),
    (SCORED, ("completion", "score")),
)
# What the values of a verdict may mean, and what that is in a canonical row.
VERDICTS: dict[str, dict[str, Any]] = {
    "preference": {"first": 1.0, "second": 0.0, "tie": 0.5},
    "label": {"good": True, "bad": False},
}
_NUMBERS = ("margin", "weight", *SCORES)


def mapping_format(mapping: Mapping[str, Any]) -> Format:
    """The format that a mapping says.

    `values` says which values of `preference` mean `first`, `second` and `tie`, or which of `label` mean
    `good` and `bad`; they are compared strictly, by JSON type and value. Without it `preference` is a number
    from 0 to 1, the share that is for the first, and `label` is true or false.

    Raises `InputError` for unknown fields, an incomplete set of them, and what is no path.
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise InputError(
            f"expected field: path, found {kind_of(mapping)}",
            field="mapping",
            mend=f"Give {_sets_in_words()}",
        )
    kind, required = _shape(mapping)
    paths = {name: parsed_path(text, f"mapping.{name}") for name, text in mapping.items() if name != "values"}
    verdicts = _verdicts(mapping.get("values"), required)
    names = {name: path.text for name, path in paths.items()}
    if "first" in names:
        names |= {"chosen": names["first"], "rejected": names["second"]}
    return Format(
        "mapping",
        "a mapping: " + ", ".join(f"{name}={path}" for name, path in mapping.items() if name != "values"),
        (),
        _converter(paths, verdicts),
        optional=tuple(path.column for path in paths.values()),
        names=names,
        kind=kind,
        takes_common=False,
    )


def _shape(mapping: Mapping[str, Any]) -> tuple[Kind, tuple[str, ...]]:
    """The one of `SHAPES` whose fields are all mapped; all that is mapped belongs to it."""
    known = dict.fromkeys(name for kind, required in SHAPES for name in _allowed(kind, required))
    for name in mapping:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise InputError(
                f"the mapping has an unknown field '{name}'",
                field="mapping",
                mend=f"{hint}Known: {', '.join(known)}",
            )
    kind, required = max(SHAPES, key=lambda shape: _nearness(mapping, shape[1]))
    absent = [name for name in required if name not in mapping]
    if absent:
        raise InputError(
            f"the mapping lacks {' and '.join(repr(name) for name in absent)}",
            field="mapping",
            mend=f"Give {_sets_in_words()}",
        )
    foreign = [name for name in mapping if name not in _allowed(kind, required)]
    if foreign:
        raise InputError(
            f"the mapping has '{foreign[0]}', which has no meaning beside "
            f"{' and '.join(repr(name) for name in required)}",
            field="mapping",
            mend=f"Give {_sets_in_words()}",
        )
    return kind, required


def _nearness(mapping: Mapping[str, Any], required: tuple[str, ...]) -> float:
    """Larger, the nearer to a complete set; complete ones before all others."""
    there = sum(name in mapping for name in required)
    return there / len(required) + (there == len(required)) * len(required)


def _allowed(kind: Kind, required: tuple[str, ...]) -> tuple[str, ...]:
    values = ("values",) if any(name in VERDICTS for name in required) else ()
    scores = SCORES if required[0] == "chosen" else ()
    return ("prompt", *required, *values, "system", *kind.extras, *scores)


def _sets_in_words() -> str:
    sets = [", ".join(("prompt", *required)) for _, required in SHAPES]
    return (
        f"{'; or '.join(sets)}. Beside them: system, weight, margin, prompt_id, tools, chat_template_kwargs"
    )


def _verdicts(values: Any, required: tuple[str, ...]) -> dict[tuple[str, Any], Any] | None:
    """What each value of the verdict means; None where `values` does not say."""
    if values is None:
        return None
    verdict = next(name for name in required if name in VERDICTS)
    meanings = VERDICTS[verdict]
    if not isinstance(values, Mapping):
        raise InputError(
            f"expected {' and '.join(meanings)}, found {kind_of(values)}", field="mapping.values"
        )
    for meaning in values:
        if meaning not in meanings:
            raise InputError(
                f"a value of '{verdict}' cannot mean '{meaning}'",
                field="mapping.values",
                mend=f"Known: {', '.join(meanings)}",
            )
    needed = [meaning for meaning in meanings if meaning != "tie" and meaning not in values]
    if needed:
        raise InputError(f"it is not said which values mean '{needed[0]}'", field="mapping.values")
    found: dict[tuple[str, Any], Any] = {}
    for meaning, given in values.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            token = _token(value)
            if found.setdefault(token, meanings[meaning]) != meanings[meaning]:
                raise InputError(f"{value!r} has two meanings", field="mapping.values")
    return found


def _token(value: Any) -> tuple[str, Any]:
    """A value so that equal ones are of the same JSON type: true is not 1, and 1 is not "1"."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int | float):
        return "number", value
    return ("text", value) if isinstance(value, str) else ("other", None if value is None else repr(value))


def _converter(
    paths: Mapping[str, Path], verdicts: dict[tuple[str, Any], Any] | None
) -> Callable[[Row], Row | list[Row | UnusablePair]]:
    at = {name: path.text for name, path in paths.items()}
    at |= {"chosen": at["first"], "rejected": at["second"]} if "first" in at else {}

    def convert(row: Row) -> Row | list[Row | UnusablePair]:
        found = {name: path.of(row) for name, path in paths.items()}
        part = {name: value for name, value in found.items() if value is not ABSENT}
        for name in VERDICTS:
            if name in part:
                part[name] = _meaning(part[name], verdicts, name, at[name])
        for name in ("score", *_NUMBERS):
            if name in part:
                part[name] = number(part[name], at[name])
        if "first" in part:
            part["chosen"], part["rejected"] = part.pop("first"), part.pop("second")
        for name in ("prompt", "chosen", "rejected", "completion"):
            if name in part:
                part[name] = as_messages(part[name], at[name])
        if "system" in paths:
            part = with_system(part, part.pop("system", None), at["system"])
        if "completions" not in part:
            return part
        by = "scores" if "scores" in part else "ranks"
        replies, judgements = part.pop("completions"), part.pop(by, None)
        made = parallel(part.get("prompt"), replies, judgements, at["completions"], at[by], by)
        return [each if isinstance(each, UnusablePair) else {**each, **part} for each in made]

    return convert


def _meaning(value: Any, verdicts: dict[tuple[str, Any], Any] | None, name: str, field: str) -> Any:
    if verdicts is not None:
        token = _token(value)
        if token not in verdicts:
            known = ", ".join(repr(each) for _, each in verdicts)
            raise BadRow(
                f"mapping.values does not say what {value!r} means", field=field, mend=f"It says: {known}"
            )
        return verdicts[token]
    if name == "label":
        return label(value, field)
    try:
        share = number(value, field)
    except BadRow:
        share = None
    if share is None or not 0 <= share <= 1:
        found = str(value) if isinstance(value, int | float) else kind_of(value)
        raise BadRow(
            f"expected a number from 0 to 1, the share that is for the first, found {found}",
            field=field,
            mend="Say in mapping.values which values mean first, second and tie",
        )
    return share
