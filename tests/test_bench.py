"""`dpo-kit bench` on small models: its figures add up and are of the recipe's work; nothing is left over."""

import json

import pytest
import torch
from families import make_model
from test_cli import ROWS, TEXTS, run, write_rows

from dpo_kit import bench, roofline
from dpo_kit.bench.memory import MemoryMeter, what_fits
from dpo_kit.bench.profile import _group, _labelled
from dpo_kit.bench.steps import StepWatch
from dpo_kit.config import PreferenceConfig
from dpo_kit.examples import PairTokens
from dpo_kit.models import load_model
from dpo_kit.pairs import load_pairs
from dpo_kit.recipe import Recipe
from dpo_kit.roofline import count_work
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer


@pytest.fixture(scope="module", autouse=True)
def _small_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_LARGE", {"cpu": (128, 128, 128)})
        patch.setattr(bench, "_RATE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer beside it, pairs, a recipe, and a run folder that holds something."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = train_byte_level_bpe(TEXTS * 20, 262)
    tokenizer.save_pretrained(folder / "model")
    special = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    make_model("llama", vocab_size=len(tokenizer), **special).save_pretrained(folder / "model")
    pairs = write_rows(folder / "pairs.jsonl")
    # All pairs in each step: what a step computes is known.
    (folder / "recipe.yaml").write_text(
        f"model: {{path: {folder / 'model'}}}\n"
        f"data: {{train: {pairs}, eval: {pairs}}}\n"
        f"train: {{output_dir: {folder / 'run'}, batch_size: {len(ROWS)}, max_steps: 100, bf16: false, "
        "save_strategy: steps, eval_strategy: steps, eval_steps: 50, load_best_model_at_end: true, "
        "save_steps: 50}\n"
    )
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("mine\n")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return bench.run_bench(Recipe.load(folder / "recipe.yaml"), steps=2, out=folder / "results.json")


def test_the_work_is_that_of_the_recipe(results, folder):
    data = tokenize_pairs(load_pairs(folder / "pairs.jsonl"), load_tokenizer(folder / "model")).dataset
    pairs = [PairTokens.from_row(row) for row in data]
    work = count_work(pairs, len(pairs), load_model(folder / "model"))
    step = results["step"]
    for name in ("distinct_tokens", "separate_tokens", "padded_tokens", "predictions"):
        assert step[name] == getattr(work, name)
    assert results["limit"]["flops_per_step"] == work.flops
    assert step["tree_saves_of_separate"] == 1 - work.distinct_tokens / work.separate_tokens
    speed, limit = results["speed"], results["limit"]
    assert speed["steps"] == 2
    assert speed["layout"] == "tree"
    assert speed["slowest_step_seconds"] >= speed["seconds_per_step"] > 0
    # Both steps hold the same, so that medians of rates lie between those of the two times.
    slow, fast = (len(pairs) / s for s in (speed["slowest_step_seconds"], speed["seconds_per_step"] / 2))
    assert slow <= speed["pairs_per_second"] <= fast
    assert limit["share"] == pytest.approx(
        work.flops / limit["flops_per_second"] * speed["pairs_per_second"] / len(pairs)
    )
    assert limit["flops_per_second"] == max(limit["matmul_rates"]["fp32"].values())


def test_parts_make_up_the_whole(results):
    assert sum(results["time"].values()) == pytest.approx(100)
    assert min(results["time"].values()) > 0
    memory, model = results["memory"], results["model"]
    assert sum(memory["parts"].values()) == memory["peak_bytes"]
    assert min(memory["parts"].values()) >= 0
    weights = 4 * model["parameters"]
    # Beside the weights: rotary frequencies. Beside the two moments: a step count for each parameter.
    assert weights <= memory["parts"]["weights"] < 1.02 * weights
    assert memory["parts"]["reference"] == memory["parts"]["weights"]
    assert memory["parts"]["gradients"] == weights
    assert 2 * weights < memory["parts"]["optimiser state"] < 2.02 * weights


def test_nothing_of_the_run_folder_is_touched(results, folder):
    assert [p.name for p in (folder / "run").iterdir()] == ["metrics.jsonl"]
    assert (folder / "run" / "metrics.jsonl").read_text() == "mine\n"
    assert json.loads((folder / "results.json").read_text()) == results
    assert {p.name for p in folder.iterdir()} == {
        "model", "pairs.jsonl", "recipe.yaml", "run", "results.json",
    }  # fmt: skip


def test_the_command_prints_json_and_the_tables_hold_it(folder, capsys):
    pytest.importorskip("peft")
    lora = "model.lora={r: 2, target_modules: [q_proj]}"
    arguments = ("bench", folder / "recipe.yaml", lora, "train.batch_size=8", "--steps", "1")
    assert run(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    trained = found["model"]["trainable_parameters"]
    assert trained == 2 * 2 * (32 + 32)
    assert found["memory"]["parts"]["gradients"] == 4 * trained
    assert found["data"] == {"pairs": len(ROWS), "pairs_per_step": 8}
    bench.print_results(found)
    printed = capsys.readouterr().out
    for title in ("how fast", "share of the limit", "optimiser state", "largest step", "planning and data"):
        assert title in printed


@pytest.mark.filterwarnings("default::dpo_kit.errors.DpoKitWarning")
def test_a_policy_from_a_corpus_is_not_trained_on_it(folder, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 40))
    recipe = Recipe.check(
        {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                }
            },
            "sft": {
                "corpus": str(tmp_path / "corpus.txt"),
                "vocabulary": 300,
                "train": {"num_train_epochs": 10**6},
            },
            "data": {"train": str(folder / "pairs.jsonl")},
            "train": {"output_dir": str(tmp_path / "run"), "bf16": False, "batch_size": 8},
        }
    )
    assert bench.run_bench(recipe, steps=1)["speed"]["pairs_per_second"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]


