"""docs/guide.md says what is so: code and commands run, recipes load, its tables name all that TRL has.

Blocks below a comment `not run here: reason` are parsed, by their own parsers; all others run, on stand-ins.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from families import make_model

from dpo_kit.cli import app
from dpo_kit.config import PreferenceConfig
from dpo_kit.losses import get_loss, loss_names, make_objective, registry
from dpo_kit.recipe import Recipe
from dpo_kit.tokenizer import train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
TEXT = GUIDE.read_text(encoding="utf-8")
_BLOCK = re.compile(r"(<!-- not run here: [^\n]+ -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(match[2], match[1] is None, match[3], match.start(3)) for match in _BLOCK.finditer(TEXT)]


def blocks(language):
    found = [
        (code, runs, TEXT.count("\n", 0, place)) for name, runs, code, place in BLOCKS if name == language
    ]
    assert found
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the guide takes for granted: a chat model, pairs, recipes and configurations."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("recipes", "configs"):
        (folder / name).symlink_to(ROOT / name)
    made = train_byte_level_bpe(["A good film. A bad film."] * 20, 262)
    made.save_pretrained(folder / "my-chat-model")
    make_model("llama", vocab_size=len(made)).save_pretrained(folder / "my-chat-model")
    rows = [{"prompt": f"Film {i}:", "chosen": f" good {i}.", "rejected": " bad."} for i in range(96)]
    (folder / "my-pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sharded.yaml").write_text(blocks("yaml")[0][0])
    return folder


def test_all_blocks_are_found_and_of_a_known_kind():
    assert len(BLOCKS) * 2 == TEXT.count("```")
    assert {name for name, *_ in BLOCKS} == {"bash", "yaml", "python"}


@pytest.mark.parametrize("page", ["guide.md", "large-runs.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = ROOT / "docs" / (path or page)
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, link


def test_every_python_block_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    for code, runs, line in blocks("python"):
        assert runs
        exec(compile("\n" * line + code, str(GUIDE), "exec"), {"__name__": "guide"})
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5
    assert (place / "runs" / "capped" / "model" / "model.safetensors").is_file()


def test_every_yaml_block_is_a_recipe():
    for code, *_ in blocks("yaml"):
        recipe = Recipe.check(yaml.safe_load(code), str(GUIDE))
        settings = recipe.train["accelerator_config"]["gradient_accumulation_kwargs"]
        assert settings == {"sync_each_batch": True}


def commands(code):
    """The command lines of a block that start something of ours, as lists of words."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[1:] if words[:1] == ["srun"] else words
        if words and words[0] in ("dpo-kit", "torchrun", "accelerate"):
            yield words


def own_arguments(words):
    """What is left for dpo-kit once the launcher's own parser has taken its part."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module
        assert parsed.training_script == "dpo_kit"
        return parsed.training_script_args
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.module
        assert (ROOT / parsed.config_file).is_file()
        assert parsed.training_script == "dpo_kit"
        return parsed.training_script_args
    return words[1:]


def test_every_command_is_one(place, monkeypatch):
    monkeypatch.chdir(place)
    group = typer.main.get_command(app)
    launchers = set()
    for code, *_ in blocks("bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        for words in commands(code):
            launchers.add(words[0])
            arguments = own_arguments(words)
            context = group.make_context("dpo-kit", list(arguments))
            name, command, rest = group.resolve_command(context, list(arguments))
            with command.make_context(name, rest, parent=context) as parsed:
                if name == "train":
                    Recipe.load(parsed.params["recipe"], parsed.params["overrides"] or [])
    assert launchers == {"dpo-kit", "torchrun", "accelerate"}


def environment(folder):
    own = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
        "DPO_KIT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.slow
def test_the_commands_run_as_they_stand(place):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the quantisation extra)")
    said = []
    for code, runs, line in blocks("bash"):
        if runs:
            done = subprocess.run(
                ["bash", "-e"], input=code, text=True, capture_output=True, cwd=place, env=environment(place)
            )
            assert done.returncode == 0, f"line {line}: {done.stderr[-4000:]}"
            said.append(done.stderr)
    assert (place / "runs" / "qlora" / "model" / "adapter_model.safetensors").is_file()
    assert (place / "my-better-model" / "model.safetensors").is_file()
    assert "is finished" in said[-1]


CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", [*CONFIGS, ROOT / "recipes" / "qlora.yaml"], ids=lambda path: path.stem)
def test_every_line_is_commented(path):
    """But for those that only open a section."""
    for line in path.read_text(encoding="utf-8").splitlines():
        assert "#" in line or line.endswith(":") or not line.strip(), line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind, nodes = config.distributed_type.value, config.num_machines
    expected = {
        "one-gpu": ("NO", 1, 1),
        "eight-gpus-ddp": ("MULTI_GPU", 8, 1),
        "eight-gpus-fsdp2": ("FSDP", 8, 1),
        "two-nodes-fsdp2": ("FSDP", 16, 2),
    }
    assert (kind, config.num_processes, nodes) == expected[path.stem]
    assert config.mixed_precision == "bf16"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
        assert yaml.safe_load(path.read_text())["fsdp_config"] == config.fsdp_config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight-gpus-ddp", "eight-gpus-fsdp2"])
def test_accelerate_launches_two_processes_by_them(name, place):
    """On processors, where accelerate's own code would not shard."""
    command = [
        "accelerate",
        "launch",
        "--config_file",
        f"configs/accelerate/{name}.yaml",
        "--num_processes",
        "2",
    ]
    recipe = ["recipes/ultrafeedback.yaml", "model.path=my-chat-model", "data.train=my-pairs.jsonl"]
    settings = ["data.eval=[]", "train.eval_strategy=no", "train.max_steps=2", "train.batch_size=8"]
    settings += ["train.save_steps=1", f"train.output_dir=runs/{name}", "report.enabled=false"]
    done = subprocess.run(
        [*command, "--module", "dpo_kit", "train", *recipe, *settings],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    run = place / "runs" / name
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert (run / "model" / "model.safetensors").is_file()
    shards = list((run / "checkpoints" / "step-2").glob("sharded-model*"))
    assert bool(shards) == (name == "eight-gpus-fsdp2")


def test_the_table_of_memory_is_todays():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the quantisation extra)")
    pytest.importorskip("peft", reason="peft is not installed (the peft extra)")
    sys.path[:0] = [str(ROOT / "docs")]
    spec = importlib.util.spec_from_file_location("plan_one_gpu", ROOT / "docs" / "plan_one_gpu.py")
    plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan)
    written = plan.with_table(TEXT, "memory", plan.memory(), by="plan_one_gpu.py")
    assert written == TEXT, "run `python docs/plan_one_gpu.py`"


