"""Real dialogues: the same loss and gradients as TRL, and log-probs of every pair on every family."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from families import TREE_FAMILIES, make_model

from dpo_kit.cli import main
from dpo_kit.config import PreferenceConfig
from dpo_kit.examples import PairTokens
from dpo_kit.pairs import load_pairs
from dpo_kit.scoring import full_logit_logprobs
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer

HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-base/test.jsonl.gz"
pytestmark = pytest.mark.skipif(not HH.exists(), reason="the HH sample is not in ../shared/data")


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(HH, invalid="drop")


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return train_byte_level_bpe(pairs["prompt"][:300] + pairs["chosen"][:300], 1024)


def test_loss_and_gradients_equal_trls_on_a_real_batch(pairs, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed (the ppo extra)")
    rows = pairs.select(range(8)).select_columns(["prompt", "chosen", "rejected"])
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    policy, reference = (make_model("llama", seed=seed, **sizes) for seed in (0, 9))
    ours = PreferenceTrainer(
        policy,
        reference,
        PreferenceConfig(str(tmp_path / "ours"), batch_size=8, bf16=False, loss={"name": "dpo", "beta": 0.1}),
        rows,
        processing_class=tokenizer,
    )
    loss = ours.training_step(ours.model, ours.data_collator([ours.train_dataset[i] for i in range(8)]))
    peer = trl.DPOTrainer(
        make_model("llama", seed=0, **sizes),
        make_model("llama", seed=9, **sizes),
        trl.DPOConfig(str(tmp_path / "trl"), beta=0.1, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    peer.model.eval()
    peer_rows = [peer.train_dataset[i] for i in range(8)]
    for mine, theirs in zip(ours.train_dataset, peer_rows, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert list(mine[name]) == list(theirs[name])
    peer_loss = peer.compute_loss(peer.model, peer.data_collator(peer_rows))
    peer_loss.backward()
    torch.testing.assert_close(loss, peer_loss.detach(), rtol=1e-4, atol=0)
    gradients = dict(ours.model.named_parameters())
    for name, parameter in peer.model.named_parameters():
        scale = parameter.grad.norm()
        assert (gradients[name].grad - parameter.grad).norm() <= 1e-4 * scale, name


def saved_model(family, tokenizer, folder):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    if family == "gpt2":
        sizes = {"vocab_size": len(tokenizer), "n_positions": 4096}
    model = make_model(family, **sizes).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_logps_of_every_pair_equal_full_logits(family, pairs, tokenizer, tmp_path):
    model = saved_model(family, tokenizer, tmp_path / "model")
    with pytest.raises(SystemExit) as left:
        main(["logps", str(tmp_path / "model"), str(HH), "--out", str(tmp_path / "out.parquet")])
    assert not left.value.code
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert len(table) == len(pairs) == 2303
    data = tokenize_pairs(pairs, tokenizer, max_length=None).dataset
    worst = 0.0
    for i, row in enumerate(data):
        pair = PairTokens.from_row(row)
        entries = full_logit_logprobs(model, [pair])
        cut = len(pair.chosen)
        for name, part in (("chosen", entries[:cut]), ("rejected", entries[cut:])):
            exact = part.double().sum().item()
            worst = max(worst, abs(table[f"{name}_logp"][i].as_py() - exact) / abs(exact))
    print(f"{family}: worst relative difference {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.slow
def test_the_hh_recipe_runs_on_the_real_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
    }
    overrides = [
        f"data.train={HH}",
        "model.path=null",
        f"model.config={json.dumps(config)}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_steps=8",
        "train.learning_rate=1e-4",
        "train.warmup_steps=2",
    ]
    recipe = Path(__file__).parents[1] / "recipes" / "hh.yaml"
    with pytest.raises(SystemExit) as left:
        main(["train", str(recipe), *overrides])
    assert not left.value.code
    assert (tmp_path / "run" / "report.html").exists()
