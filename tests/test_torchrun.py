"""Whole runs from the command line on two ranks: torchrun and accelerate launch, DDP and FSDP2, resumed.

The file is its own script, too: started by torch.distributed.run with a folder it does a run there, goes on
with one that was cut short, and begins one that is refused.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import make_world, recipe_of

from dpo_kit.cli import main
from dpo_kit.ranks import is_first, wait
from dpo_kit.recipe import Recipe
from dpo_kit.run import run_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::dpo_kit.errors.DpoKitWarning"),
]

# What is measured; or depends on what was in the cache, or on which pairs shared a rank and so their tokens.
MEASURED = ("runtime", "second", "memory", "reference_computed", "tokens")


def write_recipe(name, world, folder, **train):
    """The recipe of a variant of `tiny_runs` as a file, its run in `folder`; the file."""
    content = recipe_of(name, world, folder)
    content["train"] |= {"save_total_limit": None, "tokens_per_micro_batch": 40} | train
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def silent(line):
    pass


def launch(*command):
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


NEXT = "now the next one"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def alone(world, tmp_path_factory):
    """name -> folder of a variant's run in one process."""
    folder = tmp_path_factory.mktemp("alone")

    @lru_cache
    def run(name):
        run_recipe(Recipe.load(write_recipe(name, world, folder / name)), say=silent)
        return folder / name

    return run


@pytest.fixture(scope="session")
def ranks(world, tmp_path_factory):
    """Folder of `plain` by torchrun, of a resumed one, and of one that is cut short."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("plain", "bad"):
        write_recipe("plain", world, folder / name)
    done = launch(*TORCHRUN, __file__, str(folder), str(world))
    for name, said in zip(("plain", "two", "bad"), done.stderr.split(NEXT), strict=True):
        (folder / f"{name}.err").write_text(said)
    return folder


def cut_short(finished, folder, world):
    """A run that stopped after its fourth step, made of one that did not."""
    shutil.copytree(finished, folder)
    write_recipe("plain", world, folder)
    run = folder / "run"
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    for checkpoint in run.glob("checkpoints/step-*"):
        if int(checkpoint.name.removeprefix("step-")) > 4:
            shutil.rmtree(checkpoint)


def weights_of(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def figures_of(folder):
    found = json.loads((folder / "run" / "summary.json").read_text())
    del found["recipe"]
    return {name: value for name, value in found.items() if not any(part in name for part in MEASURED)}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_same(found, expected):
    """Two run folders have the same files, weights and figures."""
    torch.testing.assert_close(weights_of(found), weights_of(expected), rtol=1e-5, atol=1e-5)
    figures, known = figures_of(found), figures_of(expected)
    assert figures.keys() == known.keys()
    for name, value in known.items():
        assert figures[name] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)
        )
    mine, theirs = metrics_of(expected), metrics_of(found)
    assert [line["step"] for line in theirs] == [line["step"] for line in mine]
    assert [line.keys() for line in theirs] == [line.keys() for line in mine]
    for line, other in zip(mine, theirs, strict=True):
        if "loss" in line:
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


def test_a_run_on_two_ranks_leaves_what_one_process_leaves(alone, ranks):
    found, expected = ranks / "plain", alone("plain")
    check_same(found, expected)
    by_rank = {name for name in files_of(found / "run") if "random-1" in name}
    assert files_of(found / "run") - by_rank == files_of(expected / "run")
    assert not any("writing" in name for name in files_of(found / "run"))
    assert json.loads((found / "run" / "environment.json").read_text())["ranks"] == 2
    figures, known = (json.loads((f / "run" / "summary.json").read_text()) for f in (found, expected))
    assert figures["reference_computed"] == known["reference_computed"]
    assert figures["tokens"] == pytest.approx(known["tokens"], rel=0.1)
    said = (ranks / "plain.err").read_text()
    for line in ("train: 44 pairs", "training on the pairs", "step 9 held-out", "run folder: "):
        assert said.count(line) == (2 if "held-out" in line else 1)


def test_resume_on_two_ranks_and_on_one(alone, ranks):
    run_recipe(Recipe.load(ranks / "one" / "recipe.yaml"), resume=True, say=silent)
    for name in ("one", "two"):
        check_same(ranks / name, alone("plain"))


def test_a_bad_recipe_is_refused_once(ranks):
    message = (ranks / "bad.err").read_text()
    assert message.count("nothing.jsonl: no such file") == 1
    # What torchrun says of its processes.
    assert "exitcode  : 2" in message


def test_what_is_one_process_s_is_refused_to_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["losses"])
    assert "losses is done by one process" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launch_shards_a_run_with_a_start(alone, world, tmp_path):
    configuration = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
    }
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(configuration))
    options = ["--config_file", str(tmp_path / "accelerate.yaml"), "-m", "dpo_kit"]
    done = launch(
        "accelerate.commands.launch", *options, "train", str(write_recipe("start", world, tmp_path))
    )
    assert done.returncode == 0, done.stderr[-8000:]
    check_same(tmp_path, alone("start"))


if __name__ == "__main__":
    folder, world_folder = map(Path, sys.argv[1:])
    with contextlib.suppress(SystemExit):
        main(["train", str(folder / "plain" / "recipe.yaml")])
    if is_first():
        for name in ("two", "one"):
            cut_short(folder / "plain", folder / name, world_folder)
        print(NEXT, file=sys.stderr)
    wait()
    run_recipe(Recipe.load(folder / "two" / "recipe.yaml"), resume=True)
    wait()
    if is_first():
        print(NEXT, file=sys.stderr)
    main(["train", str(folder / "bad" / "recipe.yaml"), f"data.train=[{folder}/nothing.jsonl]"])
