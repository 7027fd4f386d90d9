"""Reward models from pairs and from ranked lists, end to end; and what they say of replies afterwards."""

import dataclasses
import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from families import make_model
from pair_files import write

from dpo_kit.cli import main
from dpo_kit.comparison.reward_model import reward_model_recipe, trained_reward_model
from dpo_kit.encoding import encode_rows
from dpo_kit.errors import InputError
from dpo_kit.evaluation import load_reward
from dpo_kit.examples import PairTokens
from dpo_kit.losses import LogProbs, make_objective
from dpo_kit.models import load_reward_model
from dpo_kit.packing import pack_tree
from dpo_kit.recipe import Recipe
from dpo_kit.scoring import full_rewards, sequence_rewards
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

GOOD, BAD = ["good", "fine", "lovely"], ["bad", "poor", "dull"]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def lists(rewards, scores, example):
    example = torch.tensor(example)
    return LogProbs(
        policy=None,
        example=example,
        num_examples=int(example.max()) + 1,
        shape="lists",
        scores=f64(*scores),
        rewards=f64(*rewards).requires_grad_(),
    )


def loss_of(logps, **settings):
    return make_objective({"name": "rank_scores", **settings})(logps)


# The loss.


def test_rank_scores_by_hand():
    """Blom's scores of three are Phi^-1((1 - 3/8) / (3 + 1/4)), 0, and the first one's mirror image."""
    b = NormalDist().inv_cdf(0.625 / 3.25)
    assert b == pytest.approx(-0.8694, abs=1e-4)
    # Two lists at once, replies ordered by their place: first replies, second ones, and a third of one list.
    logps = lists([1.0, 0.5, 0.0, -0.5, 2.0], [7.0, 0.0, -3.0, 1.0, 0.5], [0, 1, 0, 1, 0])
    c = NormalDist().inv_cdf(0.625 / 2.25)
    # List 0: rewards 1, 0, 2 with ranks 3, 1, 2. List 1: rewards 0.5, -0.5 with ranks 1, 2.
    first = [1 - 1 + b, 0 - 1 - b, 2 - 1 - 0]
    second = [0.5 - c, -0.5 + c]
    expected = f64(np.mean(np.square(first)), np.mean(np.square(second)))
    torch.testing.assert_close(loss_of(logps), expected)


def test_rank_scores_knows_ranks_alone_and_the_scores_where_asked():
    first, second = (lists([0.3, -1, 2], s, [0, 0, 0]) for s in ([1, 2, 3], [-50, 0.1, 0.2]))
    torch.testing.assert_close(loss_of(first), loss_of(second))
    assert loss_of(first, targets="scores") != loss_of(second, targets="scores")
    perfect = lists([11, 12, 13], [1, 2, 3], [0, 0, 0])
    assert loss_of(perfect, targets="scores").item() == pytest.approx(0)
    with pytest.raises(InputError, match="quantiles"):
        make_objective({"name": "rank_scores", "targets": "ranks"})


def test_rank_scores_limits_one_reply_ties_and_a_free_constant():
    assert loss_of(lists([5.0], [1.0], [0])).tolist() == [0]
    logps = lists([1.0, 3.0], [2.0, 2.0], [0, 0])
    loss = loss_of(logps)
    assert loss.tolist() == [1.0]
    loss.sum().backward()
    assert logps.rewards.grad.tolist() == [-1.0, 1.0], "equally good replies are drawn together"
    # Ranks 1, 2.5, 2.5, 4 of four.
    tied = lists([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 2.0], [0] * 4)
    outer = NormalDist().inv_cdf(0.625 / 4.25)
    assert loss_of(tied).item() == pytest.approx(2 * outer**2 / 4)
    moved = dataclasses.replace(tied, rewards=tied.rewards + 9)
    torch.testing.assert_close(loss_of(moved), loss_of(tied))