def test_without_a_recipe(monkeypatch, capsys):
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(bench._MODELS, "cpu", tiny)
    monkeypatch.setattr(bench, "_VOCABULARY", 300)
    assert run("bench", "--steps", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"]["distinct_tokens"] < found["step"]["separate_tokens"]
    assert {"fp32", "bf16"} <= set(found["limit"]["matmul_rates"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.path=./nowhere"], "./nowhere"),
        (["train.lerning_rate=1"], "learning_rate"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--steps", "0"], "--steps"),
        (["--out", "nowhere/results.json"], "--out"),
    ],
)
def test_bad_input_is_named(folder, capsys, arguments, named):
    assert run("bench", folder / "recipe.yaml", *arguments) == 2
    assert named in capsys.readouterr().err
    assert run("bench", folder / "none.yaml") == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model whose activations are large enough to be seen, after its measured steps."""
    random = torch.Generator().manual_seed(0)

    def tokens(length):
        return torch.randint(3, 97, (length,), generator=random).tolist()

    rows = [
        {"prompt_ids": tokens(60), "chosen_ids": tokens(40), "rejected_ids": tokens(40)} for _ in range(64)
    ]
    config = PreferenceConfig(
        output_dir=str(tmp_path_factory.mktemp("trained")), batch_size=8, max_steps=3, bf16=False,
        tokens_per_micro_batch=600, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        reference_mode="live",
    )  # fmt: skip
    model = make_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    trainer = PreferenceTrainer(model, args=config, train_dataset=_dataset(rows))
    memory = MemoryMeter(config.device)
    watch = StepWatch(trainer, memory, warm_up=1, steps=1)
    trainer.train()
    return trainer, memory, watch


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_backward_products_belong_to_the_part_that_made_them(trained):
    _, _, watch = trained
    products = [
        _group(event.name, labels)
        for event, labels in _labelled(watch.profile._profiler.events())
        if event.name == "aten::mm"
    ]
    # Of 7 matrices in 6 layers, in two micro-batches: forward, and twice backward; the reference once.
    assert products.count("body") == 2 * 7 * 6 * 3
    assert products.count("reference") >= 2 * 7 * 6
    assert set(products) <= {"body", "head", "reference"}


def test_what_fits_is_found_from_two_sizes(trained):
    trainer, memory, watch = trained
    found = what_fits(trainer, memory, watch.pairs)
    if not memory.can_reset:
        assert found["how"].startswith("unknown")
        return
    assert found["in_use"] == 600
    assert found["largest_step_tokens"] == 8 * 140
    # A token keeps at least its inputs of the 7 products of each layer: 4 x 256 of attention, 256 and
    # 2 x 1024 of the feed-forward net, in fp32.
    least = 6 * 4 * (3 * 256 + 2 * 1024)
    assert least < found["bytes_per_token"] < 20 * least
    assert found["largest_tokens_per_micro_batch"] * found["bytes_per_token"] < found["available_bytes"]
    assert found["how"].startswith("estimated")
    assert all(p.grad is None for p in trainer.model.parameters())
