"""Best-of-N: the estimate over all subsets, the bound of its KL, and a run that can be stopped anywhere."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from families import make_model
from pair_files import write

from dpo_kit.comparison import best_of_n
from dpo_kit.comparison.best_of_n import best_of_n_kl, run_best_of_n, subset_weights
from dpo_kit.errors import InputError
from dpo_kit.evaluation import load_reward, sample_replies
from dpo_kit.models import load_model, load_reward_model
from dpo_kit.recipe import Recipe
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

PROMPTS = ["the film", "a", "the other film was"]


def by_enumeration(learned, rewards, n):
    """The mean over all subsets of the mean reward of the best in each."""
    found = []
    for subset in combinations(range(len(learned)), n):
        best = max(learned[i] for i in subset)
        found.append(np.mean([rewards[i] for i in subset if learned[i] == best]))
    return np.mean(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_estimate_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(n)
    learned, rewards = generator.normal(size=6).tolist(), generator.normal(size=6).tolist()
    weights = subset_weights(learned, n)
    assert weights.sum() == pytest.approx(1)
    assert weights @ rewards == pytest.approx(by_enumeration(learned, rewards, n))


def test_weights_by_hand():
    # Of three replies the best is the better of two in 2 of 3 pairs, the second in 1, the worst never.
    np.testing.assert_allclose(subset_weights([0.5, 9.0, -1.0], 2), [1 / 3, 2 / 3, 0])
    # The two best are alike: each of 3 pairs has one of them or both.
    np.testing.assert_allclose(subset_weights([2.0, 2.0, 1.0], 2), [0.5, 0.5, 0])
    np.testing.assert_allclose(subset_weights([1.0] * 4, 3), [0.25] * 4)
    assert subset_weights(list(range(128)), 128)[-1] == 1
    for n in (0, 4):
        with pytest.raises(ValueError, match="out of 3"):
            subset_weights([1, 2, 3], n)


def test_ties_share_what_a_subset_gives_them():
    learned, rewards = [1.0, 1.0, 2.0, 2.0, 2.0, 0.0], [3.0, -1.0, 0.5, 0.25, 7.0, 2.0]
    for n in range(1, 7):
        assert subset_weights(learned, n) @ rewards == pytest.approx(by_enumeration(learned, rewards, n))


@pytest.mark.parametrize("n", [2, 4])
def test_the_kl_bound_is_the_kl_of_many_different_replies_and_above_that_of_few(n):
    """Of K equally likely replies, the k-th from below is the best of n with (k^n - (k-1)^n) / K^n."""

    def exact(size):
        ranks = np.arange(size + 1) / size
        p = np.diff(ranks**n)
        return float((p * np.log(p * size)).sum())

    assert exact(10**5) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert exact(3) < best_of_n_kl(n) - 0.03
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_byte_level_bpe(["the film was good and the other was bad"] * 3, 280)
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(folder / name)
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(folder / "lm")
    load_reward_model(folder / "lm", seed=3)[0].save_pretrained(folder / "rm")
    write(folder / "pairs.jsonl", {"prompt": "a", "chosen": " good", "rejected": " bad"})
    write(folder / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    (folder / "reward.py").write_text("def length(text):\n    return len(text) % 7\n")
    return folder


def recipe_of(start, folder, **changes):
    content = {
        "model": {"path": str(start / "lm")},
        "data": {"train": str(start / "pairs.jsonl")},
        "train": {"output_dir": str(folder / "run"), "use_cpu": True},
        "eval": {
            "prompts": str(start / "prompts.jsonl"),
            "reward": f"{start / 'reward.py'}:length",
            "max_new_tokens": 6,
            "batch_size": 2,
            "seed": 5,
        },
        "reward_model": {"path": str(start / "rm")},
        "best_of_n": {"n": [4, 1, 2]},
    }
    for key, value in changes.items():
        content[key] = content[key] | value
    return Recipe.check(content)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_best_of_n(recipe_of(start, folder), say=lambda line: None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_its_folder_says_what_enumeration_says(whole, start):
    rows = lines(whole.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    model, tokenizer = load_model(start / "lm"), load_tokenizer(start / "lm")
    true, learned = load_reward(f"{start / 'reward.py'}:length"), load_reward(f"model:{start / 'rm'}")
    pool = [
        sample_replies(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, seed=5 + i)
        for i in range(4)
    ]
    for row in rows:
        n = row["step"]
        measured = lines(whole.folder / "evaluations" / f"step-{n}.jsonl")
        assert [line["prompt"] for line in measured] == PROMPTS
        for p, line in enumerate(measured):
            replies = [drawn[p].reply for drawn in pool]
            liked, rewards = learned([PROMPTS[p]] * 4, replies), true([PROMPTS[p]] * 4, replies)
            assert line["reward"] == pytest.approx(by_enumeration(liked, rewards, n))
            assert line["learned_reward"] == pytest.approx(by_enumeration(liked, liked, n), abs=1e-5)
            assert line["reply"] == replies[int(np.argmax(liked[:n]))]
            assert line["kl"] == best_of_n_kl(n)
        assert row["eval_reward"] == pytest.approx(np.mean([line["reward"] for line in measured]))
        assert row["eval_kl"] == best_of_n_kl(n)
    assert rows[0]["eval_learned_reward"] < rows[1]["eval_learned_reward"] < rows[2]["eval_learned_reward"]


def test_what_it_costs(whole):
    """Drawing N replies to each prompt, and scoring them where there is a choice."""
    one, two, four = lines(whole.folder / "metrics.jsonl")
    rounds = [json.loads((whole.folder / "draws" / f"round-{i}.json").read_text()) for i in range(4)]
    positions = [r["positions"] for r in rounds]
    assert [row["tokens"] for row in (one, two, four)] == [
        positions[0],
        2 * sum(positions[:2]),
        2 * sum(positions),
    ]
    assert one["seconds"] == rounds[0]["sampling_seconds"]
    assert 0 < one["seconds"] < two["seconds"] < four["seconds"]
    summary = whole.summary
    assert summary == json.loads((whole.folder / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"], summary["train_runtime"]) == (
        4,
        four["tokens"],
        four["seconds"],
    )
    assert summary["tokens_sampled"] == sum(sum(r["tokens"]) for r in rounds)
    assert summary["eval/reward_before"] == pytest.approx(one["eval_reward"])
    assert summary["peak_memory_bytes"] > 0
    assert (whole.folder / "environment.json").exists()
    assert Recipe.load(whole.folder / "recipe.yaml").best_of_n.n == [4, 1, 2]


def test_stopped_and_resumed_it_is_the_same(whole, start, tmp_path, monkeypatch):
    recipe, drawn = recipe_of(start, tmp_path), []
    draw = best_of_n._draw_round

    def stops(*arguments):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arguments[-1])
        return draw(*arguments)

    monkeypatch.setattr(best_of_n, "_draw_round", stops)
    with pytest.raises(KeyboardInterrupt):
        run_best_of_n(recipe, say=lambda line: None)
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(best_of_n, "_draw_round", lambda *a: drawn.append(a[-1]) or draw(*a))
    run_best_of_n(recipe, say=lambda line: None)
    assert drawn == [0, 1, 2, 3]
    for n in (1, 2, 4):
        name = f"evaluations/step-{n}.jsonl"
        assert (tmp_path / "run" / name).read_text() == (whole.folder / name).read_text()
    run_best_of_n(recipe, say=lambda line: None)
    assert drawn == [0, 1, 2, 3], "a finished run is left as it is"
    # A larger N takes what is there; other replies are drawn where they would be others.
    run_best_of_n(recipe_of(start, tmp_path, best_of_n={"n": [5]}), say=lambda line: None)
    assert drawn == [0, 1, 2, 3, 4]
    run_best_of_n(recipe_of(start, tmp_path, eval={"seed": 6}, best_of_n={"n": [1]}), say=lambda line: None)
    assert drawn == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"eval": {"prompts": None}}, "eval.prompts"),
        ({"eval": {"reward": None}}, "eval.reward"),
        ({"eval": {"temperature": 0.7}}, "eval.temperature"),
        ({"best_of_n": {"n": [0]}}, "best_of_n.n.0"),
        ({"reward_model": {"path": "/nowhere"}}, "reward_model.path"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, field, start, tmp_path):
    with pytest.raises(InputError) as caught:
        run_best_of_n(recipe_of(start, tmp_path, **changes), say=lambda line: None)
    assert caught.value.field == field
