"""Two ranks with the policy in shards (FSDP2) train as one process does: losses, metrics, norms, weights.

The file is its own script, as test_ranks.py: started by torch.distributed.run it runs cases on two ranks
(gloo, CPU), and the tests compare what that leaves with the same cases in one process. The cases of `QUICK`
are one launch, and all others, which are slow, another one.
"""

import contextlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from families import TREE_FAMILIES, make_model
from safetensors.torch import load_file, save_file
from test_trainer import make_dataset, make_trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dpo_kit import sharding
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.models import load_reward_model

CONFIGURATIONS = Path(__file__).parents[1] / "configs" / "accelerate"

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore::FutureWarning")

# The ranks cut their share of a step into several micro-batches, and not into equally many.
CUT = {"tokens_per_micro_batch": 70}
LORA = {"lora": True}
LIVE = {"own": True, "reference_mode": "live"}
# Settings of the trainer, and by other names: family, lora, own (the reference is the policy's start), dtype.
CASES = {
    "tied": CUT,
    "untied": CUT | {"family": "qwen2"},
    "padded": CUT | {"layout": "padded"},
    "coupled": CUT | {"loss": "aot"},
    "mismatched": CUT | {"loss": "kto"},
    "distributions": CUT | {"loss": "tdpo2"},
    "rewards": CUT | {"loss": "bradley_terry"},
    "checkpointed": CUT | {"gradient_checkpointing": True},
    "checkpointed_coupled": CUT | {"gradient_checkpointing": True, "loss": "aot"},
    "clipped": CUT | {"max_grad_norm": 0.1},
    "each_batch": CUT | {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    "live": CUT | LIVE,
    # Its log-probs are computed by the policy in shards, before the first step; the ranks' shares are uneven.
    "cached": CUT | {"own": True},
    "moving": CUT | {"own": True, "reference_mode": "moving", "reference_update_every": 2},
    "lora_cached": CUT | LORA | {"own": True},
    "lora": CUT | LORA,
    "lora_off": CUT | LORA | {"own": True, "loss": "tdpo2", "reference_mode": "adapter_off"},
}
LOW = {
    "autocast": CUT | LIVE | {"bf16": True},
    "low": CUT | LIVE | {"bf16": True, "dtype": torch.bfloat16, "save_strategy": "steps", "save_steps": 2},
}
ALL = CASES | LOW
QUICK = ("tied", "checkpointed_coupled", "each_batch", "cached", "low")
# What is counted by rank, or measured.
NOT_COMPARED = ("num_tokens", "total_flos", "runtime", "per_second")


def trainer_of(name, folder, **settings):
    own_settings = dict(ALL[name])
    family, dtype = own_settings.pop("family", "llama"), own_settings.pop("dtype", torch.float32)
    own, lora = own_settings.pop("own", False), own_settings.pop("lora", False)
    rewards = own_settings.get("loss") == "bradley_terry"
    if rewards:
        model, _ = load_reward_model(TREE_FAMILIES[family] | {"model_type": family})
    else:
        model = make_model(family, dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
            for key, value in model.named_parameters():
                # So that the adapter changes something from the start, unless the reference is that start.
                if "lora_B" in key and not own:
                    torch.nn.init.normal_(value, std=0.1)
    return make_trainer(
        folder / name,
        model=model,
        ref_model=None if own or rewards else make_model(family, seed=9),
        dataset=make_dataset(24, weight=[1.0, 2.0, 0.5] * 8),
        eval_dataset=make_dataset(10, seed=7),
        **{
            "batch_size": 8,
            "max_steps": 3,
            "per_device_eval_batch_size": 4,
            "use_cpu": True,
            "reference_cache_dir": str(folder / "cache"),
        }
        | own_settings
        | settings,
    )


def whole(parameter):
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def run_case(name, folder, **settings):
    """Train and evaluate; leave weights and what was seen, by rank."""
    trainer = trainer_of(name, folder, **settings)
    step, micro_batches, reductions = trainer.training_step, [], []

    def training_step(model, inputs, *others):
        micro_batches.append(len(inputs["micro_batches"]))
        with counted(reductions):
            return step(model, inputs, *others)

    trainer.training_step = training_step
    before = trainer.evaluate()
    trainer.train()
    seen = {
        "sharded": sharding.is_sharded(trainer.model),
        "before": before,
        "micro_batches": micro_batches,
        "reductions": reductions,
        "computed": trainer.filled.computed,
        "evaluation": trainer.evaluate(),
        "logs": trainer.state.log_history,
    }
    weights = {key: whole(p).float() for key, p in trainer.model.named_parameters() if p.requires_grad}
    rank = trainer.args.process_index
    save_file(weights, folder / name / f"weights-{rank}.safetensors")
    (folder / name / f"seen-{rank}.json").write_text(json.dumps(seen))


def resume_low(folder, begun, **settings):
    """The last step of `low`, from the checkpoint that a run in another folder left."""
    trainer = trainer_of("low", folder / f"from-{begun.name}", **settings)
    trainer.train(resume_from_checkpoint=str(begun / "low" / "checkpoints" / "step-2"))
    state = next(iter(trainer.optimizer.state.values()))
    assert {value.dtype for value in (*trainer.model.parameters(), *state.values())} == {torch.float32}
    if trainer.args.process_index == 0:
        lines = [line for line in trainer.state.log_history if "loss" in line]
        (folder / f"from-{begun.name}" / "logs.json").write_text(json.dumps(lines))


@contextlib.contextmanager
def counted(numbers):
    """Within: reduce-scatters are counted; after: their number is at the end of the list."""
    # Its name changed with torch 2.13.
    names = ("reduce_scatter_single", "reduce_scatter_tensor")
    name = next(name for name in names if hasattr(torch.distributed, name))
    own, calls = getattr(torch.distributed, name), []

    def reduce_scatter(*given, **keywords):
        calls.append(name)
        return own(*given, **keywords)

    setattr(torch.distributed, name, reduce_scatter)
    try:
        yield
    finally:
        setattr(torch.distributed, name, own)
        numbers.append(len(calls))


def left(folder, rank=0):
    return json.loads((folder / f"seen-{rank}.json").read_text()), load_file(
        folder / f"weights-{rank}.safetensors"
    )


@pytest.fixture(scope="session")
def left_of(tmp_path_factory):
    """case -> folders of all cases of its kind, on two ranks and in this process."""

    @lru_cache
    def run(names):
        sharded, alone = (tmp_path_factory.mktemp(kind) / kind for kind in ("sharded", "alone"))
        for name in names:
            run_case(name, alone)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, __file__, str(sharded), str(alone), *names],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-8000:]
        assert "view tensor" not in done.stderr
        return sharded, alone

    return lambda name: run(tuple(n for n in ALL if (n in QUICK) == (name in QUICK)))


