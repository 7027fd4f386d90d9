"""Samples, rewards and the KL to the reference."""

import json

import pytest
import torch
from families import make_model

from dpo_kit.errors import InputError
from dpo_kit.evaluation import Sample, load_prompts, load_reward, sample_replies, sequence_kl
from dpo_kit.recipe import Recipe
from dpo_kit.run import run_recipe
from dpo_kit.tokenizer import train_byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(["the film was good and the other was bad"] * 3 + ["abcdefgh"], 262)


@pytest.fixture
def model(tokenizer):
    return make_model("llama", vocab_size=len(tokenizer))


PROMPTS = ["the film", "a", "the other film was"]


def test_samples_are_repeatable_and_leave_the_generator_alone(model, tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = sample_replies(model, tokenizer, PROMPTS, samples=2, max_new_tokens=8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == sample_replies(model, tokenizer, PROMPTS, samples=2, max_new_tokens=8, seed=1)
    assert first != sample_replies(model, tokenizer, PROMPTS, samples=2, max_new_tokens=8, seed=2)
    assert [s.prompt for s in first] == [p for p in PROMPTS for _ in range(2)]
    assert all(1 <= len(s.reply_ids) <= 8 for s in first)


def test_greedy_samples_are_the_likeliest_tokens_whatever_the_padding(model, tokenizer):
    for sample in sample_replies(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0):
        alone = make_model("llama", vocab_size=len(tokenizer)).eval()
        ids = list(sample.prompt_ids)
        for token in sample.reply_ids:
            assert alone(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_kl_by_the_definition(model, tokenizer):
    reference = make_model("llama", vocab_size=len(tokenizer), seed=4)
    samples = [Sample("", "", [1], [5, 6, 7]), Sample("", "", [1, 2, 3], [4])]
    found = sequence_kl(model, reference, samples)
    for value, sample in zip(found, samples, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.reply_ids])
        expected = 0.0
        with torch.no_grad():
            p = model.eval()(ids).logits[0].double().softmax(-1)
            q = reference.eval()(ids).logits[0].double().softmax(-1)
        for place in range(len(sample.prompt_ids) - 1, ids.shape[1] - 1):
            expected += (p[place] * (p[place] / q[place]).log()).sum()
        assert value.item() == pytest.approx(float(expected), rel=1e-4)
    assert sequence_kl(model, model, samples).abs().max() == 0


def test_kl_is_the_mean_log_ratio_of_samples(model, tokenizer):
    """The two estimators of one number agree, within their error, on many samples."""
    reference = make_model("llama", vocab_size=len(tokenizer), seed=0)
    with torch.no_grad():
        reference.model.norm.weight *= 0.9
    samples = sample_replies(model, tokenizer, ["a"], samples=600, max_new_tokens=3, seed=3)
    exact = sequence_kl(model, reference, samples)
    ratios = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.reply_ids])
        start = len(sample.prompt_ids) - 1
        with torch.no_grad():
            logps = [m(ids).logits[0].log_softmax(-1)[start:-1] for m in (model.eval(), reference.eval())]
        taken = [x.gather(1, torch.tensor(sample.reply_ids)[:, None]).sum() for x in logps]
        ratios.append((taken[0] - taken[1]).item())
    ratios = torch.tensor(ratios)
    error = (ratios - exact).std() / len(samples) ** 0.5
    assert abs(ratios.mean() - exact.mean()) < 4 * error
    assert exact.mean() > 0.01


def test_a_reward_from_a_file(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("def f(text):\n    return len(text)\n\ndef nan(text):\n    return float('nan')\n")
    assert load_reward(f"{path}:f")(["a", [{"role": "user", "content": "b"}]], ["bc", "d"]) == [3.0, 1.0]
    with pytest.raises(InputError, match="not a finite number"):
        load_reward(f"{path}:nan")(["a"], ["bc"])
    for spec, message in (
        (f"{path}:g", "no function 'g'"),
        (str(path), "FILE.py:FUNCTION"),
        ("x.py:f", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            load_reward(spec)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    assert load_prompts(path) == PROMPTS
    assert load_prompts(path, 2) == PROMPTS[:2]
    for text, message in (
        ("", "no prompt"),
        ("{}\n", "p.jsonl:1: field 'prompt'"),
        ("{\n", "p.jsonl:1: broken JSON"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_prompts(path)


def test_rewards_are_any_finite_numbers_and_a_failure_names_its_reply(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "import numpy as np, torch\nfrom fractions import Fraction\n"
        "KINDS = {'n': np.float32(0.5), 't': torch.tensor(2.0), 'i': np.int64(3), 'f': Fraction(1, 4),\n"
        "         'nan': torch.tensor(float('nan')), 'no': None, 'b': np.bool_(True), 'v': torch.ones(1)}\n"
        "def f(text):\n    return KINDS[text]\n"
    )
    reward = load_reward(f"{path}:f", field="--reward")
    assert reward([""] * 4, ["n", "t", "i", "f"]) == [0.5, 2.0, 3.0, 0.25]
    for bad in ("nan", "no", "b", "v"):
        with pytest.raises(InputError, match="reply 2 and not a finite number") as caught:
            reward([""] * 2, ["n", bad])
        assert caught.value.field == "--reward"
    with pytest.raises(InputError, match=r"r\.py.*'f' fails at reply 3: KeyError\('zzz'\)") as caught:
        reward([""] * 3, ["n", "n", "zzz"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("place", ["model", "checkpoints/step-2"])
def test_a_reward_model_writes_conversations_as_it_did_in_training(model, tokenizer, tmp_path, place):
    from dpo_kit.models import load_reward_model

    folder = tmp_path / "run" / place
    model.save_pretrained(tmp_path / "lm")
    load_reward_model(tmp_path / "lm")[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "run" / "recipe.yaml").write_text("data: {chat_template_kwargs: {mood: good}}\n")
    learned = load_reward(f"model:{folder}")
    assert learned.inner._chat_template_kwargs == {"mood": "good"}
    assert len(learned(["a"], ["b"])) == 1
    with torch.no_grad():
        learned.inner.model.score.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="finite number"):
        learned(["a"], ["b"])


def test_measuring_on_the_way_takes_no_line_of_training_away(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    rows = [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in PROMPTS]
    for name, count in (("pairs", 4), ("prompts", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * count))
    train = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "logging_steps": 2, "batch_size": 4}
    recipe = {
        "model": {"path": str(tmp_path / "lm")},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "train": train | {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True},
        "eval": {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 2, "every": 2},
        "report": {"enabled": False},
    }
    folder = run_recipe(Recipe.check(recipe), say=lambda line: None).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_kl" in line] == [0, 2, 4]
    assert {2, 4} <= {line["step"] for line in lines if "loss" in line}
