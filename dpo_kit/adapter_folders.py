"""Facts about the folder of an adapter: whether it is one, which base it is on, and how that was loaded.

Nothing is put on a model here; see `adapters`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.yaml_file import parse_yaml

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
REWARD_TASK = "SEQ_CLS"


def is_adapter(source: Any) -> bool:
    """Whether this is a folder with an adapter, and not a model.

    Raises:
        InputError: it holds both, and what would be loaded from it is unclear.
    """
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return False
    if (folder / "config.json").is_file():
        raise InputError(
            "the folder holds a model and an adapter",
            file=folder,
            field="model.path",
            mend=f"Move the adapter ({CONFIG_FILE} and {WEIGHTS_FILE}) to a folder of its own.",
        )
    return True


def adapter_and_base(source: Any) -> tuple[Path | None, Any]:
    """An adapter's folder and where its base model is; or None and the source itself, where it is no adapter.

    Raises:
        InputError: see `is_adapter` and `base_of`.
    """
    return (Path(source), base_of(source)) if is_adapter(source) else (None, source)


def base_of(folder: str | Path) -> str:
    """Where the base model of an adapter in a folder is: another folder, or a hub id.

    A base that the adapter's own run made (RUN/sft/model) is looked for beside the adapter first, so that a
    run folder can be moved. Other relative names count from the working folder, or else from the adapter's.

    Raises:
        InputError: no whole adapter, one that names no base, or a base folder that is not there.
    """
    folder = Path(folder)
    fields = read_adapter(folder)
    named = fields.get("base_model_name_or_path")
    if not named:
        raise InputError(
            "the adapter does not say which model it belongs to",
            file=folder / CONFIG_FILE,
            field="base_model_name_or_path",
            mend="Write the folder or hub id of its base model there.",
        )
    named = str(named)
    if Path(named).parts[-2:] == ("sft", "model"):
        # RUN/model, or RUN/checkpoints/step-N.
        for run in folder.absolute().parents[:2]:
            if (run / "sft" / "model" / "config.json").is_file():
                return str(run / "sft" / "model")
    for place in (Path(named).expanduser(), folder / named):
        if place.is_dir():
            return str(place)
    if named.startswith((".", "/", "~")) or named.count("/") != 1:
        raise InputError(
            f"its base model is not there: '{named}'",
            file=folder / CONFIG_FILE,
            field="base_model_name_or_path",
            mend="Bring the model back there, or write there where it is now.",
        )
    return named


def saves(folder: str | Path, layer: str) -> bool:
    """Whether a folder's adapter holds its own copy of a layer of the base model, such as `score`."""
    from safetensors import safe_open

    with safe_open(Path(folder) / WEIGHTS_FILE, "pt") as file:
        return any(f".{layer}." in name for name in file.keys())  # noqa: SIM118


def reads_rewards(folder: str | Path) -> bool:
    """Whether a folder's adapter is one for a reward model."""
    return read_adapter(Path(folder)).get("task_type") == REWARD_TASK or saves(folder, "score")


def trained_quantization(folder: str | Path) -> Any:
    """`model.quantization` of the recipe that an adapter was trained by, where that lies beside it.

    Raises:
        InputError: the recipe is no YAML.
    """
    path = run_recipe_of(folder)
    content = None if path is None else parse_yaml(path.read_text(encoding="utf-8"), path)
    section = content.get("model") if isinstance(content, dict) else None
    return section.get("quantization") if isinstance(section, dict) else None


def run_recipe_of(folder: str | Path) -> Path | None:
    """The recipe of the run whose RUN/model or RUN/checkpoints/step-N this is; None where there is none."""
    folder = Path(folder).absolute()
    if folder.parent.name == "checkpoints":
        folder = folder.parent
    elif folder.name != "model":
        # A recipe that lies beside it may be of any run.
        return None
    path = folder.parent / "recipe.yaml"
    return path if path.is_file() else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, where the folder has a whole adapter that is no pickle."""
    if not folder.is_dir():
        raise unusable("no such folder", folder)
    if not (folder / CONFIG_FILE).is_file():
        raise unusable(f"the folder has no adapter ({CONFIG_FILE})", folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"the folder has no adapter in safetensors ({WEIGHTS_FILE})",
            file=folder,
            field="model.adapter",
            mend="Save the adapter with save_pretrained(); pickled weights (*.bin, *.pt) are never loaded.",
        )
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unusable(f"{CONFIG_FILE} cannot be read: {in_a_line(error)}", folder) from error
    if not isinstance(found, dict):
        raise unusable(f"{CONFIG_FILE} holds no JSON object", folder)
    return found


def unusable(problem: str, folder: Path) -> InputError:
    mend = "Name a folder that save_pretrained() of a peft model, or a run, has written."
    return InputError(problem, file=folder, field="model.adapter", mend=mend)


def in_a_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