def test_rank_scores_on_pairs_is_least_at_blooms_distance():
    best = -2 * NormalDist().inv_cdf(0.625 / 2.25)
    for margin, expected in ((best, 0.0), (best + 2, 1.0)):
        logps = LogProbs.of_pairs(f64(0), f64(0))
        logps = dataclasses.replace(logps, policy=None, rewards=f64(margin, 0))
        assert loss_of(logps).item() == pytest.approx(expected, abs=1e-12)


# Runs.


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A causal LM with its tokenizer, pairs and ranked lists in which the good words are better."""
    folder = tmp_path_factory.mktemp("start")
    words = " ".join(GOOD + BAD)
    tokenizer = train_byte_level_bpe([f"film {i}: {words}" for i in range(20)], 300)
    tokenizer.save_pretrained(folder / "lm")
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(folder / "lm")
    pairs, ranked = [], []
    for i in range(48):
        g, b = GOOD[i % 3], BAD[i // 3 % 3]
        pairs.append({"prompt": f"film {i}:", "chosen": f" {g}", "rejected": f" {b}"})
        completions = [f" {b} {b}", f" {g}", f" {g} {b}"]
        ranked.append({"prompt": f"film {i}:", "completions": completions, "scores": [0, 3, 1]})
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "lists.jsonl", *ranked)
    return folder


def recipe_of(start, folder, **changes):
    content = {
        "model": {"path": str(start / "lm")},
        "data": {
            "train": str(start / "pairs.jsonl"),
            "eval": str(start / "pairs.jsonl"),
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "output_dir": str(folder / "run"),
            "batch_size": 8,
            "max_steps": 12,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    return Recipe.check(content | changes)


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = recipe_of(start, folder, reference={"mode": "live"}, ppo={"target_kl": 3.0})
    place = trained_reward_model(recipe, folder / "reward_model", lambda line: None)
    return recipe, place


def with_reward_model(recipe, path):
    return Recipe.check(recipe.model_dump() | {"reward_model": {"path": str(path)}})


def test_it_is_an_ordinary_run_and_is_trained_once(trained, start):
    recipe, place = trained
    folder = place.parent
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval/accuracy"] > 0.9
    assert not (folder / "report.html").exists()
    written = (place / "model.safetensors").stat().st_mtime_ns
    # What is not about pairs or policy makes no other reward model.
    other = Recipe.check(recipe.model_dump() | {"loss": {"name": "ipo"}, "best_of_n": {"n": [1, 2]}})
    assert trained_reward_model(other, folder, lambda line: None) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    given = recipe.model_copy(
        update={"reward_model": recipe.reward_model.model_copy(update={"path": str(place)})}
    )
    assert trained_reward_model(given, folder / "not used", lambda line: None) == place
    assert not (folder / "not used").exists()


def test_a_given_path_must_be_a_reward_model(trained, start, tmp_path):
    for path, message in ((start / "lm", "no reward model"), (start / "nowhere", "no such folder")):
        with pytest.raises(InputError, match=message) as caught:
            trained_reward_model(with_reward_model(trained[0], path), tmp_path, print)
        assert caught.value.field == "reward_model.path"


def test_settings_of_the_section_go_over_those_of_the_run(start, tmp_path):
    section = {"loss": {"name": "bradley_terry", "centring": 0.01}, "train": {"max_steps": 3}}
    found = reward_model_recipe(recipe_of(start, tmp_path, reward_model=section), tmp_path / "rm")
    assert (found.loss, found.train["max_steps"], found.train["batch_size"]) == (section["loss"], 3, 8)
    assert found.train["output_dir"] == str(tmp_path / "rm")
    assert found.eval.prompts is None


@pytest.mark.parametrize(
    ("loss", "data", "accuracy"),
    [
        ("rank_scores", {}, 0.95),
        ("{name: rank_scores, targets: scores}", {}, 0.95),
        ("bradley_terry", {}, 0.95),
        # InstructGPT's way: all pairs of a list in one step.
        ("bradley_terry", {"train.group_by_prompt": "true", "train.batch_size": "9"}, 0.95),
    ],
)
def test_from_ranked_lists_through_the_command_line(loss, data, accuracy, start, tmp_path):
    lists_file = start / "lists.jsonl"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {start / 'lm'}}}\n"
        f"data: {{train: {lists_file}, eval: {lists_file}, cache_dir: {tmp_path / 'cache'}}}\n"
        f"loss: {loss}\nreport: {{enabled: false}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, batch_size: 8, max_steps: 15, learning_rate: 3.0e-3, "
        "lr_scheduler_type: constant, disable_tqdm: true, save_strategy: 'no', use_cpu: true}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "recipe.yaml"), *(f"{k}={v}" for k, v in data.items())])
    assert not left.value.code
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/accuracy"] >= accuracy
    reward = load_reward(f"model:{tmp_path / 'run' / 'model'}")
    best, middle, worst = reward(["film 3:"] * 3, [" good", " good bad", " bad bad"])
    assert best > middle > worst


# Rewards by name.

REPLIES = [" good", "", " bad bad bad lovely", " fine", " good"]
PROMPTS = ["film 1:", "film 2:", "a much longer prompt about film 3:", "film 1:", "film 1:"]


def test_rewards_are_those_of_training_whatever_the_batch(trained):
    """By the trainer's own packing of pairs, and by transformers on each sequence alone."""
    place = trained[1]
    model, tokenizer = load_reward_model(place)[0].eval(), load_tokenizer(place)
    reward = load_reward(f"model:{place}")
    found = torch.tensor(reward(PROMPTS, REPLIES))
    rows = [{"prompt": p, "chosen": r, "rejected": r} for p, r in zip(PROMPTS, REPLIES, strict=True)]
    pairs = [PairTokens(*map(np.array, ids)) for ids, _ in encode_rows(rows, tokenizer, None)]
    assert pairs[1].chosen.tolist() == [tokenizer.eos_token_id], "an empty reply is its end"
    with torch.no_grad():
        of_training = sequence_rewards(model, pack_tree(pairs))[: len(pairs)]
    torch.testing.assert_close(found, of_training, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, full_rewards(model, pairs)[: len(pairs)], rtol=1e-5, atol=1e-5)
    alone = [reward([p], [r])[0] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-5, atol=1e-5)
    reward._token_budget = 12
    torch.testing.assert_close(found, torch.tensor(reward(PROMPTS, REPLIES)), rtol=1e-5, atol=1e-5)
    assert found[0] == found[4]
    assert found.std() > 0.1
    assert reward([], []) == []


