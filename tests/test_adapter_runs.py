"""Runs with adapters, from the command line: what is saved is found again, on its base, wherever it lies."""

import json
import os
import shutil

import pyarrow.parquet
import pytest
import torch
from families import make_model
from pair_files import write
from test_adapters import same, trained
from tiny_runs import text

from dpo_kit import cli
from dpo_kit.adapter_folders import base_of
from dpo_kit.adapters import put_adapter
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.models import load_model
from dpo_kit.recipe import Recipe
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

peft = pytest.importorskip("peft", reason="peft is not installed (the peft extra)")

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

PREFERENCES = [
    {"prompt": f"film {i}", "chosen": " was very good", "rejected": f" was bad {i}"} for i in range(12)
]
RECIPE = """
model: {{path: {base}, lora: {{r: 2, target_modules: [q_proj, up_proj]}}}}
data: {{train: [{world}/pairs.jsonl], cache_dir: {world}/cache}}
reference: {{cache_dir: {world}/cache}}
train: {{output_dir: {folder}, batch_size: 4, max_steps: 4, learning_rate: 1.0e-2, save_strategy: steps,
  save_steps: 2, bf16: false, seed: 1, logging_steps: 1, disable_tqdm: true}}
report: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """base/, pairs.jsonl, and run/, which trained an adapter on the base."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_byte_level_bpe([row["prompt"] + row["chosen"] for row in PREFERENCES], 270)
    tokenizer.save_pretrained(folder / "base")
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    write(folder / "pairs.jsonl", *PREFERENCES)
    assert run("train", recipe(folder, folder / "base", folder / "run")) == 0
    return folder


def recipe(world, base, folder):
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE.format(base=base, world=world, folder=folder))
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


def logps(model, world, out):
    assert run("logps", model, world / "pairs.jsonl", "--out", out) == 0
    return pyarrow.parquet.read_table(out).to_pandas()


