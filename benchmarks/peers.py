"""The sides of the benchmark, each run in a process of its own: `python peers.py SIDE FOLDER...`.

Trains one epoch on each folder that `workload.py` wrote and writes what came of it to FOLDER/result.json.
Each side is a transformers.Trainer with the same arguments, or a plain loop with the same settings. A side
imports nothing of another's, so that this file also runs in an environment where only that side is
installed (and dpo_kit is not).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from loop import Naive, Scorer, Settings, Trees, reference_logprobs
from loop import train as train_in_loop
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

BETA = 0.1
LEARNING_RATE = 1e-6
STEP_VALUES = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Task = dict[str, Any]
Row = dict[str, Any]


class Clock(TrainerCallback):
    """When training began and when each step was done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def tick(self) -> None:
        """Take the time, once the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()


def trainer_arguments(folder: Path, task: Task) -> dict[str, Any]:
    """What all Trainers are told; all else is left at each side's own default.

    Gradient checkpointing, which TRL has on by default, is off: it would only make TRL slower.
    """
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": task["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "optim": "adamw_torch_fused",
        "bf16": task["dtype"] == "bf16",
        "gradient_checkpointing": False,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "use_cpu": task["device"] == "cpu",
        "dataloader_pin_memory": False,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load(task: Task) -> Any:
    """The task's model with the weights of its seed: the same on all sides, which the log-probs prove."""
    fields = dict(task["model"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(task["seed"])
    with torch.device(task["device"]):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[task["weights"]])


def run_dpo_kit(folder: Path, task: Task, rows: list[Row], variant: str = "") -> dict[str, Any]:
    """Ours; a live reference is the copy that it makes by itself."""
    from datasets import Dataset
    from ours import precomputed_reference, within_pairs

    from dpo_kit.config import PreferenceConfig
    from dpo_kit.trainer import PreferenceTrainer

    args = PreferenceConfig(
        **trainer_arguments(folder, task),
        loss={"name": "dpo", "beta": BETA},
        reference_mode="live",
        layout="padded" if variant == "padded" else "auto",
        tokens_per_micro_batch=task["tokens_per_micro_batch"],
    )
    policy, reference, ahead = load(task), None, {}
    if task["reference"] == "precomputed":
        start = time.perf_counter()
        reference = precomputed_reference(policy.to(args.device), rows, args.token_budget, bool(args.bf16))
        ahead = {"precompute_seconds": time.perf_counter() - start}
    trainer = PreferenceTrainer(policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows))
    if variant == "within-pairs":
        trainer.data_collator = within_pairs(trainer.data_collator, task["model"]["vocab_size"])
    return _train(trainer, task) | ahead


