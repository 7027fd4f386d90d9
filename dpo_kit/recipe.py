"""What a recipe may say: every key typed, documented and checked before anything runs.

A recipe is YAML with the sections below. An unknown key is refused with the nearest known one; each
error names file, line and key.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError

from dpo_kit.config import PreferenceConfig, bf16_is_fast
from dpo_kit.errors import InputError, nearest
from dpo_kit.losses import make_objective
from dpo_kit.pairs import LoadOptions
from dpo_kit.quantised import quantization_config, quantization_fields
from dpo_kit.recipe_sections import (
    BestOfNSection,
    CandidatesSection,
    DataSection,
    EvalSection,
    FrontierSection,
    ModelSection,
    PpoSection,
    ReferenceSection,
    ReportSection,
    RewardModelSection,
    Section,
    SftSection,
    with_base,
)
from dpo_kit.yaml_file import apply_override, check_texts, read_yaml


class Recipe(Section):
    """A whole run. See the sections; `loss` and `train` are checked by what they configure."""

    model: ModelSection
    reference: ReferenceSection = ReferenceSection()
    data: DataSection
    sft: SftSection | None = None
    candidates: CandidatesSection | None = None
    loss: Any = Field(default_factory=lambda: {"name": "dpo", "beta": 0.1})
    train: dict[str, Any] = Field(default_factory=dict)
    eval: EvalSection = EvalSection()
    reward_model: RewardModelSection = RewardModelSection()
    ppo: PpoSection = PpoSection()
    best_of_n: BestOfNSection = BestOfNSection()
    frontier: FrontierSection | None = None
    report: ReportSection = ReportSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe, apply `key.path=value` overrides, check all of it.

        Raises:
            InputError: naming the file, line and key, or the override.
        """
        content, lines = read_yaml(path)
        for override in overrides:
            key = apply_override(content, override)
            lines[key] = None
        return cls.check(content, str(path), lines)

    @classmethod
    def check(
        cls, content: dict[str, Any], file: str | None = None, lines: dict[str, int | None] | None = None
    ) -> Recipe:
        """A recipe from nested dictionaries; `lines` maps dotted keys to lines of the file."""
        lines = lines or {}
        try:
            check_texts(content)
            recipe = cls.model_validate(content)
            recipe = recipe.model_copy(update={"model": with_base(recipe.model, recipe.sft is not None)})
            _check_together(recipe)
            _check_reference(recipe)
            make_objective(recipe.loss)
            recipe.load_options()
            check_training_fields(recipe.train, "train")
            if recipe.sft is not None:
                check_training_fields(recipe.sft.train, "sft.train")
            check_training_fields(recipe.reward_model.train, "reward_model.train")
        except ValidationError as error:
            raise _first_error(error, file, lines) from None
        except InputError as error:
            key = (error.field or "").split(" ")[0]
            raise InputError(
                error.problem, file=file, line=_line(key, lines), field=error.field, mend=error.mend
            ) from None
        return recipe

    def load_options(self) -> LoadOptions:
        """How the data's rows are read, and what is made of them: what the loss learns from, if not said."""
        options = {field.name: getattr(self.data, field.name) for field in dataclasses.fields(LoadOptions)}
        wanted = {spec.shape for spec, _, _ in make_objective(self.loss).terms}
        if options["shape"] == "auto" and wanted == {"lists"}:
            options["shape"] = "lists"
        try:
            return LoadOptions(**options)
        except InputError as error:
            raise InputError(error.problem, field=f"data.{error.field}", mend=error.mend) from error

    def training_config(self, **changes: Any) -> PreferenceConfig:
        """The settings of the trainer."""
        fields = {
            "output_dir": "runs/my-run",
            "loss": self.loss,
            "reference_mode": self.reference.mode,
            "reference_cache_dir": self.reference.cache_dir,
            "reference_adapter": self.reference.adapter,
            "reference_update_every": self.reference.update_every,
            "reference_update_weight": self.reference.update_weight,
            "max_length": self.data.max_length,
            "overlong": self.data.overlong,
        }
        return make_training_config(fields | self.train | changes)

    def loading_options(self) -> dict[str, Any]:
        """How `load_model` and `load_reward_model` are to load the policy, beside its dtype and seed.

        Raises:
            InputError: see `dpo_kit.quantised.quantization_config`.
        """
        # Not of `training_config`: to make one takes the running trainer's accelerator away.
        fp16, section = bool(self.train.get("fp16")), self.model
        bf16 = bf16_is_fast() and not fp16 if (asked := self.train.get("bf16")) is None else asked
        compute = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
        quantization = quantization_config(section.quantization, compute or getattr(torch, section.dtype))
        device = torch.device("cpu") if self.train.get("use_cpu") else None
        trusted = section.trust_remote_code
        return {"quantization": quantization, "device": device, "trust_remote_code": trusted}

    def tokenizer_options(self) -> dict[str, Any]:
        """How `load_tokenizer` is to load the policy's: with code where it lies beside a trusted model."""
        return {"trust_remote_code": self.model.trust_remote_code and self.model.tokenizer is None}

    def resolved(self, config: PreferenceConfig) -> dict[str, Any]:
        """Every key with its value, defaults written out; what `check` takes."""
        content = self.model_dump()
        content["train"] = training_fields(config)
        return content