def test_every_command_takes_the_adapter_of_a_run(world, tmp_path, capsys):
    adapter = world / "run" / "model"
    assert not (adapter / "config.json").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        world / "base"
    )
    of = {
        name: logps(path, world, tmp_path / f"{name}.parquet")
        for name, path in {"adapter": adapter, "base": world / "base"}.items()
    }
    assert (of["adapter"].chosen_logp - of["base"].chosen_logp).mean() > 0.1
    assert run("merge", adapter, tmp_path / "merged", "--data", world / "pairs.jsonl") == 0
    merged = logps(tmp_path / "merged", world, tmp_path / "merged.parquet")
    assert abs(merged.chosen_logp - of["adapter"].chosen_logp).max() < 1e-4
    replies = {}
    for name, model in {"adapter": adapter, "merged": tmp_path / "merged", "base": world / "base"}.items():
        out = tmp_path / f"{name}.jsonl"
        assert (
            run(
                "sample",
                model,
                world / "pairs.jsonl",
                "--out",
                out,
                "--n",
                1,
                "--temperature",
                0,
                "--max-new-tokens",
                6,
            )
            == 0
        )
        replies[name] = out.read_text()
    assert replies["adapter"] == replies["merged"] != replies["base"]
    capsys.readouterr()
    assert run("eval", adapter, "--reference", world / "base", "--data", world / "pairs.jsonl", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    expected = 0.1 * (
        (of["adapter"].chosen_logp - of["base"].chosen_logp)
        - (of["adapter"].rejected_logp - of["base"].rejected_logp)
    )
    assert figures["pairs"]["margin"] == pytest.approx(expected.mean(), rel=1e-5)


def test_an_adapter_is_trained_further_by_its_folder_alone(world, tmp_path):
    adapter = world / "run" / "model"
    further = tmp_path / "further.yaml"
    further.write_text(
        RECIPE.format(base="X", world=world, folder=tmp_path / "run").replace(
            "model: {path: X, lora: {r: 2, target_modules: [q_proj, up_proj]}}",
            f"model: {{adapter: {adapter}}}",
        )
    )
    model = Recipe.load(further).model
    assert (model.path, model.tokenizer) == (str(world / "base"), str(adapter))
    assert run("train", further) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    # Its start is the reference, and not the base.
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    weights = [
        trained(put_adapter(load_model(world / "base"), f, trainable=True))
        for f in (adapter, tmp_path / "run" / "model")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert not same(*weights)
    # Cut off after its first checkpoint, it ends the same.
    for left in ("model", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "run" / left)
    (tmp_path / "run" / "summary.json").unlink()
    assert run("train", further, "--resume") == 0
    again = trained(put_adapter(load_model(world / "base"), tmp_path / "run" / "model", trainable=True))
    assert same(again, weights[1])


def test_a_base_that_the_run_made_is_found_where_the_run_was_moved_to(world, tmp_path, monkeypatch, capsys):
    config = "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, "
    config += "num_attention_heads: 2, max_position_embeddings: 64}"
    corpus = [text(i, 1 + i % 5, 8 + i % 7) + f" {i}." for i in range(60)]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    made = tmp_path / "made.yaml"
    content = RECIPE.format(base="X", world=world, folder="here/run").replace("path: X", f"config: {config}")
    made.write_text(
        f"{content}sft: {{corpus: [{tmp_path}/corpus.txt], vocabulary: 300, "
        "train: {max_steps: 2, batch_size: 2}}\n"
    )
    # The run folder is named by where one stands.
    monkeypatch.chdir(tmp_path)
    assert run("train", made) == 0
    before = logps("here/run/model", world, tmp_path / "before.parquet")
    assert base_of("here/run/model") == str(tmp_path / "here/run/sft/model")
    (tmp_path / "there").mkdir()
    shutil.move("here/run", "there/run")
    monkeypatch.chdir(tmp_path / "there")
    after = logps("run/model", world, tmp_path / "after.parquet")
    assert after.equals(before)
    assert base_of("run/checkpoints/step-2") == str(tmp_path / "there/run/sft/model")
    shutil.rmtree("run/sft")
    assert run("logps", "run/model", world / "pairs.jsonl", "--out", tmp_path / "gone.parquet") == 2
    assert "its base model is not there: " in capsys.readouterr().err


def test_one_adapter_is_asked_for_on_a_base_that_stays(world, tmp_path):
    def check(model, **more):
        Recipe.check({"model": model, "data": {"train": [str(world / "pairs.jsonl")]}} | more)

    base, adapter = str(world / "base"), str(world / "run" / "model")
    two = [{"lora": {"r": 2}, "peft": {"peft_type": "IA3"}}, {"lora": {"r": 2}, "adapter": adapter}]
    for fields in two:
        with pytest.raises(InputError, match="are each an adapter, and one is trained"):
            check({"path": base} | fields)
    with pytest.raises(InputError, match=r"model\.adapter.*SFT would change the base"):
        check({"path": base, "adapter": adapter}, sft={"corpus": ["c.txt"]})
    with pytest.raises(InputError, match=r"no such folder"):
        check({"adapter": str(tmp_path / "none")})
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare)
    content = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not say which model it belongs to"):
        check({"adapter": str(bare)})
    # Where both are given, the path wins.
    check({"path": base, "adapter": str(bare)})


def test_the_adapter_that_is_the_reference_is_not_saved_with_the_one_that_is_trained(world, tmp_path):
    adapter, path = world / "run" / "model", recipe(world, world / "base", tmp_path / "run")
    settings = ["reference.mode=adapter", f"reference.adapter={adapter}"]
    assert run("train", path, *settings) == 0
    found = {p.parent.name for p in (tmp_path / "run").rglob("adapter_model.safetensors")}
    assert found == {"step-2", "step-4", "model"}
    weights = trained(put_adapter(load_model(world / "base"), tmp_path / "run" / "model", trainable=True))
    for left in ("model", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "run" / left)
    (tmp_path / "run" / "summary.json").unlink()
    assert run("train", path, *settings, "--resume") == 0
    again = trained(put_adapter(load_model(world / "base"), tmp_path / "run" / "model", trainable=True))
    assert same(again, weights)


def test_a_run_whose_start_lies_in_its_own_folder_is_refused(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    path = recipe(world, world / "base", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for field in ("model.adapter", "model.path", "reference.path"):
        more = [] if field == "reference.path" else ["model.lora=null"]
        assert run("train", path, *more, f"{field}={tmp_path / 'run' / 'model'}") == 2
        assert f"field '{field}': it lies in the run's own folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_of_random_weights_is_refused_as_it_would_fit_nothing(world, tmp_path, capsys):
    path = recipe(world, world / "base", tmp_path / "run")
    random = ["model.path=null", "model.config={model_type: llama}", f"model.tokenizer={world / 'base'}"]
    assert run("train", path, *random) == 2
    assert "random weights are not adapted" in capsys.readouterr().err


def test_where_an_adapter_cannot_be_trained_further_it_is_refused(world, tmp_path, capsys):
    adapter = world / "run" / "model"
    path = recipe(world, world / "base", tmp_path / "run")
    without = ["model.lora=null", f"model.path={adapter}"]
    assert run("train", path, *without) == 2
    assert "its adapter is frozen" in capsys.readouterr().err
    assert run("train", path, f"model.path={adapter}") == 2
    assert "has an adapter already" in capsys.readouterr().err
    assert run("ppo", path, "model.lora=null", f"model.adapter={adapter}") == 2
    assert "PPO trains no adapter further" in capsys.readouterr().err
    assert run("train", path, *without, f"sft={{corpus: [{world}/pairs.jsonl]}}") == 2
    assert "an adapter is no model for SFT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_a_quantised_base_is_warned_of_on_the_whole_one(world, tmp_path):
    shutil.copytree(world / "run" / "model", tmp_path / "run" / "model")
    content = (world / "run" / "recipe.yaml").read_text().replace("quantization: null", "quantization: 4bit")
    (tmp_path / "run" / "recipe.yaml").write_text(content)
    with pytest.warns(DpoKitWarning, match="trained on a base in 4bit, and is put on the whole one"):
        load_model(tmp_path / "run" / "model")


def test_a_folder_with_a_model_and_an_adapter_is_unclear(world, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(world / "base", both)
    for path in (world / "run" / "model").glob("adapter*"):
        shutil.copy(path, both)
    with pytest.raises(InputError, match="holds a model and an adapter"):
        load_model(both)


def test_an_adapter_without_a_tokenizer_has_its_bases(world, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (world / "run" / "model").glob("adapter*"):
        shutil.copy(path, bare)
    assert load_tokenizer(bare).get_vocab() == load_tokenizer(world / "base").get_vocab()
    assert torch.equal(
        load_model(bare)(torch.tensor([[5, 6]])).logits,
        load_model(world / "run" / "model")(torch.tensor([[5, 6]])).logits,
    )
    os.rename(bare / "adapter_model.safetensors", bare / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickled weights .* are never loaded"):
        load_model(bare)
