"""Model folders, adapters, caches and data from elsewhere: no pickle in them is read, no code of theirs runs.

Each pickle here would make a folder when it is read: that it is not there is what is asserted.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from hostile import PICKLES, plant, run
from test_classifiers import save_classifier
from tiny_runs import make_world

from dpo_kit.adapters import put_adapter
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.evaluation import load_reward
from dpo_kit.models import load_config, load_model, load_reward_model
from dpo_kit.pairs import load_pairs
from dpo_kit.tokenizer import load_tokenizer

# On the command line warnings are told of, and the run goes on.
pytestmark = pytest.mark.filterwarnings("default::dpo_kit.errors.DpoKitWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def marker(tmp_path: Path):
    """Where a pickle that was read leaves its mark."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "a pickle was read"


def recipe(folder: Path, world: Path, **model: object) -> Path:
    content = {
        "model": {"path": f"{world}/policy"} | model,
        "data": {"train": [f"{world}/train.jsonl"]},
        "reference": {"cache_dir": f"{folder}/cache"},
        "train": {"output_dir": f"{folder}/run", "batch_size": 4, "max_steps": 2, "logging_steps": 1,
                  "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"},
        "report": {"enabled": False},
    }  # fmt: skip
    path = folder / f"recipe-{len([*folder.glob('recipe-*')])}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_these_pickles_do_run_where_they_are_read(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    for as_torch in (False, True):
        mark = tmp_path / f"mark-{as_torch}"
        path = plant(tmp_path / "x.pt", mark, as_torch=as_torch)
        if as_torch:
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert mark.is_dir()


@pytest.fixture(params=["pytorch_model.bin", "model.pt", "x.pkl"])
def pickled(request: pytest.FixtureRequest, world: Path, tmp_path: Path, marker: Path) -> Path:
    """A model's folder with its weights in a pickle alone."""
    folder = shutil.copytree(world / "policy", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    return plant(folder / request.param, marker, as_torch=request.param != "x.pkl").parent


def test_a_model_in_a_pickle_is_refused(pickled: Path) -> None:
    pickle_name = next(path.name for path in pickled.iterdir() if path.suffix in (".bin", ".pt", ".pkl"))
    loaders = (load_model, load_reward_model, lambda f: load_reward(f"classifier:{f}"),
               lambda f: load_reward(f"model:{f}"))  # fmt: skip
    for load in loaders:
        with pytest.raises(InputError, match=pickle_name) as caught:
            load(pickled)
        assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin"], indirect=True)
def test_every_command_refuses_it(pickled: Path, world: Path, tmp_path: Path, capsys) -> None:
    data, out = world / "train.jsonl", tmp_path / "out"
    commands = [
        ("train", recipe(tmp_path, world, path=str(pickled))),
        ("train", recipe(tmp_path, world), f"reference.path={pickled}"),
        ("train", recipe(tmp_path, world), f"eval.prompts={world}/prompts.jsonl",
         f"eval.reward=classifier:{pickled}"),
        ("cache", "fill", recipe(tmp_path, world, path=str(pickled))),
        ("sample", pickled, world / "prompts.jsonl", "--n", 1, "--out", f"{out}.jsonl"),
        ("eval", pickled, "--reference", world / "policy", "--data", data),
        ("eval", world / "policy", "--reference", pickled, "--data", data),
        ("logps", pickled, data, "--out", f"{out}.parquet"),
    ]  # fmt: skip
    for command in commands:
        assert run(*command) == 2, command
        said = capsys.readouterr().err
        assert "pytorch_model.bin" in said, command
        assert "Traceback" not in said
    assert not out.with_suffix(".parquet").exists()


def test_pickles_beside_safetensors_are_never_opened(world: Path, tmp_path: Path, marker: Path) -> None:
    folder = shutil.copytree(world / "policy", tmp_path / "both")
    for name in PICKLES:
        plant(folder / name, marker, as_torch=not name.endswith(".pkl"))
    expected = load_model(world / "policy").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_model(folder).state_dict().items())
    assert load_tokenizer(folder)("film")["input_ids"]
    assert run("train", recipe(tmp_path, world, path=str(folder))) == 0
    left = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not left


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/model.safetensors"]
)
def test_an_index_names_safetensors_files_beside_it_only(
    named: str, world: Path, tmp_path: Path, marker: Path
) -> None:
    folder = shutil.copytree(world / "policy", tmp_path / "indexed")
    names = list(load_model(world / "policy").state_dict())
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    shutil.copytree(world / "policy", tmp_path / "elsewhere")
    plant(folder / "pytorch_model.bin", marker, as_torch=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, named)}))
    with pytest.raises(InputError, match="no safetensors file beside it") as caught:
        load_model(folder)
    assert caught.value.file == str(index)
    index.write_text("[" * 100_000)
    with pytest.raises(InputError, match="no index of weights"):
        load_model(folder)