# Keys of PreferenceConfig that have a place of their own in a recipe.
_ELSEWHERE = {
    "loss": "loss",
    "reference_mode": "reference.mode",
    "reference_cache_dir": "reference.cache_dir",
    "reference_adapter": "reference.adapter",
    "reference_update_every": "reference.update_every",
    "reference_update_weight": "reference.update_weight",
    "max_length": "data.max_length",
    "overlong": "data.overlong",
}


# transformers' fields that hold a secret, such as hub_token.
_OF_TOKENS = "_token"


def make_training_config(fields: dict[str, Any]) -> PreferenceConfig:
    """PreferenceConfig from a recipe's fields; its own refusals become InputErrors."""
    try:
        return PreferenceConfig(**fields)
    except (ValueError, TypeError) as error:
        raise InputError(str(error).strip().splitlines()[0], field="train") from error


# What follows from batch_size and the number of ranks, on which a run may go on with another.
_OF_RANKS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def training_fields(config: PreferenceConfig) -> dict[str, Any]:
    """The fields of a configuration that a recipe's `train` may hold, as YAML can write them."""
    found = {}
    for field in dataclasses.fields(config):
        if field.name in _OF_RANKS:
            continue
        value = getattr(config, field.name)
        value = value.value if isinstance(value, enum.Enum) else value
        if field.name.endswith(_OF_TOKENS):
            # In a configuration made in Python there may be one, and recipes are written into run folders.
            value = None
        if field.init and field.name not in _ELSEWHERE and _is_plain(value):
            found[field.name] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def check_training_fields(fields: dict[str, Any], section: str) -> None:
    """Refuse keys that PreferenceConfig does not have, and values of another type."""
    hints = typing.get_type_hints(PreferenceConfig)
    known = {f.name: f.metadata.get("const") for f in dataclasses.fields(PreferenceConfig) if f.init}
    for key, value in fields.items():
        if key.endswith("_strategy") and value is False:
            fields[key] = value = "no"  # YAML reads a bare `no` as false
        if key in _ELSEWHERE:
            raise InputError(
                "this is not set here", field=f"{section}.{key}", mend=f"Set {_ELSEWHERE[key]} instead."
            )
        if key not in known:
            raise InputError("unknown key", field=f"{section}.{key}", mend=_nearest(key, set(known)))
        if key.endswith(_OF_TOKENS) and value is not None:
            raise InputError(
                "recipes are copied into run folders, and hold no token",
                field=f"{section}.{key}",
                mend="Set the environment variable HF_TOKEN.",
            )
        if value is True and known[key] is True:
            # As transformers takes it, whatever the hint says (fsdp).
            continue
        try:
            adapter = TypeAdapter(_without_enums(hints[key]))
        except PydanticUserError:
            # A class of transformers, which pydantic cannot judge.
            continue
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise InputError(f"{message}, got {value!r}", field=f"{section}.{key}") from None