def run_trl(folder: Path, task: Task, rows: list[Row]) -> dict[str, Any]:
    """TRL's, on the same ids: its tokenisation is passed over, and takes no part in the time."""
    import trl
    from datasets import Dataset

    ahead: dict[str, float] = {}

    class OnTheSameIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **keywords: Any) -> Dataset:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **keywords)
            ahead["precompute_seconds"] = time.perf_counter() - start
            return found

    precomputed = task["reference"] == "precomputed"
    trainer = OnTheSameIds(
        load(task),
        # With log-probs computed ahead TRL needs no second model: the policy is the reference then.
        ref_model=None if precomputed else load(task),
        args=trl.DPOConfig(
            **trainer_arguments(folder, task), beta=BETA, precompute_ref_log_probs=precomputed
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("source"),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    return _train(trainer, task) | ahead


def _train(trainer: Trainer, task: Task) -> dict[str, Any]:
    clock = Clock(task["device"])
    trainer.add_callback(clock)
    clock.tick()
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {"times": clock.times, "steps": [{name: line[name] for name in STEP_VALUES} for line in logged]}


def run_loop(task: Task, rows: list[Row], scorer: Scorer) -> dict[str, Any]:
    """A plain loop."""
    settings = Settings(task["batch_size"], LEARNING_RATE, BETA, task["dtype"] == "bf16", task["device"])
    policy, clock, ahead, known, reference = load(task), Clock(task["device"]), {}, None, None
    if task["reference"] == "precomputed":
        start = time.perf_counter()
        known = reference_logprobs(policy, rows, scorer, settings)
        ahead = {"precompute_seconds": time.perf_counter() - start}
    else:
        reference = load(task).requires_grad_(False)
    clock.tick()
    steps = train_in_loop(policy, reference, rows, scorer, settings, known, clock.tick)
    return {"times": clock.times, "steps": steps} | ahead


def _trees(task: Task) -> Scorer:
    from dpo_kit.config import AUTO_TOKENS

    given = task["tokens_per_micro_batch"]
    return Trees(task["device"], AUTO_TOKENS[task["device"]] if given == "auto" else given)


Side = Callable[[Path, Task, list[Row]], dict[str, Any]]
SIDES: dict[str, Side] = {
    "dpo_kit": run_dpo_kit,
    "dpo_kit-within-pairs": lambda *given: run_dpo_kit(*given, variant="within-pairs"),
    "dpo_kit-padded": lambda *given: run_dpo_kit(*given, variant="padded"),
    "dpo_kit-loop": lambda _, task, rows: run_loop(task, rows, _trees(task)),
    "naive": lambda _, task, rows: run_loop(task, rows, Naive(task["device"])),
    "trl-1.12": run_trl,
    "trl-newest": run_trl,
}


# Imported once for all runs of `run_each`.
MODELLING = ("transformers.models.llama.modeling_llama",)
PRELOADED = {
    "dpo_kit": ("datasets", "dpo_kit.trainer"),
    "trl-1.12": ("datasets", "trl.trainer.dpo_trainer"),
    "trl-newest": ("datasets", "trl.trainer.dpo_trainer"),
}


def peak_memory_bytes(device: str) -> int:
    """Most memory that this process has held: of the GPU's what tensors took, of the machine's everything."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss where it can be helped: it begins with the size of the process that started us.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of what is installed here and matters to the speed."""
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("trl", "dpo-kit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(side: str, folder: Path, profile: bool = False) -> None:
    """One epoch; what came of it is written to `folder / "result.json"`.

    seconds (from before `train` to the end of the last step, without the warm-up), step_seconds,
    setup_seconds (what went before), precompute_seconds where that was asked for, peak_memory_bytes, steps
    (what was logged), versions and threads.
    """
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    rows = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    start = time.perf_counter()
    if profile:
        with torch.profiler.profile() as profiler:
            found = SIDES[side](folder, task, rows)
        clock = "self_cpu_time_total" if task["device"] == "cpu" else "self_device_time_total"
        print(profiler.key_averages().table(sort_by=clock, row_limit=25, max_name_column_width=60))
    else:
        found = SIDES[side](folder, task, rows)
    times = found.pop("times")
    result = found | {
        "seconds": times[-1] - times[task["warmup_steps"]],
        "step_seconds": [after - before for before, after in itertools.pairwise(times)],
        "setup_seconds": times[0] - start - found.get("precompute_seconds", 0.0),
        "peak_memory_bytes": peak_memory_bytes(task["device"]),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def run_each(side: str, folders: Sequence[Path]) -> None:
    """Each folder in a process of its own, all begun from one that has imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peers", *MODELLING, *PRELOADED.get(side, ())])
    for folder in folders:
        process = context.Process(target=run, args=(side, folder))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{side} failed on {folder} with status {process.exitcode}")


def main() -> None:
    """Run the side that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--many", action="store_true", help="import the libraries once for all folders")
    given = parser.parse_args()
    if given.many:
        run_each(given.side, given.folders)
        return
    for folder in given.folders:
        run(given.side, folder, given.profile)


if __name__ == "__main__":
    main()
