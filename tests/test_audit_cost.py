"""What an epoch costs: tokens counted by hand, arithmetic and memory against the real model."""

import json
import random

import numpy as np
import pytest
import torch
from families import TREE_FAMILIES, make_model
from pair_files import write

from dpo_kit.audit.cost import CostChecks, padded_tokens
from dpo_kit.audit.estimate import estimate, kept_per_token
from dpo_kit.audit.inspection import inspect_pairs
from dpo_kit.audit.words import cost_rows, memory_rows
from dpo_kit.capacity import bytes_per_token
from dpo_kit.errors import InputError
from dpo_kit.examples import PairTokens
from dpo_kit.models import tree_attention
from dpo_kit.packing import pack_tree
from dpo_kit.pairs import load_pairs
from dpo_kit.roofline import count_work
from dpo_kit.tokenization import tokenize_pairs
from dpo_kit.tokenizer import train_byte_level_bpe

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SMALL = {"model_type": "llama", **TREE_FAMILIES["llama"]}


@pytest.fixture(scope="module")
def bytewise():
    """One token for each byte."""
    return train_byte_level_bpe([], 258)


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_tokens_by_hand(tmp_path, bytewise):
    rows = [row("ab", "cd", "ce"), row("ab", "cdf", "x"), row("zz", "y", "yyyy")]
    file = write(tmp_path / "a.jsonl", *rows)
    cost = inspect_pairs(file, tokenizer=bytewise, batch_size=2).figures["cost"]
    # With "." for the end. First step: abcd. abce. abcdf. abx. is the tree of a b (c (d (. f.) e.) x.);
    # second: zzy. zzyyyy. is z z y (. yyy.).
    in_file = (2 + 1 + 1 + 1 + 2 + 2 + 2) + (3 + 1 + 4)
    assert (cost["rows"], cost["steps"]) == (3, 2)
    assert cost["separate"] == (5 + 5 + 6 + 4) + (4 + 7)
    assert cost["completions"] == 3 + 3 + 4 + 2 + 2 + 5
    assert cost["orders"]["file"] == pytest.approx(1 - in_file / 31)
    assert cost["saved_share"] == cost["orders"]["shuffled"] == pytest.approx(1 - cost["distinct"] / 31)
    assert "model" not in cost
    whole = inspect_pairs(file, tokenizer=bytewise, batch_size=3).figures["cost"]
    assert (whole["distinct"], whole["largest_step"], whole["steps"]) == (in_file, in_file, 1)
    # One micro-batch of six sequences, none longer than zzyyyy.
    assert whole["padded"] == 6 * 7


def test_padding_is_counted_in_micro_batches_of_eight_rows():
    short, long = pairs_of(1, prompt=2, reply=1)[0], pairs_of(1, prompt=9, reply=1)[0]
    assert padded_tokens([short] * 8 + [long] * 2) == 16 * 3 + 4 * 10


def test_tokens_are_those_of_training(tmp_path, bytewise):
    draw = random.Random(0)
    words = ["tea ", "milk ", "rain "]
    rows = [
        row(*("".join(draw.choices(words, k=draw.randint(1, 9))) + str(i) for i in range(3)))
        for _ in range(50)
    ]
    file = write(tmp_path / "a.jsonl", *rows)
    settings = {"max_length": 60, "overlong": "cut_prompt_left"}
    cost = inspect_pairs(file, tokenizer=bytewise, batch_size=16, **settings).figures["cost"]
    dataset = tokenize_pairs(load_pairs(file), bytewise, cache_dir=tmp_path, **settings).dataset
    pairs = [PairTokens.from_row(each) for each in dataset]
    in_file = count_work(pairs, 16, make_model("llama"))
    assert cost["rows"] == len(dataset) == 50
    assert cost["separate"] == in_file.separate_tokens
    assert cost["orders"]["file"] == pytest.approx(1 - in_file.distinct_tokens / in_file.separate_tokens)
    order = np.random.default_rng(0).permutation(50)
    shuffled = count_work([pairs[i] for i in order], 16, make_model("llama"))
    assert cost["distinct"] == shuffled.distinct_tokens


