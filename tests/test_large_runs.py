"""docs/large-runs.md shows what its script prints, and FSDP2 does what the page's arithmetic takes it to do.

The file is its own script: it counts, in a process of its own, the collectives of FSDP2 on a group of 64
ranks of which only this one is real.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model

ROOT = Path(__file__).parents[1]
LAYERS, RANKS = 4, 64


@pytest.fixture(scope="module")
def plan():
    """docs/plan_large_run.py, which is no part of a package."""
    sys.path[:0] = [str(ROOT / "docs")]
    spec = importlib.util.spec_from_file_location("plan_large_run", ROOT / "docs" / "plan_large_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_what_the_script_prints(plan):
    page = plan.PAGE.read_text(encoding="utf-8")
    for name, make in plan.TABLES.items():
        assert plan.with_table(page, name, make()) == page, f"{name}: run `python docs/plan_large_run.py`"
    for name, figure in plan.figures().items():
        assert figure in page, f"{name} is {figure}"
    with pytest.raises(ValueError, match="no lines"):
        plan.with_table("a page without marks", "memory", "")


def test_parameters_are_those_of_the_shape_by_hand(plan):
    hidden, kv, inner, vocabulary = 8192, 8 * 128, 28672, 128256
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    assert plan.parts()["one decoder layer"] == layer
    assert plan.parts()["all"] == 80 * layer + 2 * vocabulary * hidden + hidden


def test_a_layers_memory_holds_at_least_its_products_inputs(plan):
    """Two norms' inputs, q, k, v and attention's output; gate, up, what silu makes, and their product."""
    least = 2 * (2 * 8192 + 2 * 8192 + 2 * 1024 + 4 * 28672)
    assert least < plan.layer_bytes_a_token() < 2 * least


def test_dealing_by_work_by_hand(plan):
    from simulate_dealing import by_work, in_order, longest_over_mean

    pairs = np.array([[3, 5, 3, 4, 3, 0]])
    # 5 | 4, then 3 to the second, 3 to the first, 3 to the second, which has less.
    assert by_work(pairs, 2).tolist() == [[8, 10]]
    assert in_order(pairs, 2).tolist() == [[11, 7]]
    assert longest_over_mean(in_order(pairs, 2)).tolist() == [11 / 9]


@pytest.fixture(scope="module")
def counted():
    """What FSDP2 did on a made-up group."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kept", "checkpointed by transformers", "checkpointed by fsdp"])
def test_a_micro_batch_gathers_all_weights_twice_and_scatters_once(counted, kind):
    """Embedding, layers, and norm with head: these are gathered once. Checkpointing gathers nothing more."""
    units = LAYERS + 2
    assert counted[kind] == {"gathered": 2 * units - 1, "scattered": units}


@pytest.mark.slow
def test_put_off_synchronisation_keeps_the_whole_gradient(counted):
    """In the dtype in which gradients are summed, fp32, and padded to a multiple of the ranks."""
    assert 4 * counted["parameters"] <= counted["unsharded gradient"] < 4.6 * counted["parameters"]
    assert counted["put off"] == {"gathered": 2 * (LAYERS + 2) - 1, "scattered": 0}


def sharded(kind):
    """A small Llama in the units that accelerate makes, in the precisions of `sharding.fit_to_model`."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model("llama", tie_word_embeddings=False, num_hidden_layers=LAYERS).train()
    if kind == "checkpointed by transformers":
        model.gradient_checkpointing_enable()
    layers = model.model.layers
    if kind == "checkpointed by fsdp":
        for place in range(LAYERS):
            layers[place] = checkpoint_wrapper(layers[place])
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*layers, model.model.embed_tokens):
        fully_shard(unit, mp_policy=policy)
    fully_shard([model.model.norm, model.lm_head], mp_policy=policy, reshard_after_forward=False)
    return fully_shard(model, mp_policy=policy)


def collectives(model, *, synchronised=True):
    """Of one forward and backward pass."""
    from torch.distributed.tensor.debug import CommDebugMode

    model.set_requires_gradient_sync(synchronised)
    with CommDebugMode() as counts:
        model(torch.arange(3, 23)[None]).logits.float().sum().backward()
    found = {str(name): count for name, count in counts.get_comm_counts().items()}
    return {
        "gathered": sum(count for name, count in found.items() if "allgather" in name),
        "scattered": sum(count for name, count in found.items() if "reduce_scatter" in name),
    }


def unsharded_gradient_bytes(model):
    """Of what FSDP2 keeps between micro-batches whose gradients do not meet."""
    units = [unit._get_fsdp_state() for unit in model.modules() if hasattr(unit, "_get_fsdp_state")]
    groups = {id(group): group for unit in units for group in unit._fsdp_param_groups}
    kept = [
        part._unsharded_param.grad
        if part.unsharded_accumulated_grad is None
        else part.unsharded_accumulated_grad
        for group in groups.values()
        for part in group.fsdp_params
    ]
    return sum(gradient.untyped_storage().nbytes() for gradient in kept if gradient is not None)


def main():
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    found = {}
    for kind in ("kept", "checkpointed by transformers", "checkpointed by fsdp"):
        model = sharded(kind)
        # In the first step the order of the backward pass is learned.
        collectives(model)
        found[kind] = collectives(model)
    model = sharded("kept")
    found["put off"] = collectives(model, synchronised=False)
    found["unsharded gradient"] = unsharded_gradient_bytes(model)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
