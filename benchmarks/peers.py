"""One side of the benchmark, in a process of its own: `python peers.py SIDE FOLDER OUT [--profile]`.

Trains one epoch on the folder that `workload.py` wrote and writes time, peak memory and the logged
steps to OUT. Each side is a transformers.Trainer with the same arguments. A side imports nothing of
another's, so that this file also runs in an environment where only that side is installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

BETA = 0.1
STEP_VALUES = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def trainer_arguments(folder: Path, work: dict[str, Any]) -> dict[str, Any]:
    """What all sides are told; all else is left at each side's own default.

    Gradient checkpointing, which TRL has on by default, is off: it would only make TRL slower.
    """
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": work["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "optim": "adamw_torch_fused",
        "bf16": work["dtype"] == "bf16",
        "gradient_checkpointing": False,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load(folder: Path) -> Any:
    """The work's model, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def dpo_kit_trainer(folder: Path, work: dict[str, Any], data: Dataset) -> Trainer:
    """Ours; the live reference is the copy that it makes by itself."""
    from dpo_kit.config import PreferenceConfig
    from dpo_kit.trainer import PreferenceTrainer

    args = PreferenceConfig(
        **trainer_arguments(folder, work),
        loss={"name": "dpo", "beta": BETA},
        reference_mode="live",
        tokens_per_micro_batch=work["tokens_per_micro_batch"],
    )
    return PreferenceTrainer(load(folder), args=args, train_dataset=data)


def trl_trainer(folder: Path, work: dict[str, Any], data: Dataset) -> Trainer:
    """TRL's, on the same ids: its tokenisation is passed over, and takes no part in the time."""
    import trl

    class OnTheSameIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    return OnTheSameIds(
        load(folder),
        ref_model=load(folder),
        args=trl.DPOConfig(**trainer_arguments(folder, work), beta=BETA),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


TrainerMaker = Callable[[Path, dict[str, Any], Dataset], Trainer]
SIDES: dict[str, TrainerMaker] = {"dpo_kit": dpo_kit_trainer, "trl-1.12": trl_trainer}


def peak_memory_bytes() -> int:
    """Most memory that this process has held."""
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


def train(side: str, folder: Path, profile: bool) -> dict[str, Any]:
    """One epoch.

    Returns:
        seconds (the Trainer's own train_runtime), setup_seconds (making the trainer), peak_memory_bytes,
        steps (what was logged), versions and threads.
    """
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    data = Dataset.from_list(json.loads((folder / "pairs.json").read_text(encoding="utf-8")))
    start = time.perf_counter()
    trainer = SIDES[side](folder, work, data)
    setup = time.perf_counter() - start
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            metrics = trainer.train().metrics
        print(
            profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60
            )
        )
    else:
        metrics = trainer.train().metrics
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "seconds": metrics["train_runtime"],
        "setup_seconds": setup,
        "peak_memory_bytes": peak_memory_bytes(),
        "steps": [{name: line[name] for name in STEP_VALUES} for line in logged],
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the side that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    result = train(given.side, given.folder, given.profile)
    given.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
