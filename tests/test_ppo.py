"""PPO through TRL: the run folder, what is added to TRL's loop, and what it must not do."""

from __future__ import annotations

import builtins
import copy
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_files import write
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from dpo_kit.cli import main
from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.comparison.ppo_callbacks import adaptation_rate, adapted
from dpo_kit.comparison.ppo_models import Normalised, TextReward, padding_token, value_model_of
from dpo_kit.comparison.ppo_run import run_ppo
from dpo_kit.errors import InputError, TrainingError
from dpo_kit.evaluation.sampling import encode_prompts, sample_replies
from dpo_kit.recipe import Recipe
from dpo_kit.run import run_recipe
from dpo_kit.tokenizer import train_byte_level_bpe

ppo = pytest.importorskip("dpo_kit.comparison.ppo", reason="trl 1.12 is not installed")

from trl.experimental.utils import get_reward  # noqa: E402

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
WORDS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
PROMPTS = [f"{first} {second}" for first in WORDS for second in WORDS[:4]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy and its tokenizer, pairs, prompts, and a reward: the share of e in a text."""
    folder = tmp_path_factory.mktemp("ppo")
    tokenizer = train_byte_level_bpe([*PROMPTS, "eeee eee ee e"], 280)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES, eos_token_id=0, bos_token_id=0, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write(folder / "pairs.jsonl", *({"prompt": p, "chosen": " red", "rejected": " blue"} for p in PROMPTS))
    write(folder / "prompts.jsonl", *({"prompt": p} for p in ("red", "green red", "pink", "grey blue")))
    (folder / "reward.py").write_text(
        "def share(text):\n    return text.count('e') / max(1, len(text))\n"
        "def far(text):\n    return 1e38 * len(text)\n"
        "def same(text):\n    return 2.0\n"
    )
    return folder


def recipe(world: Path, output: Path, **ppo_section: Any) -> Recipe:
    settings = {
        "total_episodes": 64,
        "per_device_train_batch_size": 16,
        "num_mini_batches": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "num_ppo_epochs": 2,
        "temperature": 1.0,
    }
    ppo_section["settings"] = settings | ppo_section.get("settings", {})
    return Recipe.check(
        {
            "model": {"path": str(world / "model")},
            "data": {"train": [str(world / "pairs.jsonl")], "max_length": 64},
            "train": {"output_dir": str(output), "seed": 0, "use_cpu": True},
            "eval": {
                "prompts": str(world / "prompts.jsonl"),
                "samples": 8,
                "max_new_tokens": 8,
                "every": 2,
                "reward": f"{world / 'reward.py'}:share",
            },
            "reward_model": {"train": {"max_steps": 2, "batch_size": 8}},
            "ppo": {"reward": "true"} | ppo_section,
            "report": {"enabled": False},
        }
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(*arguments: object) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns, of 12 updates."""
    output = tmp_path_factory.mktemp("run") / "run"
    settings = {"total_episodes": 384, "per_device_train_batch_size": 32}
    return run_ppo(recipe(world, output, settings=settings), say=quiet).folder


def test_a_run_learns_and_leaves_a_run_folder(trained: Path, world: Path) -> None:
    assert trained.name == "run-ppo"
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["eval/reward_after"] > summary["eval/reward_before"] + 0.1
    assert summary["steps"] == 12
    assert summary["episodes"] == 384
    names = {"recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "samples.jsonl"}
    assert names <= {path.name for path in trained.iterdir()}
    assert len(lines(trained / "samples.jsonl")) == 32
    assert Recipe.load(trained / "recipe.yaml").training_config().output_dir == str(trained)

    metrics = lines(trained / "metrics.jsonl")
    measured = [line for line in metrics if "eval_reward" in line]
    assert [line["step"] for line in measured] == [0, 2, 4, 6, 8, 10, 12]
    assert measured[0]["eval_kl"] == measured[0]["seconds"] == measured[0]["tokens"] == 0
    assert measured[-1]["eval_kl"] > 0.1
    for name in ("seconds", "tokens"):
        values = [line[name] for line in measured]
        assert values == sorted(set(values))
    assert measured[-1]["tokens"] == summary["tokens"]
    updates = [line for line in metrics if "objective/kl" in line]
    assert [line["step"] for line in updates] == list(range(1, 13))
    assert abs(updates[0]["objective/kl"]) < 1e-4  # the policy is the reference still
    assert all(math.isfinite(v) for line in metrics for v in line.values())

    saved = LlamaForCausalLM.from_pretrained(trained / "model")
    first = LlamaForCausalLM.from_pretrained(world / "model")
    assert saved.config.vocab_size == first.config.vocab_size
    assert not torch.equal(saved.lm_head.weight, first.lm_head.weight)


def test_the_same_recipe_gives_the_same_run_and_a_finished_one_is_left_alone(
    world: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("a", "b"):
        folder = run_ppo(recipe(world, tmp_path, output_dir=str(tmp_path / name)), say=quiet).folder
        clock = ("seconds", "eps")
        found.append(
            [{k: v for k, v in line.items() if k not in clock} for line in lines(folder / "metrics.jsonl")]
        )
    assert found[0] == found[1]

    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    again = recipe(world, tmp_path, output_dir=str(folder))
    run_ppo(again, resume=True, say=quiet)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    (folder / "summary.json").unlink()  # cut off before its end: begun anew, from the first line on
    run_ppo(again, resume=True, say=quiet)
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [0, 1, 2, 2, 3, 4, 4]


def test_a_resume_loses_nothing_of_a_run_of_another_recipe(world: Path, tmp_path: Path) -> None:
    settings = {"total_episodes": 16}
    folder = run_ppo(recipe(world, tmp_path / "run", reward="model", settings=settings), say=quiet).folder
    own = {"recipe.yaml", "metrics.jsonl", "summary.json", "model", "evaluations", "samples.jsonl"}
    kept = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert own | {"reward_model"} <= {path.name for path in folder.iterdir()}

    said: list[str] = []
    other = recipe(world, tmp_path / "run", reward="model", settings=settings | {"kl_coef": 1.0})
    result = run_ppo(other, resume=True, say=said.append)
    aside = tmp_path / "run-ppo.1"
    assert any(str(aside) in line for line in said)
    for path, content in kept.items():
        place = path.relative_to(folder)
        assert (path if place.parts[0] == "reward_model" else aside / place).read_bytes() == content
    assert not (aside / "reward_model").exists()
    assert result.summary["recipe"] != json.loads((aside / "summary.json").read_text())["recipe"]
    assert lines(folder / "metrics.jsonl")[1]["objective/kl_coef"] == 1.0

    # Of one that was cut off, too, and by the recipe that it is of.
    (folder / "summary.json").unlink()
    run_ppo(recipe(world, tmp_path / "run", settings=settings), resume=True, say=quiet)
    assert lines(tmp_path / "run-ppo.2" / "metrics.jsonl")[1]["objective/kl_coef"] == 1.0
    assert not (tmp_path / "run-ppo.3").exists()


def test_a_finished_run_names_a_report_only_where_there_is_one(world: Path, tmp_path: Path) -> None:
    once = recipe(world, tmp_path / "run", settings={"total_episodes": 16})
    folder = run_ppo(once, say=quiet).folder
    assert run_ppo(once, resume=True, say=quiet).page is None
    (folder / "report.html").write_text("a page")
    assert run_ppo(once, resume=True, say=quiet).page == folder / "report.html"


@pytest.mark.parametrize(
    ("section", "normalised"),
    [
        ({"reward": "true"}, None),
        ({"reward": "model"}, True),
        ({"reward": "true", "value": "reward_model"}, True),
        ({"reward": "true", "value": "reward_model", "normalise": False}, False),
        ({"reward": "model", "value": "policy"}, None),
    ],
)
def test_what_the_values_start_as(
    section: Any, normalised: bool | None, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a reward model they are its scores, normalised with the reward; from the policy they are 0."""
    started = {}
    whole = ppo.Trainer.train

    def train(self: Any) -> None:
        started["value"] = copy.deepcopy(self.value_model)
        whole(self)

    monkeypatch.setattr(ppo.Trainer, "train", train)
    settings = {"total_episodes": 16}
    folder = run_ppo(recipe(world, tmp_path / "run", settings=settings, **section), say=quiet).folder
    made = folder / "reward_model" / "model"
    value = started["value"].eval()
    hidden = torch.linspace(-1, 1, 16)
    if normalised is None:
        assert made.exists() == (section["reward"] == "model")
        assert torch.equal(value.score(hidden), torch.zeros(1))
        expected = LlamaForCausalLM.from_pretrained(world / "model").model.state_dict()
    else:
        learned = LlamaForSequenceClassification.from_pretrained(made)
        score = learned.score(hidden)
        assert isinstance(value.score, Normalised) == normalised
        if normalised:
            score = (score - value.score.mean) / value.score.deviation
        assert torch.equal(value.score(hidden), score)
        expected = learned.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in value.model.state_dict().items())


def test_ppo_with_the_true_reward_does_not_look_at_a_reward_model(world: Path, tmp_path: Path) -> None:
    found = []
    for name in ("none", "there"):
        once = recipe(world, tmp_path / name, settings={"total_episodes": 32})
        if name == "there":
            section = once.reward_model.model_copy(update={"path": str(tmp_path / "no such folder")})
            once = once.model_copy(update={"reward_model": section})
        metrics = lines(run_ppo(once, say=quiet).folder / "metrics.jsonl")
        found.append([{k: v for k, v in line.items() if k not in ("seconds", "eps")} for line in metrics])
    assert found[0] == found[1]


@pytest.mark.parametrize("carry_out", [run_ppo, run_recipe])
def test_in_bf16_a_policy_that_does_not_learn_has_no_kl(carry_out: Any, world: Path, tmp_path: Path) -> None:
    """Policy and reference are measured in one precision."""
    once = recipe(world, tmp_path / "run", settings={"total_episodes": 32, "learning_rate": 0.0})
    train = once.train | {"bf16": True, "learning_rate": 0.0, "max_steps": 4, "batch_size": 8}
    result = carry_out(once.model_copy(update={"train": train}), say=quiet)
    metrics = lines(result.folder / "metrics.jsonl")
    measured = [line["eval_kl"] for line in metrics if "eval_kl" in line]
    assert len(measured) > 1
    assert set(measured) == {0.0}


def test_a_reward_model_is_learned_from_the_pairs(world: Path, tmp_path: Path) -> None:
    result = run_ppo(recipe(world, tmp_path / "run", reward="model", target_kl=2.0), say=quiet)
    assert (result.folder / "reward_model" / "model" / "model.safetensors").exists()
    assert {"reward_mean", "reward_deviation"} <= result.summary.keys()
    updates = [line for line in lines(result.folder / "metrics.jsonl") if "objective/kl" in line]
    for line, following in itertools.pairwise(updates):
        expected = adapted(line["objective/kl_coef"], line["objective/kl"], 2.0, adaptation_rate(4))
        assert following["objective/kl_coef"] == pytest.approx(expected)


def test_with_an_adapter_the_policy_without_it_is_the_reference(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = recipe(world, tmp_path / "run", settings={"stop_token": None, "gradient_checkpointing": True})
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    result = run_ppo(
        whole.model_copy(update={"model": whole.model.model_copy(update={"lora": lora})}), say=quiet
    )
    assert (result.folder / "model" / "adapter_model.safetensors").exists()
    updates = [line for line in lines(result.folder / "metrics.jsonl") if "objective/kl" in line]
    assert abs(updates[0]["objective/kl"]) < 1e-4
    assert abs(updates[-1]["objective/kl"]) > 1e-3
    assert result.summary["tokens_sampled"] == (32 + 64) * 8  # no stop token: all go on to the longest length


def test_prompts_that_are_messages(world: Path, tmp_path: Path) -> None:
    from dpo_kit.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(world / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": "blue"}],
        }
        for prompt in PROMPTS
    ]
    write(tmp_path / "pairs.jsonl", *rows)
    write(tmp_path / "prompts.jsonl", *({"prompt": row["prompt"]} for row in rows[:4]))
    content = recipe(world, tmp_path / "run", settings={"total_episodes": 16}).model_dump()
    content["model"]["tokenizer"] = str(tmp_path / "chat")
    content["data"]["train"] = [str(tmp_path / "pairs.jsonl")]
    content["eval"]["prompts"] = str(tmp_path / "prompts.jsonl")
    result = run_ppo(Recipe.check(content), say=quiet)
    assert result.summary["episodes"] == 16
    assert 0 < result.summary["reward_mean"] < 0.5  # of the replies alone


def test_adaptive_kl_by_hand() -> None:
    assert adapted(0.1, kl=12.0, target=6.0, rate=0.1) == pytest.approx(0.1 * 1.02)  # clipped at 0.2
    assert adapted(0.1, kl=6.6, target=6.0, rate=0.5) == pytest.approx(0.1 * 1.05)
    assert adapted(0.1, kl=0.0, target=6.0, rate=1.0) == pytest.approx(0.08)
    rate = adaptation_rate(80)
    assert (1 + 0.2 * rate) ** 40 == pytest.approx(100)
    assert adaptation_rate(4) == 1.0


@pytest.fixture
def text_reward(world: Path) -> tuple[TextReward, Any, list[int]]:
    from dpo_kit.evaluation import load_reward
    from dpo_kit.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(world / "model")
    encoded, ends = encode_prompts(PROMPTS, tokenizer)
    prompts = {tuple(ids): prompt for ids, prompt in zip(encoded, PROMPTS, strict=True)}
    return (
        TextReward(load_reward(f"{world / 'reward.py'}:share"), tokenizer, prompts, ends),
        tokenizer,
        ends,
    )


def test_trl_reads_the_reward_that_evaluation_gives(
    world: Path, text_reward: tuple[TextReward, Any, list[int]]
) -> None:
    reward, tokenizer, ends = text_reward
    policy = LlamaForCausalLM.from_pretrained(world / "model")
    policy.generation_config.suppress_tokens = None
    drawn = sample_replies(policy, tokenizer, PROMPTS, max_new_tokens=150, seed=3)
    ended = [sample.reply_ids[-1] in ends for sample in drawn]
    assert any(ended)
    assert not all(ended)
    drawn = [sample for sample in drawn if tokenizer.pad_token_id not in sample.reply_ids]
    pad = tokenizer.pad_token_id
    queries = ppo.padded_left([sample.prompt_ids for sample in drawn], pad)
    longest = max(len(sample.reply_ids) for sample in drawn)
    replies = torch.tensor([s.reply_ids + [pad] * (longest - len(s.reply_ids)) for s in drawn])
    reward.width = queries.shape[1]
    _, scores, last = get_reward(reward, torch.cat((queries, replies), 1), pad, queries.shape[1])
    expected = [text.count("e") / len(text) for text in (s.prompt + s.reply for s in drawn)]
    assert len(set(expected)) > 10
    assert scores.tolist() == pytest.approx(expected)
    assert (last - queries.shape[1] + 1).tolist() == [len(s.reply_ids) for s in drawn]


def test_a_normalised_score_has_mean_0_and_deviation_1_over_the_first_policys_replies(
    world: Path, text_reward: tuple[TextReward, Any, list[int]], tmp_path: Path
) -> None:
    from dpo_kit.recipe import make_training_config

    reward, tokenizer, ends = text_reward
    policy = LlamaForCausalLM.from_pretrained(world / "model")
    train = make_training_config({"output_dir": str(tmp_path), "use_cpu": True})
    config = ppo.make_config({"local_rollout_forward_batch_size": 5}, train, 8)
    rollouts = ppo.Rollouts(tokenizer.pad_token_id, ends, CostMeter(), [reward])
    prompts = [tuple(ids) for ids in encode_prompts(PROMPTS, tokenizer)[0]]
    torch.manual_seed(0)
    ((mean, _deviation),) = ppo.normalise([reward], policy, rollouts, config, prompts)
    assert isinstance(reward.score, Normalised)
    assert 0 < mean < 1
    torch.manual_seed(0)
    ((again, unit),) = ppo.normalise([reward], policy, rollouts, config, prompts)
    assert (again, unit) == (pytest.approx(0, abs=1e-5), pytest.approx(1))
    reward.score = torch.nn.Identity()
    reward._reward = lambda prompts, replies: [2.0] * len(prompts)
    with pytest.raises(InputError, match=r"all 32 replies of the first policy have the reward 2\. There is"):
        ppo.normalise([reward], policy, rollouts, config, prompts)


def test_padding_is_never_sampled_and_replies_stop_at_any_end() -> None:
    # Next to nothing but padding (1), the end of a turn (2) and two words would be sampled.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **SIZES))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    meter = CostMeter()
    rollouts = ppo.Rollouts(1, [0, 2], meter, [])
    queries = torch.full((200, 3), 5)
    queries[:, 0] = 1
    torch.manual_seed(0)
    settings = ppo.GenerationConfig(max_new_tokens=12, temperature=0.5, do_sample=True, top_k=0)
    whole, logits = rollouts(model, queries, 1, settings)
    replies = whole[:, 3:]
    assert logits.shape == (*replies.shape, 8)
    assert torch.isfinite(logits).all()
    count = 0
    for reply in replies.tolist():
        end = next((i for i, token in enumerate(reply) if token in (0, 2)), len(reply) - 1)
        assert 1 not in reply[: end + 1]
        assert set(reply[end + 1 :]) <= {1}
        count += end + 1
    assert meter.tokens_sampled == count


def test_what_stands_for_padding() -> None:
    tokenizer = train_byte_level_bpe(["some text"], 258)
    assert padding_token(tokenizer, 258, [[5, 6]], [0]) == 1
    # It ends a reply: a row of the model that the tokenizer does not use, else an impossible byte.
    assert padding_token(tokenizer, 300, [[5, 6]], [0, 1]) == 299
    found = padding_token(tokenizer, 258, [[5, 6]], [0, 1])
    assert found == tokenizer.get_vocab()["\u00ff"]
    assert found not in tokenizer("any text \u00ff \u20ac \U0001f600")["input_ids"]


def test_values_begin_at_zero_on_the_policys_body(world: Path) -> None:
    policy = LlamaForCausalLM.from_pretrained(world / "model")
    value = value_model_of(policy)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(value.model(ids).last_hidden_state, policy.model(ids).last_hidden_state)
    assert torch.equal(value.score(value.model(ids).last_hidden_state), torch.zeros(1, 3, 1))


def test_the_meter_counts_positions_of_every_body_while_it_runs() -> None:
    sizes = LlamaConfig(vocab_size=8, num_labels=1, pad_token_id=1, **SIZES)
    policy, value = LlamaForCausalLM(sizes), LlamaForSequenceClassification(sizes)
    meter = CostMeter()
    meter.watch(policy)
    meter.watch(value)
    ids = torch.ones(2, 5, dtype=torch.long)
    policy(ids)
    assert meter.tokens == 0
    assert meter.seconds == 0
    meter.start()
    policy(input_ids=ids).logits.sum().backward()
    value.model(inputs_embeds=torch.zeros(3, 4, 16))
    with meter.paused():
        policy(ids)
        before = meter.seconds
    assert meter.tokens == 10 + 12
    assert meter.seconds - before < 0.1
    # A reply of 4 tokens to prompts of 5: the prompt, and one position more for each token but the last.
    policy.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
    meter.stop()
    assert meter.tokens == 22 + 2 * (5 + 3)
    policy(ids)
    assert meter.tokens == 38


def test_numbers_that_are_lost_stop_the_run(world: Path, tmp_path: Path) -> None:
    bad = recipe(world, tmp_path / "run", reward=f"{world / 'reward.py'}:far", normalise=False)
    with pytest.raises(TrainingError, match=r"step \d+: .*(inf|nan|not finite).*ppo\.normalise"):
        run_ppo(bad, say=quiet)
    assert not (tmp_path / "run-ppo" / "model").exists()
    assert not (tmp_path / "run-ppo" / "summary.json").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"settings": {"learnin_rate": 1.0}}, "ppo.settings.learnin_rate.*Did you mean 'learning_rate'"),
        ({"settings": {"seed": 1}}, "Set train.seed instead"),
        ({"settings": {"max_steps": 5}}, "total_episodes"),
        ({"settings": {"kl_coef": "much"}}, "ppo.settings.kl_coef.*got 'much'"),
        ({"settings": {"per_device_train_batch_size": 64}}, "only 32 different ones"),
        ({"settings": {"response_length": 63}}, "no prompt is left"),
        ({"settings": {"num_mini_batches": 3}}, "multiple of `num_mini_batches`"),
        ({"reward": "nowhere.py:reward"}, "ppo.reward.*no such file"),
        ({"reward": "same"}, "have the reward 2"),
    ],
)
def test_bad_settings_are_refused(world: Path, tmp_path: Path, section: Any, message: str) -> None:
    if section.get("reward") == "same":
        section = {"reward": f"{world / 'reward.py'}:same"}
    with pytest.raises(InputError, match=f"(?s){message}"):
        run_ppo(recipe(world, tmp_path / "run", **section), say=quiet)


def test_the_command_and_a_trl_without_ppo(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(world, tmp_path / "run").model_dump()))
    assert status("ppo", file, "ppo.settings.total_episodes=16", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 1
    assert Path(printed["folder"]).name == "run-ppo"

    whole = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("trl.experimental.ppo"):
            raise ModuleNotFoundError("No module named 'trl.experimental.ppo'", name="trl.experimental.ppo")
        return whole(name, *args)

    monkeypatch.delitem(sys.modules, "dpo_kit.comparison.ppo")
    monkeypatch.delattr("dpo_kit.comparison.ppo")
    monkeypatch.setattr(builtins, "__import__", without)
    assert status("ppo", file) == 2
    assert 'pip install "trl>=1.12,<1.13"' in capsys.readouterr().err


def test_reports_take_the_run_folder(trained: Path, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dpo_kit.report import write_comparison, write_report

    page = write_report(trained).read_text()
    assert (trained / "plots" / "reward_kl.png").exists()
    assert "sampled to learn from" in page

    settings = {"train.max_steps": 2, "train.batch_size": 8, "train.output_dir": str(tmp_path / "dpo")}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(world, tmp_path / "run").model_dump()))
    other = run_recipe(Recipe.load(file, [f"{k}={v}" for k, v in settings.items()]), say=quiet).folder
    page = write_comparison([trained, other], tmp_path / "both").read_text()
    assert "run-ppo" in page
    assert "dpo" in page
    assert (tmp_path / "both" / "plots" / "reward_kl.png").exists()