def test_the_headline_is_the_order_of_a_run_and_not_that_of_the_file(tmp_path, bytewise):
    # Four rows of each of 32 prompts, which the file keeps together and a run does not.
    rows = [row(f"{i // 4:02} prompt " * 8, f"yes {i}", f"no {i}") for i in range(128)]
    cost = inspect_pairs(write(tmp_path / "a.jsonl", *rows), tokenizer=bytewise, batch_size=4).figures["cost"]
    orders = cost["orders"]
    assert orders["by_prompt"] > 0.75
    assert orders["file"] > 0.75 > 0.55 > orders["shuffled"] > 0.4
    assert cost["saved_share"] == orders["shuffled"]
    words = dict(cost_rows(cost))
    assert words["saved with group_by_prompt"] == f"{100 * orders['by_prompt']:.1f} %"


def test_of_rows_too_many_to_hold_a_sample_is_dealt(tmp_path, bytewise, monkeypatch):
    rows = [row(f"{i % 100:02} prompt " * 8, f"yes {i}", f"no {i}") for i in range(400)]
    file = write(tmp_path / "a.jsonl", *rows)
    whole = inspect_pairs(file, tokenizer=bytewise, batch_size=8).figures["cost"]
    monkeypatch.setattr("dpo_kit.audit.cost._HELD_TOKENS", whole["separate"] // 3)
    part = inspect_pairs(file, tokenizer=bytewise, batch_size=8).figures["cost"]
    assert whole["sampled"] == 1
    assert 0.25 < part["sampled"] < 0.4
    for exact in ("rows", "steps", "separate", "completions"):
        assert part[exact] == whole[exact]
    assert part["orders"]["file"] == whole["orders"]["file"]
    assert part["orders"]["by_prompt"] == pytest.approx(whole["orders"]["by_prompt"], abs=0.02)
    assert part["saved_share"] == pytest.approx(whole["saved_share"], abs=0.03)
    assert part["distinct"] == pytest.approx(whole["distinct"], rel=0.06)
    assert part["padded"] == pytest.approx(whole["padded"], rel=0.02)


def test_what_it_costs_is_no_finding(tmp_path, bytewise):
    audit = inspect_pairs(write(tmp_path / "a.jsonl", row("ab", "cd", "ce")), tokenizer=bytewise)
    assert "cost" not in {finding.name for finding in audit.findings}


def test_rows_that_the_model_cannot_take(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("ab", "c", "d"), row("a" * 50, "c", "d"))
    fields = {**SMALL, "vocab_size": 90, "max_position_embeddings": 40}
    audit = inspect_pairs(file, tokenizer=bytewise, model=fields)
    found = {finding.name: finding for finding in audit.findings}
    limit = bytewise("a")["input_ids"][0] >= 90 or bytewise("d")["input_ids"][0] >= 90
    assert ("ids_beyond_vocabulary" in found) == limit
    long = found["longer_than_model"]
    assert (long.severity, long.places) == ("warning", (f"{file}:2",))
    assert "the 40 positions of the model" in long.sentence
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 300,
        "n_positions": 40,
    }
    learned = inspect_pairs(file, tokenizer=bytewise, model=gpt2).findings
    assert {finding.name: finding.severity for finding in learned}["longer_than_model"] == "error"
    tiny = inspect_pairs(file, tokenizer=bytewise, model={**SMALL, "vocab_size": 10})
    beyond = {finding.name: finding for finding in tiny.findings}["ids_beyond_vocabulary"]
    assert (beyond.severity, beyond.count, beyond.of) == ("error", 2, 2)


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 7}, {"num_hidden_layers": -5}, {"hidden_size": -64}]
)
def test_a_configuration_of_which_no_model_can_be_made_is_said_first(tmp_path, bytewise, wrong):
    with pytest.raises(InputError, match="field 'model'"):
        inspect_pairs(tmp_path / "not_there.jsonl", tokenizer=bytewise, model={**SMALL, **wrong})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, "hidden_size": 64, **wrong}))
    with pytest.raises(InputError, match="field 'model'"):
        inspect_pairs(tmp_path / "not_there.jsonl", tokenizer=bytewise, model=folder)


def pairs_of(count, prompt=60, reply=30):
    draw = np.random.default_rng(0)
    return [
        PairTokens(*(draw.integers(5, 90, size) for size in (prompt, reply, reply))) for _ in range(count)
    ]


