"""The command line end to end on a small model: run folder, log-probs, and bad input."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file

from dpo_kit.cli import main
from dpo_kit.examples import PairTokens
from dpo_kit.pairs import load_pairs
from dpo_kit.scoring import full_logit_logprobs
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

TEXTS = ["the film was good", "the film was bad", "a very good film", "a very bad film", "it was fine"]
ROWS = [
    {"prompt": f"Film {i}:", "chosen": f" {TEXTS[i % 5]} indeed", "rejected": f" {TEXTS[(i + 2) % 5]}"}
    for i in range(24)
]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_byte_level_bpe(TEXTS * 20, 262)
    tokenizer.save_pretrained(folder)
    make_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, pad_token_id=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model_folder):
    pairs = write_rows(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {model_folder}}}\n"
        f"data: {{train: {pairs}, eval: {pairs}}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, batch_size: 8, max_steps: 6, learning_rate: 1e-3, "
        "logging_steps: 1, save_strategy: steps, save_steps: 2, bf16: false, disable_tqdm: true}\n"
    )
    return path


def run(*arguments):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code or 0


def test_train_leaves_a_whole_run_folder(recipe, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Film 1:"}, {"prompt": "Film 2:"}])
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(text):\n    return float(len(text))\n")
    settings = [f"eval.prompts={prompts}", f"eval.reward={reward}:reward", "eval.max_new_tokens=5"]
    assert run("train", recipe, *settings) == 0
    folder = tmp_path / "run"
    found = {p.name for p in folder.iterdir()}
    assert {
        "recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "samples.jsonl", "checkpoints",
        "model", "report.html", "plots",
    } <= found  # fmt: skip
    assert not [name for name in found if "writing" in name]
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("train_runtime", "pairs_per_second", "peak_memory_bytes", "eval/accuracy", "eval/kl"):
        assert summary[key] >= 0
    assert 0 < summary["tokens_saved_share"] < 1
    assert summary["eval/reward_before"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {
        "loss",
        "rewards/chosen",
        "rewards/accuracies",
        "logps/rejected",
        "grad_norm",
        "num_tokens",
    } <= set([line for line in lines if "loss" in line][-1])
    assert [line["step"] for line in lines if "eval_kl" in line] == [0, 6]
    assert {p.name for p in (folder / "checkpoints").iterdir() if p.name[0] != "."} == {
        "step-2", "step-4", "step-6",
    }  # fmt: skip
    assert (folder / "model" / "model.safetensors").exists()
    assert (folder / "model" / "tokenizer.json").exists()
    assert "held-out accuracy" in capsys.readouterr().err


def test_an_earlier_run_is_put_aside_and_never_overwritten(recipe, tmp_path):
    assert run("train", recipe, "train.max_steps=2") == 0
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run("train", recipe, "train.max_steps=2") == 0
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == first


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    assert run("train", recipe) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_resume_goes_on_from_the_newest_checkpoint(recipe, tmp_path, capsys):
    assert run("train", recipe, "--resume", "train.max_steps=4") == 0
    assert "going on from" not in capsys.readouterr().err
    assert run("train", recipe, "--resume") == 0
    assert "step-4" in capsys.readouterr().err
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    # The held-out pairs first and last; as in a run that was never stopped, not where the shorter one ended.
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.filterwarnings("default::dpo_kit.errors.DpoKitWarning")
def test_the_policy_can_be_made_from_a_corpus(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 40))
    pairs = write_rows(tmp_path / "pairs.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
        "num_attention_heads: 2, max_position_embeddings: 64}}\n"
        f"sft: {{corpus: {corpus}, vocabulary: 300, max_length: 32, train: {{max_steps: 30, batch_size: 8, "
        "learning_rate: 1e-2, logging_steps: 5, disable_tqdm: true, bf16: false}}\n"
        f"data: {{train: {pairs}}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, batch_size: 8, max_steps: 2, "
        "disable_tqdm: true, bf16: false}\n"
    )
    assert run("train", recipe) == 0
    assert "warning: the texts fill a vocabulary" in capsys.readouterr().err
    lines = [json.loads(x) for x in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_logps_equal_full_logits(tmp_path, model_folder):
    pairs = write_rows(tmp_path / "pairs.jsonl")
    assert run("logps", model_folder, pairs, "--out", tmp_path / "out.parquet") == 0
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == [
        "source", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens",
    ]  # fmt: skip
    from dpo_kit.models import load_model
    from dpo_kit.tokenizer import load_tokenizer

    data = tokenize_pairs(load_pairs(pairs), load_tokenizer(model_folder)).dataset
    model = load_model(model_folder, torch.float64).eval()
    for i, row in enumerate(data):
        pair = PairTokens.from_row(row)
        entries = full_logit_logprobs(model, [pair])
        chosen, rejected = entries[: len(pair.chosen)].sum(), entries[len(pair.chosen) :].sum()
        assert table["chosen_logp"][i].as_py() == pytest.approx(chosen.item(), rel=1e-5)
        assert table["rejected_logp"][i].as_py() == pytest.approx(rejected.item(), rel=1e-5)
        assert table["chosen_tokens"][i].as_py() == len(pair.chosen)


def test_logps_are_of_pairs(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b", "label": True}])
    assert run("logps", tmp_path / "no-model", data, "--out", tmp_path / "out.parquet") != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "field 'SOURCES': log-probs are computed of pairs, and these are unpaired rows. Give rows" in said


def change_row(line, **changes):
    def change(tmp_path, model_folder):
        rows = [dict(row) for row in ROWS]
        for key, value in changes.items():
            if value is None:
                del rows[line - 1][key]
            else:
                rows[line - 1][key] = value
        write_rows(tmp_path / "pairs.jsonl", rows)
        return []

    return change


def write_text(text):
    def change(tmp_path, model_folder):
        (tmp_path / "pairs.jsonl").write_text(text)
        return []

    return change


def without_weights(tmp_path, model_folder):
    folder = tmp_path / "weightless"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    return [f"model.path={folder}"]


def without_eos(tmp_path, model_folder):
    folder = tmp_path / "endless"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return [f"model.path={folder}"]


def messages(tmp_path, model_folder):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    write_rows(tmp_path / "pairs.jsonl", [row])
    return []


BAD_INPUT = {
    "missing file": (lambda *_: ["data.train=nowhere.jsonl"], r"nowhere\.jsonl"),
    "unknown format": (lambda *_: ["data.format=hhh"], r"hhh"),
    "broken JSON": (write_text('{"prompt": "a"\n'), r"pairs\.jsonl:1"),
    "a row without chosen": (change_row(3, chosen=None), r"pairs\.jsonl:3: field 'chosen'"),
    "a null": (change_row(4, chosen=7), r"pairs\.jsonl:4: field 'chosen'"),
    "empty completion": (change_row(5, rejected=""), r"pairs\.jsonl:5: field 'rejected'"),
    "chosen equal to rejected": (change_row(6, chosen=" x", rejected=" x"), r"pairs\.jsonl:6"),
    "unknown key": (lambda *_: ["train.lerning_rate=1"], r"Did you mean 'learning_rate'"),
    "unknown loss": (lambda *_: ["loss.name=dqo"], r"Did you mean 'dpo'"),
    "no model": (lambda *_: ["model.path=./nowhere"], r"\./nowhere: field 'model"),
    "no weights": (without_weights, r"no weights"),
    "no EOS": (without_eos, r"no EOS"),
    "no chat template": (messages, r"chat template"),
    "all too long": (lambda *_: ["data.max_length=4"], r"data\.max_length"),
    "reward": (lambda *_: ["eval.reward=nowhere.py:f"], r"nowhere\.py"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_and_leaves_nothing(name, recipe, tmp_path, model_folder, capsys):
    change, expected = BAD_INPUT[name]
    assert run("train", recipe, *change(tmp_path, model_folder)) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "model").exists()


def unfinished(folder):
    """As if the run had been killed after its last checkpoint."""
    for name in ("summary.json", "model"):
        path = folder / name
        path.rename(path.with_name(f"was-{name}"))


def test_a_loss_that_is_not_finite_leaves_status_1_and_the_last_checkpoint(recipe, tmp_path, capsys):
    # The first step of a warm-up has learning rate 0, the second one ruins the weights.
    settings = ["train.learning_rate=1e30", "train.warmup_steps=5", "train.save_steps=1"]
    assert run("train", recipe, *settings) == 1
    error = capsys.readouterr().err
    assert re.search(r"not finite at step \d+", error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "model").exists()
    assert "step-1" in {p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")}


def test_resume_of_a_finished_run_changes_nothing(recipe, tmp_path, capsys):
    assert run("train", recipe) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run("train", recipe, "--resume") == 0
    assert "is finished" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resume_after_the_last_checkpoint_trains_no_further(recipe, tmp_path):
    assert run("train", recipe, "train.max_steps=4") == 0
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    unfinished(tmp_path / "run")
    assert run("train", recipe, "--resume", "train.max_steps=4") == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["eval/loss"] == summary["eval/loss"]
    assert again["tokens_saved_share"] == summary["tokens_saved_share"]


def test_resume_refuses_another_recipe_and_a_folder_that_is_no_run(recipe, tmp_path, capsys):
    assert run("train", recipe, "train.max_steps=2") == 0
    assert run("train", recipe, "--resume", "loss.name=sft") == 2
    assert "field 'loss" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    assert run("train", recipe, "--resume", f"train.output_dir={tmp_path / 'thesis'}") == 2
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_an_earlier_run_where_it_is(recipe, tmp_path):
    assert run("train", recipe, "train.max_steps=2") == 0
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    wrong = ["data.max_length=4", f"model.path={tmp_path / 'empty'}", "model.lora={r: 0}"]
    for override in wrong:
        assert run("train", recipe, override) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_weights_that_lack_a_layer_are_refused(recipe, tmp_path, model_folder, capsys):
    folder = tmp_path / "holes"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert run("train", recipe, f"model.path={folder}") == 2
    assert "up_proj" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-9])
    assert run("train", recipe, f"model.path={folder}") == 2


def test_json_is_alone_on_stdout(recipe, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Film 1:"}])
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(text):\n    print('noise')\n    return 0.0\n")
    settings = [f"eval.prompts={prompts}", f"eval.reward={reward}:reward", "eval.max_new_tokens=3"]
    assert run("train", recipe, "train.max_steps=2", "--json", *settings) == 0
    assert json.loads(capsys.readouterr().out)["eval/reward_after"] == 0.0


@pytest.mark.parametrize("override", ["loss=5", "loss=[5]", "train.eval_strategy=steps data.eval=[]"])
def test_more_that_is_refused(recipe, override):
    assert run("train", recipe, *override.split(" ")) == 2


def test_a_bare_no_is_a_strategy(recipe):
    assert run("train", recipe, "train.max_steps=1", "train.save_strategy=no") == 0


def test_debug_may_stand_behind_the_command(recipe, capsys):
    assert run("train", recipe, "loss.name=dqo", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_import_and_help_are_quick():
    for command in (["-c", "import dpo_kit"], ["-m", "dpo_kit", "--help"]):
        times = []
        for _ in range(3):
            # Of the processor: other tests run beside this one.
            started = os.times().children_user
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times.append(os.times().children_user - started)
        assert 0 < min(times) < 1


def test_public_names():
    import dpo_kit

    for name in dpo_kit.__all__:
        assert getattr(dpo_kit, name) is not None
    with pytest.raises(AttributeError):
        _ = dpo_kit.nothing