def some(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def compared(logged):
    return {name: value for name, value in logged.items() if not any(n in name for n in NOT_COMPARED)}


@pytest.mark.parametrize("name", some(CASES))
def test_two_ranks_with_shards_train_as_one_process(left_of, name):
    sharded, alone = left_of(name)
    (one, expected), (two, weights), (second, _) = (
        left(alone / name),
        left(sharded / name),
        left(sharded / name, 1),
    )
    assert two["sharded"]
    assert not one["sharded"]
    assert max(two["micro_batches"]) > 1
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    assert len(one["logs"]) == len(two["logs"]) == 5
    for mine, theirs in zip(one["logs"], two["logs"], strict=True):
        assert compared(theirs) == pytest.approx(compared(mine), rel=1e-4, abs=1e-5)
    assert compared(second["evaluation"]) == compared(two["evaluation"])
    assert compared(two["before"]) == pytest.approx(compared(one["before"]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", some(LOW))
def test_low_precision_is_that_of_one_process(left_of, name):
    """The step-0 check compared the policy, in shards, with its copy that is whole."""
    sharded, alone = left_of(name)
    (one, _), (two, _) = left(alone / name), left(sharded / name)
    assert two["logs"][0]["loss"] == pytest.approx(one["logs"][0]["loss"], rel=2e-3)
    assert two["logs"][0]["grad_norm"] == pytest.approx(one["logs"][0]["grad_norm"], rel=2e-2)


def test_low_precision_goes_on_sharded_or_not_with_the_bits_of_its_shards(left_of):
    sharded, alone = left_of("low")
    with pytest.warns(DpoKitWarning, match="weights are fp32 from here on"):
        resume_low(alone, sharded)
    for folder, begun in ((alone, sharded), (sharded, alone)):
        lines = json.loads((folder / f"from-{begun.name}" / "logs.json").read_text())
        known = [line for line in left(begun / "low")[0]["logs"] if "loss" in line]
        assert lines[:2] == known[:2]
        assert lines[2]["loss"] == pytest.approx(known[2]["loss"], rel=5e-3)


# Two layers and what is at the ends: tied, the two ends are one.
GROUPS = {"tied": 3, "untied": 4, "coupled": 3, "checkpointed": 3, "checkpointed_coupled": 3, "lora": 2}


@pytest.mark.parametrize("name", some(GROUPS))
def test_gradients_meet_once_a_step(left_of, name):
    seen, _ = left(left_of(name)[0] / name)
    assert seen["reductions"] == [GROUPS[name]] * 3


def test_gradients_can_stay_in_shards_between_micro_batches(left_of):
    sharded, _ = left_of("each_batch")
    seen = [left(sharded / "each_batch", rank)[0] for rank in (0, 1)]
    most = [max(pair) for pair in zip(*(one["micro_batches"] for one in seen), strict=True)]
    assert seen[0]["reductions"] == [3 * count for count in most]


@pytest.mark.parametrize("name", some(["cached", "lora_cached"]))
def test_ranks_share_the_filling_by_a_policy_in_shards(left_of, name):
    sharded, alone = left_of(name)
    once, *shares = (
        left(folder / name, rank)[0]["computed"] for folder, rank in ((alone, 0), (sharded, 0), (sharded, 1))
    )
    assert min(shares) > 0
    assert sum(shares) == once


def config(tmp_path, **settings):
    return PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_what_does_not_go_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="one process"):
        sharding.check_wrappers(config(tmp_path, fsdp=True))
    with pytest.raises(InputError, match="version: 2"):
        sharding.check_wrappers(config(tmp_path, fsdp=True, fsdp_config={"version": 1}))
    with pytest.raises(InputError, match="several ranks need the same pairs"):
        sharding.check_wrappers(config(tmp_path, parallelism_config=ParallelismConfig(tp_size=2)))
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        with pytest.raises(InputError, match="several ranks need the same pairs"):
            sharding.check_wrappers(config(tmp_path))
    cut = make_model("llama")
    # As transformers marks what it loads by a tp_plan.
    cut._tp_size = 2
    with pytest.raises(InputError, match="tp_plan"):
        make_trainer(tmp_path, model=cut)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: 2"):
        sharding.check_wrappers(config(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check_wrappers(config(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed is not supported"):
        config(tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with pytest.raises(InputError, match="Shard with FSDP2"):
        config(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})


def test_the_accelerate_configurations_shard_by_the_second_version(monkeypatch):
    for name in ("eight-gpus-fsdp2", "two-nodes-fsdp2"):
        content = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())
        assert content["distributed_type"] == "FSDP"
        with monkeypatch.context() as environment:
            for key, value in content["fsdp_config"].items():
                # As accelerate's launcher does it.
                environment.setenv(f"FSDP_{key.removeprefix('fsdp_').upper()}", str(value))
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        sharding.fit_to_model(plugin, make_model("llama"))
        plugin.set_auto_wrap_policy(make_model("llama"))
        assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {LlamaDecoderLayer}
        assert plugin.mixed_precision_policy.param_dtype == torch.float32


if __name__ == "__main__":
    own, other = map(Path, sys.argv[1:3])
    for case in sys.argv[3:]:
        run_case(case, own, fsdp=True)
    if "low" in sys.argv[3:]:
        resume_low(own, other, fsdp=True)
    torch.distributed.destroy_process_group()
