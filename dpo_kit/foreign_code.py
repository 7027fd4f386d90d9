"""What in somebody else's model folder could run: pickled weights, which never do, and modules of its own.

Weights are read from safetensors alone. Modules (`auto_map` in a configuration) run only where a recipe says
`model.trust_remote_code: true`, for the model and tokenizer of `model.path`; then a warning says so.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from dpo_kit.errors import DpoKitWarning, InputError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_INDEX = "*.safetensors.index.json"
_MEND = "Save the model with save_pretrained(); pickled weights (*.bin, *.pt) are never loaded."


def require_safetensors(folder: Path, *, field: str) -> None:
    """Refuse a folder of which transformers would not read safetensors files in it, and nothing else.

    Pickles beside whole safetensors weights are never opened, and stay.

    Args:
        folder: a model's.
        field: what names it, for errors.

    Raises:
        InputError: naming the file, where there are no safetensors weights, or an index of theirs names
            files of another kind or place.
    """
    if not any(folder.glob("*.safetensors")) and not any(folder.glob(_INDEX)):
        pickle = next((path for glob in _PICKLES for path in sorted(folder.glob(glob))), None)
        problem = "the model folder has no weights (*.safetensors)"
        if pickle is not None:
            problem += f", and {pickle.name} is a pickle, which could run any code"
        raise InputError(problem, file=folder, field=field, mend=_MEND)
    for index in sorted(folder.glob(_INDEX)):
        for name in _indexed(index, field):
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise InputError(
                    f"it names '{name}', which is no safetensors file beside it",
                    file=index,
                    field=field,
                    mend=_MEND,
                )


def _indexed(index: Path, field: str) -> set[str]:
    """The files that an index of weights names."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return set(map(str, named.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("this is no index of weights", file=index, field=field, mend=_MEND) from error


def refused_code(error: Exception, source: Any, field: str) -> InputError | None:
    """The refusal of a folder that brings its own code, where that is what transformers says; else None."""
    if "trust_remote_code" not in str(error):
        return None
    return InputError(
        "it brings code of its own, which is not run",
        file=str(source),
        field=field,
        mend="Read its *.py files; where you trust them, set model.trust_remote_code to true, which holds "
        "for the model and tokenizer of model.path.",
    )


def refuse_kernels(config: Any, source: Any, field: str) -> None:
    """Refuse a configuration that has transformers fetch attention code from the hub, and run it.

    Raises:
        InputError: naming the code.
    """
    named = str(getattr(config, "_attn_implementation", None))
    if "/" in named:
        raise InputError(
            f"its config.json asks for code from the hub ({named}), which is not run",
            file=str(source),
            field=field,
            mend="Take attn_implementation out of it.",
        )


def untrusted_base(adapter: Path) -> InputError:
    """The refusal to trust, for an adapter's sake, whatever model it names."""
    return InputError(
        "the code would be that of the model which this adapter names",
        file=adapter,
        field="model.trust_remote_code",
        mend="Set model.path to that model, and model.adapter to the adapter.",
    )


def tell_of_code(source: Any, fields: dict[str, Any]) -> None:
    """Warn that code of a model's or tokenizer's own runs, where its configuration names some."""
    if fields.get("auto_map"):
        message = f"{source}: code that came with it runs now (model.trust_remote_code)"
        warnings.warn(message, DpoKitWarning, stacklevel=3)
