"""Rewards of replies: a Python function of the user's own, a classifier, or a reward model trained here.

All have one form, so that whatever asks for a reward takes any of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError

Reward = Callable[[Sequence[Any], Sequence[str]], list[float]]
"""(prompts, each text or a list of messages; their replies) -> a finite number for each; higher is better."""


def load_reward(spec: str, *, field: str = "eval.reward") -> Reward:
    """What a recipe or the command line names.

    Args:
        spec: one of

            - `classifier:MODEL[@LABEL]`, a sequence classifier of transformers, folder or hub id: the
              log-odds of the label (by itself the one called positive) for text;
            - `model:FOLDER`, a reward model that dpo_kit trained;
            - `FILE.py:FUNCTION`, a function from text to a number. The file is run: name only code that you
              trust. Where its name begins as one of the others do, write ./ before it.

            Text is prompt and reply; the reply alone where the prompt is messages.
        field: named in errors.

    Raises:
        InputError: what is named is not there or does not load. The reward itself raises InputError where
            it comes to something other than a finite number, or where its function fails.
    """
    for prefix, load in _KINDS.items():
        if spec.startswith(prefix):
            return CheckedReward(load(spec.removeprefix(prefix), field), spec, field)
    return CheckedReward(_load_function(spec, field), spec, field)


class CheckedReward:
    """A reward whose values are finite numbers, or it raises InputError.

    Attributes:
        inner: the reward that is asked. Of a number it may give any kind: numpy's, a tensor of no dimension.
        spec: what names it.
    """

    def __init__(self, inner: Callable[[Sequence[Any], Sequence[str]], Sequence[Any]], spec: str, field: str):
        self.inner, self.spec, self._field = inner, spec, field

    def __call__(self, prompts: Sequence[Any], replies: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return [self._number(value, i) for i, value in enumerate(self.inner(prompts, replies), start=1)]

    def _number(self, value: Any, place: int) -> float:
        given = value
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        # numpy's booleans are no Real; Python's are.
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            problem = f"the reward '{self.spec}' gave {given!r} to reply {place} and not a finite number"
            raise InputError(problem, field=self._field)
        return float(value)


def text_of(prompt: Any, reply: str) -> str:
    """What a reward of text is given: prompt and reply, or the reply alone after messages."""
    return prompt + reply if isinstance(prompt, str) else reply


def _load_classifier(name: str, field: str) -> Reward:
    from dpo_kit.evaluation.classifiers import load_classifier

    scores = load_classifier(name, field=field)
    return lambda prompts, replies: scores([text_of(p, r) for p, r in zip(prompts, replies, strict=True)])


def _load_model(folder: str, field: str) -> Reward:
    from dpo_kit.evaluation.reward_models import load_learned_reward

    return load_learned_reward(folder, field=field)


_KINDS: dict[str, Callable[[str, str], Reward]] = {"classifier:": _load_classifier, "model:": _load_model}


def _load_function(spec: str, field: str) -> Callable[[Sequence[Any], Sequence[str]], list[Any]]:
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise InputError(
            f"'{spec}' is not FILE.py:FUNCTION, classifier:MODEL[@LABEL] or model:FOLDER", field=field
        )
    path = Path(file)
    if not path.is_file():
        raise InputError("no such file", file=path, field=field)
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError("this is not a Python file", file=path, field=field)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"the file does not run: {error!r}", file=path, field=field) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"the file has no function '{name}'", file=path, field=field)

    def reward(prompts: Sequence[Any], replies: Sequence[str]) -> list[Any]:
        values = []
        for place, (prompt, reply) in enumerate(zip(prompts, replies, strict=True), start=1):
            try:
                values.append(function(text_of(prompt, reply)))
            except Exception as error:
                problem = f"'{name}' fails at reply {place}: {error!r}"
                raise InputError(problem, file=path, field=field) from error
        return values

    return reward
