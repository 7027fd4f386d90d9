"""What several commands take from the command line: sources, --json, and how preference data is loaded."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from dpo_kit.errors import InputError
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.shown_text import visible, without_secrets

Sources = Annotated[
    list[str], typer.Argument(help="Files, folders, globs, hf://owner/name@split, or names of `data list`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


# What the parts of the package call what an option of the command line sets.
_OPTIONS = {
    "tokenizer": "--tokenizer",
    "model.tokenizer": "--tokenizer",
    "model": "--model",
    "model.path": "--model",
    "model.config": "--model",
    "data.max_length": "--max-length",
    "data.overlong": "--overlong",
    "batch_size": "--batch-size",
}


@contextlib.contextmanager
def naming_options(own: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within it, an `InputError` names the option of the command line in place of a recipe's field.

    `own` are fields that the command calls otherwise than others do, or has alone.
    """
    options = _OPTIONS | dict(own or {})
    try:
        yield
    except InputError as error:
        if error.field not in options:
            raise
        mend = error.mend
        for field in sorted(options, key=len, reverse=True):
            if mend and "." in field:
                mend = mend.replace(field, options[field])
        raise InputError(
            error.problem, file=error.file, line=error.line, field=options[error.field], mend=mend
        ) from error


def say(line: str) -> None:
    """A line to the user, beside what stdout is for; names and data in it cannot steer the terminal."""
    print(visible(without_secrets(line)), file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Nothing: a program reads the output."""


def print_json(value: Any) -> None:
    """Print one line of JSON, in ASCII in a terminal, and where stdout cannot take its characters."""
    text = json.dumps(value, ensure_ascii=sys.stdout.isatty())
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def take_any_text() -> None:
    """From now on, what stdout's encoding does not have is printed by its number."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def with_load_options(
    *, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command that takes `options: LoadOptions`: each of its fields becomes an option.

    `without` names fields that the command has no use for; `defaults` are the command's own. The mapping is
    put together from `--map field=path`, as often as given.
    """
    shown = [field for field in fields(LoadOptions) if field.name not in without]

    def made(given: dict[str, Any]) -> LoadOptions:
        return LoadOptions.of(**given | {"mapping": mapping_of(given["mapping"] or [])})

    return _made_of("options", [_parameter(field, defaults) for field in shown], made)


def _made_of(
    argument: str, options: Sequence[inspect.Parameter], made: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command: options in place of an argument, which is `made` of their values."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            values = {option.name: given.pop(option.name) for option in options}
            command(**given, **{argument: made(values)})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*(parameter for parameter in own if parameter.name != argument), *options]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del called.__wrapped__  # its annotations speak of the argument
        return called

    return decorate


def _parameter(field: Field[Any], defaults: dict[str, Any]) -> inspect.Parameter:
    kind = get_type_hints(LoadOptions)[field.name]
    default = defaults.get(field.name, field.default)
    assert default is not MISSING
    name = f"--{field.name.replace('_', '-')}"
    if field.name == "mapping":
        kind, name = list[str] | None, "--map"
    elif isinstance(default, str):
        kind = str  # of the words that it may be, LoadOptions names the nearest
    option = typer.Option(name, help=field.metadata.get("help"), rich_help_panel="How rows are loaded")
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def mapping_of(given: Sequence[str]) -> dict[str, Any] | None:
    """`["prompt=q.text", "values.first=A,B"]` -> `{"prompt": "q.text", "values": {"first": ["A", "B"]}}`.

    A value under `values` that reads as a JSON number, true, false or null means that as well as the text.
    Raises `InputError`.
    """
    mapping: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(
                f"expected field=path, found '{text}'", field="--map", mend="As in --map prompt=question.text"
            )
        outer, dot, inner = name.partition(".")
        place = mapping.setdefault(outer, {}) if dot else mapping
        key = inner if dot else outer
        if not isinstance(place, dict) or key in place:
            raise InputError(f"'{name}' is given twice", field="--map", mend="Give each field once")
        place[key] = [reading for part in value.split(",") for reading in _readings(part)] if dot else value
    return mapping or None


def _readings(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    return [text] if isinstance(value, list | dict | str) else [text, value]


# Options of a judge behind an endpoint: the field of `EndpointOptions` -> type, default, help.
_JUDGE: dict[str, tuple[Any, Any, str]] = {
    "model": (str | None, None, "Model's name, where the URL has none."),
    "prompt": (
        str,
        "helpfulness",
        "File with {prompt}, {first}, {second} (and {fence}); or helpfulness, summary.",
    ),
    "key_env": (
        str | None,
        None,
        "Variable with the key; default: $OPENAI_API_KEY for api.openai.com, none for others.",
    ),
    "concurrency": (int, 8, "Requests at a time."),
    "retries": (int, 6, "Of one request."),
    "timeout": (float, 120.0, "Seconds for one answer."),
    "setting": (
        list[str] | None,
        None,
        "name=JSON of a request, e.g. max_tokens=null max_completion_tokens=4000.",
    ),
}


def with_judge_options(command: Callable[..., None]) -> Callable[..., None]:
    """A decorator for a command that takes `endpoint: EndpointOptions`: its fields become --judge-options."""
    options = [
        inspect.Parameter(
            f"judge_{name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(help=words, rich_help_panel="Judges behind an endpoint")],
        )
        for name, (kind, default, words) in _JUDGE.items()
    ]

    def made(given: dict[str, Any]) -> Any:
        from dpo_kit.evaluation.judges import EndpointOptions

        fields = {name.removeprefix("judge_"): value for name, value in given.items()}
        return EndpointOptions(settings=_settings_of(fields.pop("setting") or []), **fields)

    return _made_of("endpoint", options, made)(command)


def _settings_of(given: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise InputError(
                f"expected name=JSON, found '{text}'", field="--judge-setting", mend="As in max_tokens=1000"
            )
    return settings
