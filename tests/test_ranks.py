"""Two processes train as one does: the same steps, losses, weights, metrics, and one cache that both fill.

The file is its own script: `torch.distributed.run --nproc-per-node 2 test_ranks.py FOLDER ALONE CASE ...`
runs cases on two ranks (gloo, CPU), and the tests compare what that leaves with what the same cases in one
process left in ALONE. From a checkpoint there the two go on, too. The cases of `QUICK` are one launch,
and all others, which are slow, another one.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from families import TREE_FAMILIES, make_model
from safetensors.torch import load_file, save_file
from test_trainer import make_dataset, make_trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dpo_kit.errors import InputError
from dpo_kit.models import load_reward_model
from dpo_kit.ranks import each, is_first
from dpo_kit.reference import ReferenceCache

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore::FutureWarning")

# With these budgets the ranks cut their share of a step into different numbers of micro-batches; with 130,
# one of them has a single one where the other has two.
CASES = {
    "dpo": {},
    "kto": {"loss": "kto"},
    "aot": {"loss": "aot", "tokens_per_micro_batch": 130},
    "beta_dpo": {"loss": "beta_dpo", "reference_mode": "live"},
    "bco_pair": {"loss": "bco_pair"},
    "tdpo2": {"loss": "tdpo2"},
    "bradley_terry": {"loss": "bradley_terry"},
    "moving": {"reference_mode": "moving", "reference_update_every": 2},
    "grouped": {"group_by_prompt": True, "reference_mode": "live"},
    # With it DDP settles its buckets in the second step, by collectives of its own.
    "checkpointed": {"loss": "aot", "gradient_checkpointing": True, "tokens_per_micro_batch": 130},
    "checkpointed_kto": {"loss": "kto", "gradient_checkpointing": True, "tokens_per_micro_batch": 130},
}
# Two epochs of steps of 8, the last of which has 5 pairs, or one: then one of the ranks has none.
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "reference_mode": "live"}
UNEVEN = {
    "uneven": EPOCHS | {"rows": 21, "reference_mode": "auto"},
    "lonely": EPOCHS | {"rows": 17},
    "lonely_kto": EPOCHS | {"rows": 17, "loss": "kto"},
    "lonely_aot": EPOCHS | {"rows": 17, "loss": "aot"},
    "lonely_beta_dpo": EPOCHS | {"rows": 17, "loss": "beta_dpo", "tokens_per_micro_batch": 2000},
}
SHORT = {"short": {"max_steps": 2}}
# Left in the second epoch, whose second step is not full.
RESUMED = {"saved": EPOCHS | {"rows": 13, "save_strategy": "steps", "save_steps": 3}}
ALL = CASES | UNEVEN | SHORT | RESUMED
QUICK = ("dpo", "kto", "checkpointed", "uneven", "lonely_kto", "saved")
# What is counted by rank, or measured.
NOT_COMPARED = ("num_tokens", "total_flos", "runtime", "per_second")


def trainer_of(name, folder):
    settings = {
        "batch_size": 8,
        "max_steps": 3,
        "tokens_per_micro_batch": 70,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "reference_cache_dir": str(folder / ("cache-short" if name in SHORT else "cache")),
    } | ALL[name]
    rows, rewards = settings.pop("rows", 24), settings.get("loss") == "bradley_terry"
    weights = {} if name in UNEVEN else {"weight": ([1.0, 2.0, 0.5] * rows)[:rows]}
    own = rewards or settings.get("reference_mode") == "moving"
    model = load_reward_model(TREE_FAMILIES["llama"] | {"model_type": "llama"})[0] if rewards else None
    return make_trainer(
        folder / name,
        model=model,
        ref_model=None if own else make_model("llama", seed=9),
        dataset=make_dataset(rows, **weights),
        eval_dataset=make_dataset(10 if name in UNEVEN else 16, seed=7),
        **settings,
    )


def run_case(name, folder):
    """Train and evaluate; leave weights and what was seen, by rank."""
    trainer = trainer_of(name, folder)
    step, sources, micro_batches, meetings = trainer.training_step, [], [], []

    def training_step(model, inputs, *others):
        if not meetings and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(meetings, meet)
        meetings.append(0)
        sources.append([source for batch in inputs["micro_batches"] for source in batch.sources])
        micro_batches.append(len(inputs["micro_batches"]))
        return step(model, inputs, *others)

    trainer.training_step = training_step
    before = trainer.evaluate() if name == "uneven" else {}
    trainer.train()
    seen = {
        "before": before,
        "sources": sources,
        "micro_batches": micro_batches,
        "meetings": meetings,
        "evaluation": trainer.evaluate(),
        "logs": trainer.state.log_history,
        "tokens": trainer._counts.tokens,
        "running": trainer._counts.running,
        "computed": trainer.filled.computed,
    }
    leave(trainer, folder / name, seen)


def meet(meetings, bucket):
    """What DDP does by itself with gradients that meet; counted."""
    meetings[-1] += bucket.is_last()
    return allreduce_hook(None, bucket)


def resume_case(folder, begun):
    """To the end, from the checkpoint that a run in another folder left in its second epoch."""
    trainer = trainer_of("saved", folder)
    trainer.args.output_dir = str(folder / f"resumed-{begun.name}")
    trainer.train(resume_from_checkpoint=str(begun / "saved" / "checkpoints" / "step-3"))
    leave(trainer, folder / f"resumed-{begun.name}", {"logs": trainer.state.log_history})


def leave(trainer, folder, seen):
    rank = trainer.args.process_index
    folder.mkdir(exist_ok=True)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    save_file(weights, folder / f"weights-{rank}.safetensors")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


def left(folder, rank=0):
    return json.loads((folder / f"seen-{rank}.json").read_text()), load_file(
        folder / f"weights-{rank}.safetensors"
    )


@pytest.fixture(scope="session")
def left_of(tmp_path_factory):
    """case -> folders of all cases of its kind, on two ranks and in this process."""

    @lru_cache
    def run(names):
        ranks, alone = (tmp_path_factory.mktemp(kind) / kind for kind in ("ranks", "alone"))
        alone.mkdir()
        ranks.mkdir()
        for name in names:
            run_case(name, alone)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, __file__, str(ranks), str(alone), *names],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-8000:]
        return ranks, alone

    return lambda name: run(tuple(n for n in ALL if (n in QUICK) == (name in QUICK)))


def some(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def compared(logged):
    return {name: value for name, value in logged.items() if not any(n in name for n in NOT_COMPARED)}


@pytest.mark.parametrize("name", some(CASES | UNEVEN))
def test_two_ranks_train_as_one_process(left_of, name):
    ranks, alone = left_of(name)
    one, expected = left(alone / name)
    (first, weights), (second, others) = (left(ranks / name, rank) for rank in (0, 1))
    shares = list(zip(first["sources"], second["sources"], strict=True))
    assert [sorted(a + b) for a, b in shares] == [sorted(step) for step in one["sources"]]
    assert name in UNEVEN or first["micro_batches"] != second["micro_batches"]

    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    assert second["running"] == first["running"]
    for mean, mine in zip(first["running"], one["running"], strict=True):
        assert mean == (mine and pytest.approx(mine, rel=1e-5))


@pytest.mark.parametrize("name", some(CASES | UNEVEN))
def test_gradients_meet_once_a_step(left_of, name):
    for rank in (0, 1):
        seen, _ = left(left_of(name)[0] / name, rank)
        assert seen["meetings"] == [1] * len(seen["micro_batches"])


@pytest.mark.parametrize("name", some(CASES | UNEVEN))
def test_metrics_are_averages_over_all_ranks(left_of, name):
    ranks, alone = left_of(name)
    one, _ = left(alone / name)
    (first, _), (second, _) = (left(ranks / name, rank) for rank in (0, 1))
    # Of each step, of the evaluation, and the summary.
    assert len(one["logs"]) == len(one["sources"]) + 2
    for mine, theirs in zip(one["logs"], first["logs"], strict=True):
        assert compared(theirs) == pytest.approx(compared(mine), rel=1e-4, abs=1e-5)
    assert compared(second["evaluation"]) == compared(first["evaluation"])
    assert first["logs"][-3]["num_tokens"] == first["tokens"] + second["tokens"]


def test_ranks_share_the_filling_of_a_cold_cache_and_compute_nothing_with_a_warm_one(left_of):
    ranks, alone = left_of("dpo")
    names = [name for name in QUICK if name in CASES]
    computed = {name: [left(ranks / name, rank)[0]["computed"] for rank in (0, 1)] for name in names}
    once = {name: left(alone / name)[0]["computed"] for name in names}
    # The first finds nothing there, the second asks for replies to other prompts beside what the first left.
    for cold in ("dpo", "kto"):
        assert sum(computed[cold]) == once[cold] > 0
        assert min(computed[cold]) > 0
    assert computed["checkpointed"] == [0, 0]
    uneven = [left(ranks / "uneven", rank)[0]["computed"] for rank in (0, 1)]
    (model,) = ReferenceCache(ranks / "cache").models()
    assert model.sequences == sum(computed["dpo"] + computed["kto"] + uneven)


@pytest.mark.slow
def test_a_short_run_computes_no_more_than_it_comes_to(left_of):
    ranks, alone = left_of("short")
    computed = [left(ranks / "short", rank)[0]["computed"] for rank in (0, 1)]
    assert min(computed) > 0
    # Of 24 pairs it trains on 16, and evaluates 16.
    assert sum(computed) == left(alone / "short")[0]["computed"] == 64


def test_a_last_step_that_is_not_full_is_dealt_as_it_is(left_of):
    ranks, alone = left_of("uneven")
    sizes = {}
    for name in ("uneven", "lonely_kto"):
        seen = [left(ranks / name, rank)[0]["sources"] for rank in (0, 1)]
        sizes[name] = [[len(own) for own in step] for step in zip(*seen, strict=True)]
    assert [sum(step) for step in sizes["uneven"]] == [8, 8, 5] * 2
    assert [sorted(sizes["lonely_kto"][step]) for step in (2, 5)] == [[0, 1]] * 2
    # The second epoch has an order of its own.
    steps = left(alone / "uneven")[0]["sources"]
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:]))
    assert set(steps[0]) != set(steps[3])


def test_an_uneven_evaluation_set_counts_every_pair_once(left_of):
    ranks, alone = left_of("uneven")
    one, two = left(alone / "uneven")[0]["before"], left(ranks / "uneven")[0]["before"]
    assert compared(two) == pytest.approx(compared(one), rel=1e-4, abs=1e-5)


def test_resume_on_two_ranks_is_bit_equal(left_of):
    ranks, _ = left_of("saved")
    for rank in (0, 1):
        whole, resumed = (left(ranks / name, rank)[1] for name in ("saved", "resumed-ranks"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_goes_on_with_another_number_of_ranks(left_of):
    ranks, alone = left_of("saved")
    resume_case(alone, ranks)
    whole = left(alone / "saved")[1]
    for folder in (alone / "resumed-ranks", ranks / "resumed-alone"):
        torch.testing.assert_close(left(folder)[1], whole, rtol=1e-4, atol=1e-6)


def one_fails():
    """What a rank cannot do with its share is an error on all, which would wait for it."""
    with pytest.raises(InputError, match="this share"):
        each(fail_beside_the_first)
    assert each(is_first) == is_first()


def fail_beside_the_first():
    if not is_first():
        raise InputError("this share")


if __name__ == "__main__":
    own, other = map(Path, sys.argv[1:3])
    for case in sys.argv[3:]:
        run_case(case, own)
    if "saved" in sys.argv[3:]:
        resume_case(own, own)
        resume_case(own, other)
    one_fails()
    torch.distributed.destroy_process_group()