def test_the_arithmetic_of_a_sample_is_scaled_to_the_epoch():
    pairs = pairs_of(8)
    whole = count_work(pairs, 2, make_model("llama"))
    steps = [pairs[i : i + 2] for i in (0, 4)]
    found = estimate(SMALL, steps, distinct=whole.distinct_tokens, largest_step=240, device="cpu")
    # All steps are of one size.
    assert found["flops"] == pytest.approx(whole.flops, rel=1e-9)
    low, high = found["seconds"]
    assert low == pytest.approx(found["flops"] / found["flops_per_second"] / 0.75)
    assert high == pytest.approx(found["flops"] / found["flops_per_second"] / 0.5)


def test_memory_of_a_small_model_by_hand():
    found = estimate(SMALL, [pairs_of(2)], distinct=240, largest_step=240, device="cpu")
    parameters = sum(p.numel() for p in make_model("llama").parameters())
    assert found["parameters"] == parameters
    memory = found["memory"]
    assert memory["weights"] + memory["gradients"] + memory["moments"] == 16 * parameters
    # 240 tokens, fewer than the smallest micro-batch, in a vocabulary of 97.
    activations = 240 * memory["activations_per_token"]
    assert memory["whole_step"] == memory["least"] == int(16 * parameters + activations + 240 * 97 * 4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "olmo2"])
def test_activations_are_those_that_the_real_model_keeps(family):
    model, pairs = make_model(family), pairs_of(8)
    with tree_attention(model):
        kept = bytes_per_token(model, pack_tree(pairs[:4]), pack_tree(pairs))
    assert kept_per_token(model.config.to_dict()) == pytest.approx(kept, rel=0.2)


def test_a_model_of_7_billion_parameters_is_not_allocated():
    # 27 GB in fp32: more than the test machine has. Llama 2's own count is 6,738,415,616.
    found = estimate(LLAMA_7B, [pairs_of(2)], distinct=240, largest_step=2048, device="cpu")
    assert found["parameters"] == 6_738_415_616
    # Of each layer at the very least the inputs of its seven matrices: four of the hidden size (three of them
    # are one tensor), one of the intermediate size.
    assert found["memory"]["activations_per_token"] > 32 * 4 * (3 * 4096 + 11008)
    assert found["memory"]["whole_step"] > found["memory"]["least"] > 16 * 6_738_415_616


def test_activations_of_experts_are_unknown_and_the_rest_is_estimated():
    fields = {"model_type": "mixtral", **TREE_FAMILIES["llama"], "num_local_experts": 4}
    assert kept_per_token(fields) is None
    found = estimate(fields, [pairs_of(2)], distinct=240, largest_step=240, device="cpu")
    assert found["memory"]["activations_per_token"] is None
    assert found["memory"]["least"] == 16 * found["parameters"] + 240 * 97 * 4
    assert found["uncounted"] == []
    assert "memory with the largest step at once (without activations)" in dict(memory_rows(found["memory"]))


def test_a_model_that_is_too_large_is_said_to_be(tmp_path, bytewise, monkeypatch):
    monkeypatch.setattr("dpo_kit.audit.estimate.machine_bytes", lambda device: 10**5)
    file = write(tmp_path / "a.jsonl", row("ab", "cd", "ce"))
    audit = inspect_pairs(file, tokenizer=bytewise, model={**SMALL, "vocab_size": 300})
    found = {finding.name: finding for finding in audit.findings}
    assert found["model_too_large"].severity == "warning"
    assert "this machine (cpu) has 0 MiB" in found["model_too_large"].sentence


def test_a_models_folder_is_read_without_its_weights(tmp_path, bytewise):
    make_model("llama").config.save_pretrained(tmp_path / "model")
    file = write(tmp_path / "a.jsonl", row("ab", "cd", "ce"))
    audit = inspect_pairs(file, tokenizer=bytewise, model=tmp_path / "model")
    parameters = sum(p.numel() for p in make_model("llama").parameters())
    assert audit.figures["cost"]["model"]["parameters"] == parameters


def test_a_model_needs_a_tokenizer_and_a_real_configuration(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("ab", "cd", "ce"))
    with pytest.raises(InputError, match="counted in tokens"):
        inspect_pairs(file, model=SMALL)
    with pytest.raises(InputError, match="field 'model'"):
        inspect_pairs(file, tokenizer=bytewise, model={"model_type": "nonesuch"})
    with pytest.raises(ValueError, match="batch_size"):
        CostChecks(batch_size=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_rate_is_that_of_bf16():
    found = estimate(SMALL, [pairs_of(2)], distinct=240, largest_step=240)
    assert (found["device"], found["dtype"]) == ("cuda", "bf16")
    assert found["memory"]["machine"] > 2**30
