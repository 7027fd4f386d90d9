"""Speed and memory on this machine, for a recipe of one's own or without one (`dpo-kit bench`).

A few real steps are trained in a temporary folder and thrown away; nothing of the recipe's run folder is
read or touched. What fits, how fast it is, how far from the limit of the machine, and where the time goes.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from dpo_kit.bench.memory import MemoryMeter, memory_parts, what_fits
from dpo_kit.bench.show import print_results
from dpo_kit.bench.steps import StepWatch
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.examples import Example
from dpo_kit.losses import make_objective
from dpo_kit.measurement import Say
from dpo_kit.models import load_model, unwrap
from dpo_kit.recipe import Recipe, make_training_config
from dpo_kit.roofline import (
    DTYPES,
    Work,
    count_work,
    largest_sizes,
    matmul_rates,
    shapes_in_use,
    share_of_limit,
)
from dpo_kit.run import prepare, read_pairs_of
from dpo_kit.run_folder import write_text
from dpo_kit.start import check_start, make_start, started
from dpo_kit.trainer import PreferenceTrainer

__all__ = ["print_results", "run_bench"]

# Steps that do not count: kernels are chosen, memory is mapped, the optimiser's state is made.
WARM_UP = 2
_RATE_SECONDS = 0.1

# Without a recipe: a model that a machine of the kind trains in about a minute.
_MODELS = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "cuda": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
}
_VOCABULARY = 32000
_QUIET = {"logging_strategy": "no", "logging_first_step": False, "disable_tqdm": True}


def run_bench(
    recipe: Recipe | None = None, *, steps: int = 5, out: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Measure the first preference steps of a recipe, or of a small Llama on random tokens without one.

    A policy that the recipe would first train on a corpus gets one step there: its weights do not change
    the speed.

    Args:
        recipe: checked.
        steps: steps that are measured, after two of warm-up; one more runs under the profiler.
        out: JSON file to write the results to; written whole, then renamed.
        say: gets lines of progress.

    Returns:
        environment, model, data, step (tokens), speed, limit, memory, fits (micro-batches) and time.
        Sizes are in bytes, times in seconds, but for `time`, which is in percent of a step.

    Raises:
        InputError: data, model, settings and options do not fit together, or several processes.
        TrainingError: training had to stop.
    """
    if steps < 1:
        raise InputError(f"expected 1 or more, got {steps}", field="--steps")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError("not a file in a folder that is there", file=out, field="--out")
    with tempfile.TemporaryDirectory(prefix="dpo-kit-bench-") as folder:
        settings = _settings(steps, folder)
        config = make_training_config(settings) if recipe is None else recipe.training_config(**settings)
        if config.world_size > 1:
            raise InputError(
                f"{config.world_size} processes were started, and one is measured",
                mend="Start it without torchrun or accelerate launch.",
            )
        if config.reference_mode in ("auto", "cached") and make_objective(config.loss).needs_reference:
            # Nothing is left in the cache, and nothing that lies there makes the reference look free.
            config.reference_mode = "live"
            say("the reference is measured live; a cached one takes no time once it is computed")
        memory = MemoryMeter(config.device)
        memory.release()
        before = memory.now()
        if recipe is None:
            trainer = _small_trainer(config)
        else:
            trainer = _recipe_trainer(recipe, config, Path(folder), say)
        found = _measure(trainer, memory, before, steps, say)
    if out is not None:
        write_text(out, json.dumps(found, indent=1))
    return found


def _recipe_trainer(recipe: Recipe, config: PreferenceConfig, folder: Path, say: Say) -> PreferenceTrainer:
    """What `dpo-kit train` would train with, the held-out pairs and the evaluation left out."""
    check_start(recipe)
    small: dict[str, Any] = {}
    if recipe.sft is not None:
        train = recipe.sft.train | {"max_steps": 1} | _QUIET
        small["sft"] = recipe.sft.model_copy(update={"train": train})
    if recipe.candidates is not None:
        # A pair of each prompt, and the pairs of a step more than is trained.
        enough = (config.max_steps + 1) * config.per_device_train_batch_size
        few = {"prompts": min(recipe.candidates.prompts, enough), "held_out": 0, "evaluation": 0}
        small["candidates"] = recipe.candidates.model_copy(update=few)
    recipe = recipe.model_copy(update=small)
    make_start(recipe, folder, say)
    recipe = started(recipe, folder)
    rows = {"train": read_pairs_of(recipe, "train", say), "eval": None}
    return prepare(recipe, config, rows, say)[-1]


def _small_trainer(config: PreferenceConfig) -> PreferenceTrainer:
    """DPO on random tokens: prompts of 16 to 255 of them, replies of 16 to 127."""
    random = np.random.default_rng(0)

    def tokens(longest: int) -> list[int]:
        return random.integers(3, _VOCABULARY, random.integers(16, longest)).tolist()

    rows = [
        {"prompt_ids": tokens(256), "chosen_ids": tokens(128), "rejected_ids": tokens(128)}
        # A step more than is trained: while one runs, the next is planned.
        for _ in range((config.max_steps + 1) * config.per_device_train_batch_size)
    ]
    shared = {"model_type": "llama", "vocab_size": _VOCABULARY, "tie_word_embeddings": True}
    policy = load_model(shared | _MODELS.get(config.device.type, _MODELS["cpu"]))
    return PreferenceTrainer(policy, args=config, train_dataset=Dataset.from_list(rows))


