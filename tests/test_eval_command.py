"""`dpo-kit eval` end to end on small models, with a reward and with a judge behind a real HTTP server."""

import functools
import json
import math
import shutil

import pytest
import torch
from chat_templates import PLAIN
from families import make_model
from judge_server import judge_server, longer_is_better

from dpo_kit.cli import main
from dpo_kit.tokenizer import train_byte_level_bpe

TEXTS = ["the film was good", "the film was bad", "a very good film", "a very bad film", "it was fine"]
ROWS = [
    {"prompt": f"Film {i // 2}:", "chosen": f" {TEXTS[i % 5]} indeed", "rejected": f" {TEXTS[(i + 2) % 5]}"}
    for i in range(12)
]
KEY = "sk-test-77aa01-never-write-me"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of different weights, each with the same tokenizer beside it."""
    tokenizer = train_byte_level_bpe(TEXTS * 20, 262)
    tokenizer.chat_template = PLAIN
    folders = []
    for seed in (0, 4):
        folder = tmp_path_factory.mktemp("model")
        tokenizer.save_pretrained(folder)
        settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
        make_model("llama", seed=seed, **settings).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def reward(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def reward(text):\n    return float(len(text))\n")
    return f"{file}:reward"


@pytest.fixture
def evaluate(capfd):
    """Runs the command with --json; its exit status, the object, and what went to stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["eval", *map(str, arguments), "--json"])
        captured = capfd.readouterr()
        return left.value.code or 0, json.loads(captured.out) if captured.out else None, captured.err

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probs(folder, row):
    """Of chosen and rejected by full logits, one sequence at a time, in fp64."""
    from dpo_kit.models import load_model
    from dpo_kit.tokenizer import load_tokenizer

    model, tokenizer = load_model(folder, torch.float64).eval(), load_tokenizer(folder)
    found = []
    for side in ("chosen", "rejected"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        reply = [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
        found.append(sum(logps[p, t].item() for p, t in zip(places, reply, strict=True)))
    return found


def test_a_model_against_itself(models, pairs, reward, evaluate):
    status, found, _ = evaluate(
        models[0], "--reference", models[0], "--data", pairs, "--reward", reward,
        "--judge", f"reward:{reward}", "--against", "reference", "--max-new-tokens", 6,
    )  # fmt: skip
    assert status == 0
    assert found["pairs"]["accuracy"] == 0.5
    assert found["pairs"]["margin"] == 0
    assert found["pairs"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    policy, reference, chosen = found["samples"]
    assert policy["kl"] == 0
    assert policy["replies"] == 6  # each prompt has two pairs
    assert policy["reward"] == reference["reward"]
    # Of each prompt its first pair's chosen reply.
    assert chosen["reward"] == sum(len(r["prompt"] + r["chosen"]) for r in ROWS[::2]) / 6
    (rate,) = found["win_rates"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (0, 6, 0, 0.5)
    assert "agreement" not in found


def test_figures_of_pairs_by_the_definition(models, pairs, evaluate):
    arguments = ["--data", pairs, "--samples", 0]
    _, found, _ = evaluate(models[0], "--reference", models[1], *arguments, "--beta", 0.3)
    rewards = []
    for row in ROWS:
        own, theirs = (log_probs(folder, row) for folder in models)
        rewards.append(0.3 * ((own[0] - theirs[0]) - (own[1] - theirs[1])))
    got = found["pairs"]
    assert (got["n"], got["prompts"], got["by"], got["beta"]) == (12, 6, "implicit reward", 0.3)
    assert got["margin"] == pytest.approx(sum(rewards) / 12, rel=1e-4)
    assert got["loss"] == pytest.approx(sum(math.log1p(math.exp(-r)) for r in rewards) / 12, rel=1e-4)
    assert got["accuracy"] == pytest.approx(sum(r > 0 for r in rewards) / 12)
    assert got["accuracy_low"] < got["accuracy"] < got["accuracy_high"]
    assert "samples" not in found
    _, alone, _ = evaluate(models[0], *arguments)
    own = [log_probs(models[0], row) for row in ROWS]
    assert alone["pairs"]["by"] == "log-prob"
    assert alone["pairs"]["accuracy"] == pytest.approx(sum(c > r for c, r in own) / 12)
    assert "loss" not in alone["pairs"]
    assert "samples" not in alone


def test_win_rates_over_temperatures_are_those_of_the_samples_written(
    models, pairs, reward, evaluate, tmp_path
):
    out = tmp_path / "out"
    status, found, _ = evaluate(
        models[0], "--reference", models[1], "--data", pairs, "--reward", reward, "--out", out,
        "--judge", f"reward:{reward}", "--temperature", 0.5, "--temperature", 1, "--samples", 2,
        "--reference-temperature", 0.7, "--max-new-tokens", 6, "--max-prompts", 4,
    )  # fmt: skip
    assert status == 0
    assert json.loads((out / "eval.json").read_text()) == found
    made_with = found["made_with"]
    assert (made_with["seed"], made_with["temperatures"], made_with["reference_temperature"]) == (
        0,
        [0.5, 1.0],
        0.7,
    )
    assert (made_with["max_new_tokens"], made_with["dtype"], made_with["beta"]) == (6, "float32", 0.1)
    assert made_with["prompts"]["n"] == 4
    assert made_with["judges"] == [{"judge": f"reward:{reward}"}]
    assert made_with["load"]["invalid"] == "drop"
    samples = lines(out / "eval-samples.jsonl")
    drawn = {}
    for row in samples:
        assert row["reward"] == len(row["prompt"] + row["reply"])
        drawn.setdefault((row["model"], row["temperature"]), []).append(row)
    assert {key: len(rows) for key, rows in drawn.items()} == {
        ("policy", 0.5): 8, ("reference", 0.7): 8, ("policy", 1.0): 8,
    }  # fmt: skip
    # The KL is of the policy as it is: at temperature 1, and not at others.
    assert [("kl" in row) for row in found["samples"]] == [False, False, True, False]
    kls = [row["kl"] for row in drawn["policy", 1.0]]
    assert found["samples"][2]["kl"] == pytest.approx(sum(kls) / 8)
    assert min(kls) > 0
    chosen = [row["chosen"] for row in ROWS[:8:2] for _ in range(2)]
    assert len(found["win_rates"]) == 4
    for rate in found["win_rates"]:
        own = [row["reply"] for row in drawn["policy", rate["temperature"]]]
        fixed = [row["reply"] for row in drawn["reference", 0.7]]
        theirs = chosen if rate["against"] == "chosen" else fixed
        assert rate["wins"] == sum(len(a) > len(b) for a, b in zip(own, theirs, strict=True))
        assert rate["losses"] == sum(len(a) < len(b) for a, b in zip(own, theirs, strict=True))
        assert rate["rate"] == (rate["wins"] + rate["ties"] / 2) / 8
    comparisons = lines(out / "comparisons.jsonl")
    assert len(comparisons) == 32
    assert {row["against_temperature"] for row in comparisons} == {None, 0.7}


def test_a_judge_behind_an_endpoint(models, pairs, evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    with judge_server(longer_is_better) as honest, judge_server(lambda text, n: "Preferred: B") as biased:
        arguments = [
            models[0], "--data", pairs, "--judge", f"{honest.url}#tiny", "--judge", f"{biased.url}#tiny",
            "--agreement", "--out", out, "--max-new-tokens", 4, "--judge-key-env", "JUDGE_KEY",
            "--judge-setting", "max_tokens=null", "--judge-setting", "max_completion_tokens=99",
        ]  # fmt: skip
        status, found, said = evaluate(*arguments)
        assert status == 0
        assert {key for server in (honest, biased) for key in server.keys} == {f"Bearer {KEY}"}
        assert "max_tokens" not in honest.requests[0]
        assert honest.requests[0]["max_completion_tokens"] == 99
        asked = len(honest.requests), len(biased.requests)
        assert asked[0] == asked[1]
        assert evaluate(*arguments)[1] == found  # from the cache
        assert (len(honest.requests), len(biased.requests)) == asked
    judge = found["made_with"]["judges"][0]
    assert (judge["judge"], judge["prompt"]) == (f"{honest.url}#tiny", "helpfulness")
    assert judge["settings"] == {"temperature": 0.0, "max_completion_tokens": 99}
    assert len(judge["prompt_sha256"]) == 64
    by_honest, by_biased = found["win_rates"]
    assert by_honest["position"] == {"comparisons": 6, "share": 0.0, "first": 0.0, "unreadable": 0}
    assert (by_biased["ties"], by_biased["position"]["share"], by_biased["position"]["first"]) == (
        6,
        1.0,
        0.0,
    )
    labels_honest, labels_biased, honest_biased = found["agreement"]
    longer = sum(len(row["chosen"].strip()) > len(row["rejected"].strip()) for row in ROWS)
    assert labels_honest["agreement_decided"] * labels_honest["n_decided"] == longer
    assert labels_biased["agreement"] == 0
    assert labels_biased["n_decided"] == honest_biased["n_decided"] == 0
    rows = lines(out / "comparisons.jsonl")
    assert len(rows) == 2 * (6 + 12)
    assert all(row["answers"] == ["B", "B"] for row in rows if row["judge"] == f"{biased.url}#tiny")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert KEY not in said + json.dumps(found)


def test_a_reward_model_as_judge(models, pairs, evaluate, tmp_path):
    from dpo_kit.evaluation import load_reward
    from dpo_kit.models import load_reward_model
    from dpo_kit.tokenizer import load_tokenizer

    folder = tmp_path / "reward-model"
    model, _ = load_reward_model(models[0])
    model.save_pretrained(folder)
    load_tokenizer(models[0]).save_pretrained(folder)
    status, found, _ = evaluate(
        models[0], "--data", pairs, "--samples", 0, "--judge", f"model:{folder}", "--agreement"
    )
    assert status == 0
    reward, prompts = load_reward(f"model:{folder}"), [row["prompt"] for row in ROWS]
    chosen, rejected = (reward(prompts, [row[side] for row in ROWS]) for side in ("chosen", "rejected"))
    (row,) = found["agreement"]
    assert row["agreement"] * 12 == pytest.approx(sum(a > b for a, b in zip(chosen, rejected, strict=True)))
    # With labels that never tie and a judge that never does, chance is one half.
    assert row["kappa"] == pytest.approx(2 * row["agreement"] - 1)


def test_tables_for_people(models, pairs, reward, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge_server(longer_is_better) as server, pytest.raises(SystemExit) as left:
        main(
            ["eval", str(models[0]), "--reference", str(models[0]), "--data", str(pairs), "--agreement",
             "--judge", f"{server.url}#tiny", "--reward", reward, "--max-new-tokens", "4"]
        )  # fmt: skip
    assert not left.value.code
    captured = capfd.readouterr()
    assert captured.out == ""
    for words in ("0.500 [", "0/6/0", "kappa", "position bias", "implicit reward", "reply tokens"):
        assert words in captured.err


def test_prompts_alone_and_messages(models, reward, evaluate, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Film 1:"}, {"prompt": "Film 2:"}])
    status, found, _ = evaluate(models[0], "--prompts", prompts, "--reward", reward, "--max-new-tokens", 4)
    assert status == 0
    assert [row["replies"] for row in found["samples"]] == [2]
    assert "pairs" not in found
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    data = write_rows(tmp_path / "messages.jsonl", rows)
    judging = ["--judge", f"reward:{reward}", "--agreement", "--max-new-tokens", 4]
    status, found, _ = evaluate(models[0], "--data", data, *judging)
    assert status == 0
    longer, shorter = (
        sum(sign * len(row["chosen"]) > sign * len(row["rejected"]) for row in ROWS) for sign in (1, -1)
    )
    (row,) = found["agreement"]
    assert (row["n_decided"], row["agreement"] * row["n"]) == (longer + shorter, longer)
    assert found["win_rates"][0]["against"] == "chosen"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([], "--data"),
        (["--data", "PAIRS", "--against", "reference", "--judge", "reward:REWARD"], "--against"),
        (["--data", "PAIRS", "--against", "chosen"], "--against"),
        (["--data", "PAIRS", "--against", "winner", "--judge", "reward:REWARD"], "--against"),
        (["--prompts", "PAIRS", "--against", "chosen", "--judge", "reward:REWARD"], "--against"),
        (["--prompts", "PAIRS", "--judge", "reward:REWARD"], "--judge"),
        (["--data", "PAIRS", "--samples", "0", "--judge", "reward:REWARD"], "--judge"),
        (["--data", "PAIRS", "--judge", "the-wise-one"], "--judge"),
        (["--data", "PAIRS", "--agreement"], "--agreement"),
        (["--data", "PAIRS", "--agreement", "--judge", "reward:REWARD", "--ties", "half"], "--agreement"),
        (["--data", "PAIRS", "--temperature", "0", "--samples", "2"], "--samples"),
        (["--data", "PAIRS", "--temperature", "-1"], "--temperature"),
        (["--data", "PAIRS", "--reference-temperature", "1"], "--reference-temperature"),
        (["--data", "PAIRS", "--beta", "0"], "--beta"),
        (["--data", "PAIRS", "--judge-setting", "max_tokens"], "--judge-setting"),
        (["--data", "PAIRS", "--reward", "no-such-file.py:reward"], "--reward"),
        (["--data", "PAIRS", "--prompts", "PAIRS", "--samples", "0"], "--prompts"),
        (["--data", "PAIRS", "--samples", "0", "--reward", "REWARD"], "--reward"),
        (["--data", "PAIRS", "--temperature", "0.5"], "--temperature"),
        (["--data", "PAIRS", "--samples", "2"], "--samples"),
        (["--data", "PAIRS", "--reward", "REWARD", "--top-p", "nan"], "--top-p"),
        (["--data", "PAIRS", "--reward", "REWARD", "--temperature", "nan"], "--temperature"),
        (
            ["--data", "PAIRS", "--reference", "MODEL", "--reference-temperature", "nan"],
            "--reference-temperature",
        ),
        (["--data", "PAIRS", "--reference", "MODEL", "--beta", "nan"], "--beta"),
        (["--data", "PAIRS", "--beta", "0.2"], "--beta"),
        (["--prompts", "PAIRS", "--max-length", "9"], "--max-length"),
        (["--prompts", "PAIRS", "--ties", "half"], "--ties"),
        (["--prompts", "PAIRS", "--map", "prompt=q"], "--map"),
        (["--data", "PAIRS", "--judge-prompt", "summary"], "--judge-prompt"),
        (["--data", "PAIRS", "--judge", "reward:REWARD", "--judge-setting", "a=1"], "--judge-setting"),
        (["--data", "PAIRS", "--judge", "reward:REWARD", "--judge-key-env", "KEY"], "--judge-key-env"),
        (["--data", "PAIRS", "--judge", "http://127.0.0.1:1/v1#m", "--judge-timeout", "nan"], "--judge"),
        (["--prompts", "EMPTY"], "--prompts"),
        (["--data", "PAIRS", "--reference", "no/such/folder"], "--reference"),
        (["--data", "PAIRS", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs"),
    ],
)
def test_what_contradicts_is_refused(models, pairs, reward, evaluate, arguments, option):
    empty = write_rows(pairs.with_name("empty.jsonl"), [])
    words = {"PAIRS": str(pairs), "REWARD": reward, "MODEL": str(models[0]), "EMPTY": str(empty)}
    given = [functools.reduce(lambda a, word: a.replace(word, words[word]), words, a) for a in arguments]
    status, found, said = evaluate(models[0], *given)
    assert (status, found) == (2, None)
    assert f"'{option}'" in said


def test_settings_of_a_chat_template_and_top_p_reach_the_samples(models, reward, evaluate, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models[0], folder)
    template = "{% for m in messages %}{{ mood }} {{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"prompt": [{"role": "user", "content": f"Film {i}:"}]} for i in range(4)]
    arguments = ["--prompts", write_rows(tmp_path / "prompts.jsonl", rows), "--reward", reward]
    replies = []
    for i, more in enumerate([[], ["--chat-template-kwargs", '{"mood": "very bad"}'], ["--top-p", 0.05]]):
        out = tmp_path / str(i)
        status, found, said = evaluate(
            folder, "--reference", models[1], *arguments, *more, "--out", out, "--max-new-tokens", 6
        )
        assert status == 0, said
        replies.append([row["reply"] for row in lines(out / "eval-samples.jsonl")])
        # Of a policy that is cut to its likeliest tokens the sum along replies is no KL.
        assert ("kl" in found["samples"][0]) == ("--top-p" not in more)
    assert replies[0] != replies[1]
    assert replies[0] != replies[2]


def test_a_runs_folder_keeps_its_files(models, reward, evaluate, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    names = ["samples.jsonl", "recipe.yaml", "summary.json", "metrics.jsonl"]
    for name in names:
        (run / name).write_text("of the run")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Film 1:"}])
    assert evaluate(models[0], "--prompts", prompts, "--out", run, "--max-new-tokens", 2)[0] == 0
    assert {(run / name).read_text() for name in names} == {"of the run"}
    assert {path.name for path in run.iterdir()} == {
        *names,
        "eval.json",
        "eval-samples.jsonl",
        "comparisons.jsonl",
    }


def test_figures_that_are_not_finite_are_no_result(models, pairs, evaluate, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(models[0], folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    status, found, said = evaluate(folder, "--reference", models[0], "--data", pairs, "--samples", 0)
    assert (status != 0, found) == (True, None)
    assert "nan" in said


def test_a_reference_of_another_vocabulary_is_refused(models, pairs, evaluate, tmp_path):
    tokenizer = train_byte_level_bpe(["entirely different words here"] * 20, 262)
    tokenizer.save_pretrained(tmp_path / "other")
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    make_model("llama", **settings).save_pretrained(tmp_path / "other")
    status, _, said = evaluate(models[0], "--reference", tmp_path / "other", "--data", pairs)
    assert status == 2
    assert "'--reference'" in said