def _without_enums(hint: Any) -> Any:
    """str | SomeEnum is written as a string in YAML."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [o for o in typing.get_args(hint) if not (isinstance(o, type) and issubclass(o, enum.Enum))]
        return typing.Union[tuple(options)] if options else str  # noqa: UP007
    return str if isinstance(hint, type) and issubclass(hint, enum.Enum) else hint


def _check_together(recipe: Recipe) -> None:
    model = recipe.model
    if (model.path is None) == (model.config is None):
        raise InputError(
            "give either model.path or model.config", field="model", mend="One of the two, not both."
        )
    if not recipe.data.train and recipe.candidates is None:
        raise InputError(
            "no training data", field="data.train", mend="Name a file, e.g. data.train=pairs.jsonl"
        )
    if recipe.candidates is not None:
        _check_candidates(recipe)
    has_tokenizer = model.path is not None or model.tokenizer is not None
    if recipe.sft is not None and has_tokenizer and recipe.sft.vocabulary != SftSection(corpus=[]).vocabulary:
        raise InputError(
            "a tokenizer is there, and none is learned on the corpus",
            field="sft.vocabulary",
            mend="Leave it out, or name neither model.path nor model.tokenizer.",
        )
    if model.config is not None and model.tokenizer is None and recipe.sft is None:
        raise InputError(
            "a model made from a configuration has no tokenizer beside it",
            field="model.tokenizer",
            mend="Name a tokenizer folder or hub id.",
        )
    adapted = any(value is not None for value in (model.lora, model.peft, model.adapter))
    if adapted and model.path is None and recipe.sft is None:
        raise InputError(
            "random weights are not adapted: they are not saved with the adapter, which would fit nothing",
            field="model.config",
            mend="Name a model.path, train the model first (sft), or train it whole.",
        )
    if model.quantization is not None:
        _check_quantization(recipe, adapted)


def _check_quantization(recipe: Recipe, adapted: bool) -> None:
    model = recipe.model
    assert model.quantization is not None
    quantization_fields(model.quantization)
    if not adapted:
        raise InputError(
            "quantised weights cannot be trained, and there is no adapter",
            field="model.quantization",
            mend="Add one, such as model.lora={r: 16, target_modules: all-linear}, or leave this out.",
        )


def _check_candidates(recipe: Recipe) -> None:
    assert recipe.candidates is not None
    _check_prefixes(recipe.candidates.prefix_tokens)
    for name in ("train", "eval"):
        if getattr(recipe.data, name):
            raise InputError(
                "the pairs are made from candidates",
                field=f"data.{name}",
                mend="Leave it out, or candidates.",
            )
    if recipe.candidates.reward is None and recipe.eval.reward is None:
        raise InputError(
            "nothing tells the better candidate",
            field="candidates.reward",
            mend="Name a reward there or in eval.reward, as FILE.py:FUNCTION.",
        )


def _check_prefixes(lengths: tuple[int, int] | None) -> None:
    if lengths is not None and not 1 <= lengths[0] <= lengths[1]:
        raise InputError(
            f"expected [least, most] tokens from 1, got {list(lengths)}",
            field="candidates.prefix_tokens",
            mend="As in [2, 8].",
        )


def _check_reference(recipe: Recipe) -> None:
    """Refuse what would be read and not used."""
    given, objective = recipe.reference, make_objective(recipe.loss)
    defaults = ReferenceSection()
    of_mode = {"adapter": "adapter", "update_every": "moving", "update_weight": "moving"}
    for name, mode in of_mode.items():
        if given.mode != mode and getattr(given, name) != getattr(defaults, name):
            raise InputError(
                f"it belongs to mode {mode}, and the mode is {given.mode}",
                field=f"reference.{name}",
                mend=f"Set reference.mode to {mode}, or leave it out.",
            )
    if given.path is not None and not objective.needs_reference:
        raise InputError(
            "the loss looks at no reference",
            field="reference.path",
            mend="Leave it out, or choose another loss.",
        )
    if given.mode not in ("auto", "none") and objective.needs_rewards:
        raise InputError(
            f"a reward model has no reference, and the mode is {given.mode}",
            field="reference.mode",
            mend="Set it to auto.",
        )


def _first_error(error: ValidationError, file: str | None, lines: dict[str, int | None]) -> InputError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts)
    mend = None
    problem = first["msg"]
    if first["type"] == "extra_forbidden":
        problem, mend = "unknown key", _nearest(parts[-1], _known_keys(parts[:-1]))
    elif first["type"] == "missing":
        problem = "this key is needed"
    elif "input" in first and not isinstance(first["input"], dict):
        problem = f"{problem}, got {first['input']!r}"
    return InputError(problem, file=file, line=_line(key, lines), field=key, mend=mend)


def _known_keys(path: list[str]) -> set[str]:
    section: Any = Recipe
    for part in path:
        hint = section.model_fields[part].annotation
        options = [
            o for o in (hint, *typing.get_args(hint)) if isinstance(o, type) and issubclass(o, Section)
        ]
        section = options[0]
    return set(section.model_fields)


def _line(key: str, lines: dict[str, int | None]) -> int | None:
    """The line of a key, or of the nearest section around it."""
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return None


def _nearest(key: str, known: set[str]) -> str:
    many = "See PreferenceConfig for its fields." if len(known) > 20 else None
    return nearest(key, sorted(known), many)