def rows_of(header):
    """The cells of a table of the guide, by its first heading: [[cell, ...], ...]."""
    lines = TEXT[TEXT.index(f"| {header} |") :].splitlines()
    table = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def named(cell):
    """What stands in code marks."""
    return set(re.findall(r"`([^`]+)`", cell))


def theirs(header):
    """All that the first column of a table names."""
    return {name for row in rows_of(header) for name in named(row[0])}


_ENUMERATE = """
import dataclasses, inspect, json, re
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer
base = {f.name: f for f in dataclasses.fields(TrainingArguments)}
own = {f.name: f for f in dataclasses.fields(DPOConfig)}
print(json.dumps({
    "fields": sorted(own.keys() - base.keys()),
    "defaults": sorted(n for n in base if own[n].default != base[n].default),
    "arguments": list(inspect.signature(DPOTrainer.__init__).parameters)[1:],
    "losses": re.findall(r"`'(\\w+)'`", own["loss_type"].metadata["help"]),
}))
"""


def check_trl(found):
    assert set(found["fields"]) == theirs("`DPOConfig`")
    assert set(found["arguments"]) == theirs("`DPOTrainer`")
    assert set(found["losses"]) == theirs("`loss_type` | `loss.name`")
    assert set(found["defaults"]) <= theirs("field | TRL")


def test_the_tables_have_all_that_the_installed_trl_has(capsys):
    pytest.importorskip("trl", reason="trl is not installed (the ppo extra)")
    exec(_ENUMERATE, {})
    check_trl(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.slow
def test_the_tables_have_all_that_the_newest_trl_has():
    newest = ROOT / ".venv-trl-newest" / "bin" / "python"
    if not newest.exists():
        pytest.skip("the newest TRL is not installed (make bench does it)")
    done = subprocess.run([str(newest), "-c", _ENUMERATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_trl(json.loads(done.stdout.splitlines()[-1]))


def test_what_the_tables_name_of_ours_is_there():
    fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
    hyperparameters = {name for loss in loss_names() for name in get_loss(loss).hyperparameters}
    for name in {name for row in rows_of("`DPOConfig`") for name in named(row[1])}:
        key, _, value = name.partition(": ")
        section, dot, inner = key.partition(".")
        if key == "loss":
            # Dots stand for what is the reader's to fill in.
            terms = yaml.safe_load(re.sub(r", \w+: \.\.\.", "", value).replace("...", "dpo"))
            make_objective(terms)
        elif dot:
            assert inner in Recipe.model_fields[section].annotation.model_fields, name
        elif "(" not in key:
            assert key in fields | hyperparameters | set(loss_names()), name
    for row in rows_of("`loss_type` | `loss.name`"):
        assert named(row[1]) <= set(loss_names())
    for row in rows_of("`DPOTrainer`"):
        assert named(row[1]) <= set(inspect.signature(PreferenceTrainer.__init__).parameters)