def test_messages_go_through_the_chat_template_as_the_recipe_sets_it(trained, tmp_path):
    place = trained[1]
    model, tokenizer = load_reward_model(place)[0].eval(), load_tokenizer(place)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{{ loud }} {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{{ loud }} {% endif %}"
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = [{"role": "user", "content": "film"}]
    found = []
    for settings in (None, {"loud": "!"}):
        if settings:
            (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {"chat_template_kwargs": settings}}))
        reply = [{"role": "assistant", "content": "good"}]
        row = {"prompt": prompt, "chosen": reply, "rejected": reply}
        ((ids, _),) = encode_rows([row], tokenizer, settings)
        (value,) = load_reward(f"model:{tmp_path / 'model'}")([prompt], ["good"])
        assert value == pytest.approx(
            full_rewards(model, [PairTokens(*map(np.array, ids))])[0].item(), abs=1e-5
        )
        found.append(value)
    assert found[0] != found[1]


def test_an_adapter_is_a_reward_model_too(start, tmp_path):
    pytest.importorskip("peft")
    recipe = recipe_of(
        start, tmp_path, model={"path": str(start / "lm"), "lora": {"r": 2, "target_modules": ["q_proj"]}}
    )
    place = trained_reward_model(recipe, tmp_path / "rm", lambda line: None)
    assert (place / "adapter_config.json").exists()
    accuracy = json.loads((tmp_path / "rm" / "summary.json").read_text())["eval/accuracy"]
    reward = load_reward(f"model:{place}")
    rows = [json.loads(line) for line in (start / "pairs.jsonl").read_text().splitlines()]
    chosen, rejected = (
        reward([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")
    )
    right = np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])
    assert right == pytest.approx(accuracy)
