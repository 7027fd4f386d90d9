"""Keys and passwords stay where they are: in no message, log, recipe, run folder, cache or file's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hostile import run
from judge_server import judge_server
from test_hostile_models import recipe
from tiny_runs import make_world

from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.models import load_model
from dpo_kit.recipe import Recipe, training_fields
from dpo_kit.shown_text import holds_secret, without_secrets
from dpo_kit.tokenizer import load_tokenizer
from dpo_kit.trainer import PreferenceTrainer

# Put together here, so that nobody takes this file for one with secrets in it.
HUB = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm"
OPENAI = "sk-" + "proj-AbCdEfGhIjKlMnOpQrStUv"
OWN = "kq7" + "Zs81LmWw04Tt"  # looks like nothing; known by its variable alone
PASSWORD = "hunter2" + "hunter2"
URL = f"https://user:{PASSWORD}@host.example"
SECRETS = (HUB, OPENAI, OWN, PASSWORD)

pytestmark = pytest.mark.filterwarnings("default::dpo_kit.errors.DpoKitWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A folder to work in; afterwards nothing that was said, written or named there holds a secret."""
    for name, value in (("HF_TOKEN", HUB), ("OPENAI_API_KEY", OPENAI), ("MY_JUDGE_KEY", OWN)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    said = capsys.readouterr()
    found = {"stdout": said.out.encode(), "stderr": said.err.encode()}
    found |= {"names": "\n".join(map(str, tmp_path.rglob("*"))).encode()}
    found |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place, content in found.items():
        for secret in SECRETS:
            assert secret.encode() not in content, f"a secret is in {place}"


def test_a_run_and_its_evaluation(work: Path, world: Path) -> None:
    lines = ["report.enabled=true", "train.save_strategy=steps", f"eval.prompts={world}/prompts.jsonl"]
    assert run("--debug", "train", recipe(work, world), *lines) == 0
    model = work / "run" / "model"
    assert run("sample", model, world / "prompts.jsonl", "--n", 1, "--out", work / "s.jsonl") == 0
    assert run("data", "inspect", world / "train.jsonl", "--json") == 0
    assert run("data", "convert", world / "train.jsonl", work / "c.parquet") == 0
    assert run("cache", "ls") == 0


def echoing(text: str, number: int) -> str:
    return f"Your key is {OWN}, or {OPENAI}.\nPreferred: A"


def test_a_judge_that_sends_the_key_back(work: Path, world: Path) -> None:
    models = (world / "policy", "--data", world / "heldout.jsonl", "--samples", 0, "--agreement")
    with judge_server(echoing) as server:
        judge = ("--judge", f"{server.url}#m", "--judge-key-env", "MY_JUDGE_KEY")
        assert run("--debug", "eval", *models, *judge, "--out", work / "eval", "--json") == 0
        assert server.keys
        assert set(server.keys) == {f"Bearer {OWN}"}
    with judge_server(lambda *_: (401, {}, {"error": {"message": f"wrong key {OWN}"}})) as server:
        judge = ("--judge", f"{server.url}#m", "--judge-key-env", "MY_JUDGE_KEY")
        assert run("--debug", "eval", *models, *judge) == 2
    for judge in (
        ("--judge", f"https://user:{PASSWORD}@host.example/v1#m"),
        ("--judge", "http://127.0.0.1:9/v1#m", "--judge-key-env", OPENAI),
        ("--judge", "http://127.0.0.1:9/v1#m", "--judge-setting", f'api_key="{OWN}"'),
        ("--judge", "http://127.0.0.1:9/v1#m", "--judge-setting", f'extra_body={{"key": "{OPENAI}"}}'),
        ("--judge", "http://127.0.0.1:9/v1#m", "--judge-setting",
         f'extra_headers={{"Authorization": "Bearer {OWN}"}}'),
    ):  # fmt: skip
        assert run("--debug", "eval", *models, *judge) == 2, judge


@pytest.mark.parametrize(
    "override",
    [
        f"train.hub_token={HUB}",
        f"train.hub_token={PASSWORD}",
        f"sft.train.hub_token={PASSWORD}",
        f"train.hub_model_id={HUB}",
        f"model.path={URL}/model",
        f"model.tokenizer={URL}/model",
        f"data.train={URL}/a.jsonl",
        f"data.train=[a.jsonl, {URL}/a.jsonl]",
        f"reference.path={URL}/model",
        f"eval.reward=classifier:{URL}/model",
        f"train.run_name={OWN}",
        f"data.chat_template_kwargs={{a: [{{b: {OPENAI}}}]}}",
        f"train.nothing_like_it={HUB}",
        f"model.config={{model_type: llama, token: {HUB}}}",
        f"train.max_steps={OPENAI}",
        f"{HUB}={OPENAI}",
        HUB,
    ],
    ids=range(17),
)
def test_a_recipe_with_a_secret_is_refused(override: str, work: Path, world: Path, capsys) -> None:
    assert run("--debug", "train", recipe(work, world), override) == 2
    said = capsys.readouterr().err
    assert not any(secret in said for secret in SECRETS)
    assert not (work / "run").exists()


def test_a_token_is_known_by_its_place_in_the_file(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.check(
            {"model": {"path": "x"}, "data": {"train": ["y"]}, "train": {"hub_token": "any"}},
            "r.yaml",
            {"train.hub_token": 7},
        )
    assert str(caught.value) == (
        "r.yaml:7: field 'train.hub_token': recipes are copied into run folders, and hold no token. "
        "Set the environment variable HF_TOKEN."
    )


@pytest.mark.parametrize(
    "command",
    [
        ("data", "inspect", f"{URL}/a.jsonl"),
        ("data", "inspect", f"hf://user:{PASSWORD}@owner/name@train"),
        ("data", "convert", f"{URL}/a.jsonl", "out.jsonl"),
        ("sample", f"{URL}/model", "prompts.jsonl", "--n", 1, "--out", "s.jsonl"),
        ("eval", f"{URL}/model", "--data", f"{URL}/a.jsonl"),
        ("logps", f"{URL}/model", f"{URL}/a.jsonl", "--out", "l.parquet"),
        ("train", f"{URL}/recipe.yaml"),
        ("report", f"{URL}/run"),
        ("data", "inspect", "a.jsonl", "--tokenizer", f"{URL}/model"),
    ],
    ids=range(9),
)
def test_urls_with_a_password(command: tuple, work: Path) -> None:
    (work / "a.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert run("--debug", *command) == 2


def test_a_trainer_with_a_token_writes_it_nowhere(work: Path, world: Path) -> None:
    """transformers pickles its arguments, token and all, beside each model and checkpoint."""
    rows = Dataset.from_list([json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()])
    config = PreferenceConfig(
        output_dir=str(work / "run"),
        hub_token=OWN,
        batch_size=4,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        bf16=False,
        disable_tqdm=True,
    )
    assert training_fields(config)["hub_token"] is None
    policy, tokenizer = load_model(world / "policy"), load_tokenizer(world / "policy")
    trainer = PreferenceTrainer(policy, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(work / "model"))
    assert list((work / "run" / "checkpoints").iterdir())


def test_what_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", OWN)
    monkeypatch.setenv("SHORT_KEY", "llama")
    monkeypatch.setenv("KEY", "/home/me/a-file-with-a-key")
    bearer, github, aws = f"Authorization: Bearer {PASSWORD}", "ghp_" + "a1" * 15, "AKIA" + "A1" * 8
    for text in (
        HUB,
        OPENAI,
        OWN,
        URL,
        URL.replace("//", "/"),
        f"hf://u:{PASSWORD}@x/y",
        bearer,
        github,
        aws,
    ):
        assert holds_secret(f"see {text}."), text
        assert not any(secret in without_secrets(f"see {text}.") for secret in SECRETS)
    assert without_secrets(f"{URL}/x") == "https://[secret]@host.example/x"
    harmless = (
        "hf://owner/name@train",
        "hf://squad@train",
        "llama",
        "/home/me/a-file-with-a-key",
        "a@b.example",
    )
    for text in (
        *harmless,
        "risk-averse-but-not-a-key",
        "hf_short",
        "http://localhost:8000/v1#m",
        "x://y/z@w",
    ):
        assert without_secrets(text) == text
