"""A reward given as a Python function in a file of the user's own."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from dpo_kit.errors import InputError

RewardFunction = Callable[[str], float]


def load_reward(spec: str) -> RewardFunction:
    """The function of `FILE.py:FUNCTION`, from text (prompt and reply) to a finite number.

    The file is run: name only code that you trust.

    Raises:
        InputError: the file or the function is not there, or the file does not run. The function itself
            raises InputError where it returns something other than a finite number.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise InputError(f"'{spec}' is not FILE.py:FUNCTION", field="eval.reward")
    path = Path(file)
    if not path.is_file():
        raise InputError("no such file", file=path, field="eval.reward")
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError("this is not a Python file", file=path, field="eval.reward")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"the file does not run: {error!r}", file=path, field="eval.reward") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"the file has no function '{name}'", file=path, field="eval.reward")

    def reward(text: str) -> float:
        value = function(text)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(
                f"'{name}' gave {value!r} and not a finite number", file=path, field="eval.reward"
            )
        return float(value)

    return reward