def _settings(steps: int, folder: str) -> dict[str, Any]:
    """What a training run is told so that it is short and leaves nothing."""
    return _QUIET | {
        "output_dir": folder,
        "max_steps": WARM_UP + steps + 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "report_to": "none",
        "push_to_hub": False,
    }


def _measure(
    trainer: PreferenceTrainer, memory: MemoryMeter, before: int, steps: int, say: Say
) -> dict[str, Any]:
    """Run the steps, and all that is reported of them."""
    say("measuring how fast this machine multiplies matrices")
    dtype = _computes_in(trainer)
    rates = {name: _rates(trainer, name) for name in dict.fromkeys([dtype, "fp32", "bf16"])}
    watch = StepWatch(trainer, memory, WARM_UP, steps)
    say(f"training {WARM_UP} steps to warm up, {steps} to measure and one under the profiler")
    trainer.train()
    # The best that the machine showed: a rate that was disturbed would flatter the share.
    rates[dtype] = {shape: max(rate, rates[dtype][shape]) for shape, rate in _rates(trainer, dtype).items()}
    works = [_work(trainer, each) for each in watch.pairs]
    parts = memory_parts(trainer, watch.peak_bytes, watch.gradient_bytes, before, memory.kind)
    say("measuring what larger micro-batches would take")
    data: Any = trainer.train_dataset
    return {
        "environment": _environment(trainer),
        "model": _model(trainer),
        "data": {"pairs": len(data), "pairs_per_step": trainer.args.batch_size},
        "step": _step(works),
        "speed": _speed(trainer, watch, works),
        "limit": _limit(watch.seconds, works, rates, dtype),
        "memory": {
            "peak_bytes": watch.peak_bytes,
            "kind": memory.kind,
            "since": "the warm-up" if memory.can_reset else "the start of the process",
            "parts": parts,
        },
        "fits": what_fits(trainer, memory, watch.pairs),
        "time": watch.profile.shares(),
    }


def _model(trainer: PreferenceTrainer) -> dict[str, Any]:
    policy: Any = trainer.model
    parameters = list(policy.parameters())
    return {
        "class": type(unwrap(policy)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "computes_in": _computes_in(trainer),
    }


def _work(trainer: PreferenceTrainer, pairs: Sequence[Example]) -> Work:
    policy: Any = trainer.model
    return count_work(pairs, len(pairs), policy, trainer.reference.model or False)


def _computes_in(trainer: PreferenceTrainer) -> str:
    """Name of the dtype that matrices are multiplied in."""
    if trainer.args.bf16 or trainer.args.fp16:
        return "bf16" if trainer.args.bf16 else "fp16"
    policy: Any = trainer.model
    weights = next(policy.parameters()).dtype
    return next(name for name, dtype in DTYPES.items() if dtype == weights)


def _rates(trainer: PreferenceTrainer, dtype: str) -> dict[str, float]:
    policy: Any = trainer.model
    device = trainer.args.device
    shapes = shapes_in_use(*largest_sizes(policy), device=device.type)
    return matmul_rates(dtype, shapes, _RATE_SECONDS, device)


def _step(works: Sequence[Work]) -> dict[str, float]:
    """Tokens of a step, means over the measured ones."""
    names = ("distinct_tokens", "separate_tokens", "padded_tokens", "predictions")
    totals = {name: sum(getattr(work, name) for work in works) for name in names}
    return {name: total / len(works) for name, total in totals.items()} | {
        "tree_saves_of_separate": 1 - totals["distinct_tokens"] / totals["separate_tokens"],
        "tree_saves_of_padded": 1 - totals["distinct_tokens"] / totals["padded_tokens"],
    }


def _speed(trainer: PreferenceTrainer, watch: StepWatch, works: Sequence[Work]) -> dict[str, Any]:
    """Medians over the steps, each with its own pairs and tokens."""
    seconds = watch.seconds
    return {
        "steps": len(seconds),
        "seconds_per_step": median(seconds),
        "slowest_step_seconds": max(seconds),
        "pairs_per_second": median(len(p) / s for p, s in zip(watch.pairs, seconds, strict=True)),
        "distinct_tokens_per_second": median(
            w.distinct_tokens / s for w, s in zip(works, seconds, strict=True)
        ),
        "layout": trainer.layout,
    }


def _limit(
    seconds: Sequence[float], works: Sequence[Work], rates: dict[str, dict[str, float]], dtype: str
) -> dict[str, Any]:
    """How far from the least time; the share is the median over the steps."""
    shape, rate = max(rates[dtype].items(), key=lambda found: found[1])
    return {
        "flops_per_step": sum(work.flops for work in works) / len(works),
        "dtype": dtype,
        "flops_per_second": rate,
        "shape": shape,
        "share": median(share_of_limit(w.flops, rate, s) for w, s in zip(works, seconds, strict=True)),
        "uncounted": list(works[0].uncounted),
        "matmul_rates": rates,
    }


def _environment(trainer: PreferenceTrainer) -> dict[str, Any]:
    device = trainer.args.device
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