def test_a_classifier_and_its_pickles(tmp_path: Path, marker: Path) -> None:
    save_classifier(tmp_path / "good")
    plant(tmp_path / "good" / "pytorch_model.bin", marker, as_torch=True)
    load_reward(f"classifier:{tmp_path / 'good'}")
    (tmp_path / "good" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        load_reward(f"classifier:{tmp_path / 'good'}")


def test_adapters(world: Path, tmp_path: Path, marker: Path, capsys) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = tmp_path / "adapter"
    get_peft_model(load_model(world / "policy"), config).save_pretrained(folder)
    plant(folder / "adapter_model.bin", marker, as_torch=True)
    put_adapter(load_model(world / "policy"), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"\.bin"):
        put_adapter(load_model(world / "policy"), folder)
    assert run("train", recipe(tmp_path, world, adapter=str(folder))) == 2
    given = ("reference.mode=adapter", f"reference.adapter={folder}")
    lora = {"r": 2, "target_modules": ["q_proj"]}
    assert run("train", recipe(tmp_path, world, lora=lora), *given) == 2
    assert "never loaded" in capsys.readouterr().err


def test_caches_that_were_replaced_by_pickles(
    world: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr("dpo_kit.pairs.row_cache.BATCHES_IN_MEMORY", 0)
    path = recipe(tmp_path, world)
    assert run("train", path) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    kept = [*(tmp_path / "kept").rglob("*"), *(tmp_path / "cache").rglob("*")]
    kept = [file for file in kept if file.is_file()]
    assert {".arrow", ".safetensors", ".json"} <= {file.suffix for file in kept}
    for file in kept:
        plant(file, marker)
    capsys.readouterr()
    assert run("train", path) == 0, capsys.readouterr().err
    losses = [[json.loads(line)["loss"] for line in text.splitlines() if '"loss"' in line]
              for text in (before, (tmp_path / "run" / "metrics.jsonl").read_text())]  # fmt: skip
    assert losses[0] == losses[1]


def test_arrow_types_in_a_pickle(tmp_path: Path, marker: Path) -> None:
    """PyArrow before 14.0.1 read the type's pickle when it met one (CVE-2023-47248)."""
    content = plant(tmp_path / "x", marker).read_bytes()
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": content}
    fields = [pa.field(name, pa.string(), metadata=metadata) for name in ("prompt", "chosen", "rejected")]
    schema = pa.schema(
        fields, metadata={"huggingface": '{"info": {"features": {"prompt": {"_type": "os"}}}}'}
    )
    table = pa.table([["a"], ["b"], ["c"]], schema=schema)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    assert load_pairs(tmp_path / "a.arrow")[0]["chosen"] == "b"


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_pickles_and_scripts_as_data(command: str, tmp_path: Path, marker: Path, capsys) -> None:
    folder = tmp_path / "data"
    plant(folder / "rows.pkl", marker)
    plant(folder / "rows.pt", marker, as_torch=True)
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    out = [str(tmp_path / "out.jsonl")] if command == "convert" else []
    for source in (folder, folder / "rows.pkl", folder / "data.py", f"hf://{folder}@train"):
        assert run("data", command, source, *out) == 2
    for name in ("rows.jsonl", "rows.parquet", "rows.arrow", "rows.json", "rows.csv", "rows.jsonl.gz"):
        plant(folder / name, marker)
        assert run("data", command, folder / name, *out) in (1, 2), name
    assert "Traceback" not in capsys.readouterr().err


def test_a_checkpoint_with_pickles(world: Path, tmp_path: Path, marker: Path, capsys) -> None:
    path = recipe(tmp_path, world)
    saving = ("train.save_strategy=steps", "train.save_steps=1")
    assert run("train", path, *saving) == 0
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for folder in checkpoints:
        assert not [file for file in folder.iterdir() if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
        for name in PICKLES:
            plant(folder / name, marker, as_torch=not name.endswith(".pkl"))
    shutil.rmtree(tmp_path / "run" / "model")
    assert run("train", path, *saving, "--resume") == 2
    assert "pickles" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, '{"global_step": "x"}', "[]", "\x00"])
def test_a_checkpoint_with_broken_states(content: str, world: Path, tmp_path: Path, capsys) -> None:
    path = recipe(tmp_path, world)
    saving = ("train.save_strategy=steps", "train.save_steps=1")
    assert run("train", path, *saving) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    newest = tmp_path / "run" / "checkpoints" / "step-2"
    for file in newest.glob("*.json"):
        file.write_text(content)
    assert run("train", path, *saving, "--resume") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


# Code that comes with a model


CODE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-kind"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder that brings its own classes, which leave a mark when they are imported."""
    import transformers.utils.hub
    from transformers import dynamic_module_utils

    for module in (transformers.utils.hub, dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(world / "policy", tmp_path / f"own_{os.getpid()}")
    (folder / "own_model.py").write_text(CODE.format(marker=str(tmp_path / "code-ran")))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-kind",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_is_not_run(own_code: Path, world: Path, tmp_path: Path, capsys) -> None:
    data, out = world / "train.jsonl", tmp_path / "out"
    for load in (load_config, load_model, load_reward_model):
        with pytest.raises(InputError, match=r"model\.trust_remote_code to true"):
            load(own_code)
    commands = [
        ("train", recipe(tmp_path, world, path=str(own_code))),
        ("train", recipe(tmp_path, world), f"reference.path={own_code}", "reference.mode=live"),
        # The word for one model is none for another.
        ("train", recipe(tmp_path, world, trust_remote_code=True), f"reference.path={own_code}"),
        ("train", recipe(tmp_path, world, trust_remote_code=True), f"eval.prompts={world}/prompts.jsonl",
         f"eval.reward=classifier:{own_code}"),
        ("sample", own_code, world / "prompts.jsonl", "--n", 1, "--out", f"{out}.jsonl"),
        ("eval", own_code, "--reference", world / "policy", "--data", data),
        ("logps", own_code, data, "--out", f"{out}.parquet"),
    ]  # fmt: skip
    for command in commands:
        assert run(*command) == 2, command
        assert "code of its own, which is not run" in capsys.readouterr().err, command
    assert not (tmp_path / "code-ran").exists()


def test_code_of_a_trusted_model_runs_and_says_so(
    own_code: Path, world: Path, tmp_path: Path, capsys
) -> None:
    path = recipe(tmp_path, world, path=str(own_code), trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("default", DpoKitWarning)
        assert run("train", path) == 0, capsys.readouterr().err
    assert (tmp_path / "code-ran").is_dir()
    assert "code that came with it runs now" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The start-up check trusts it as it trusts the family that it is made of.
    assert summary["layout"] == "tree"


def test_attention_code_of_the_hub_is_not_fetched(world: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "classifier")
    shutil.copytree(world / "policy", tmp_path / "policy")
    for name, load in (("policy", load_model), ("classifier", lambda f: load_reward(f"classifier:{f}"))):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "someone/kernel"}))
        with pytest.raises(InputError, match=r"asks for code from the hub \(someone/kernel\)") as caught:
            load(tmp_path / name)
        assert "attn_implementation" in str(caught.value)


def test_an_adapter_lends_its_trust_to_no_base(own_code: Path, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(own_code),
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="which this adapter names"):
        load_model(folder, trust_remote_code=True)
    assert not (tmp_path / "code-ran").exists()


def test_code_of_a_tokenizer(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "policy", tmp_path / "tokenizer")
    (folder / "config.json").unlink()
    names = folder / "tokenizer_config.json"
    fields = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    names.write_text(json.dumps(fields))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'code-ran')!r})\n")
    with pytest.raises(InputError, match="code of its own, which is not run"):
        load_tokenizer(folder)
    assert not (tmp_path / "code-ran").exists()
