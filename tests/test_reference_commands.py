"""dpo-kit cache: what is kept, whether it is whole, and clearing up."""

import json
import os
import time

import pytest
from families import make_model, make_pairs
from test_reference_cache import cached, fill, sequences_in

from dpo_kit import cli
from dpo_kit.reference import ReferenceCache


def run_cli(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    return left.value.code or 0


def age(store, days):
    for path in store.folder.iterdir():
        then = time.time() - days * 86400
        os.utime(path, (then, then))


@pytest.fixture
def two_models(tmp_path):
    """A cache of two models: one not used for ten days, one with a damaged and a half-written file."""
    pairs = make_pairs()
    for seed, tokens in ((0, False), (1, True)):
        model = make_model("llama", seed=seed)
        model.config._name_or_path = f"models/{seed}"
        fill(cached(model, tmp_path, tokens=tokens), pairs)
    stores = {s.summary().name: s for s in ReferenceCache(tmp_path).stores()}
    old, new = stores["models/0"], stores["models/1"]
    (new.folder / f"sequences-{'0' * 32}.safetensors.damaged").write_bytes(b"x")
    (new.folder / ".sequences-1.safetensors.1-2.writing").write_bytes(b"y")
    age(old, 10)
    return tmp_path, old, new, sequences_in(pairs)


def test_ls_shows_what_is_kept(two_models, capsys):
    folder, old, new, count = two_models
    assert run_cli("cache", "ls", "--json", "--cache-dir", folder) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(folder / "reference")
    rows = {row["name"]: row for row in found["models"]}
    assert [row["key"] for row in found["models"]] == [new.folder.name, old.folder.name]
    assert (rows["models/0"]["sequences"], rows["models/0"]["with_tokens"]) == (count, 0)
    assert (rows["models/1"]["sequences"], rows["models/1"]["with_tokens"]) == (count, count)
    assert rows["models/1"]["damaged"] == 1
    assert rows["models/0"]["dtype"] == "torch.float32"
    assert rows["models/0"]["bytes"] == sum(p.stat().st_size for p in old.folder.iterdir())
    assert run_cli("cache", "ls", "--cache-dir", folder) == 0
    assert "models/0" in capsys.readouterr().out
    assert run_cli("cache", "ls", "--json", "--cache-dir", folder / "none") == 0
    assert json.loads(capsys.readouterr().out)["models"] == []


def test_verify_names_what_is_damaged(two_models, capsys):
    folder, old, _, _ = two_models
    assert run_cli("cache", "verify", "--cache-dir", folder) == 0
    victim = old.shards()[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert run_cli("cache", "verify", "--cache-dir", folder) == 1
    assert str(victim) in capsys.readouterr().out
    # It only looks.
    assert victim.exists()


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        (["--older-than", "9"], "old"),
        (["--older-than", "11"], ""),
        (["--model", "NEW"], "new"),
        (["--model", "NEW", "--older-than", "9"], ""),
        (["--damaged"], "damaged"),
        (["--all"], "all"),
    ],
)
def test_prune_removes_what_is_asked_and_nothing_else(two_models, options, goes, capsys):
    folder, old, new, _ = two_models
    (old.folder / "notes.txt").write_text("mine")
    age(old, 10)
    options = [option.replace("NEW", new.folder.name[:8]) for option in options]
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert run_cli("cache", "prune", *options, "--dry-run", "--cache-dir", folder) == 0
    assert {path for path in folder.rglob("*") if path.is_file()} == before
    said = capsys.readouterr()
    assert run_cli("cache", "prune", *options, "--cache-dir", folder) == 0
    gone = before - {path for path in folder.rglob("*") if path.is_file()}
    expected = {
        "old": {path for path in before if path.parent == old.folder},
        "new": {path for path in before if path.parent == new.folder},
        "damaged": {path for path in before if path.name.endswith(".damaged")},
        "all": before,
        "": set(),
    }[goes] - {old.folder / "notes.txt"}
    assert gone == expected
    assert {line for line in said.out.splitlines() if line} == {str(path) for path in gone}


def test_prune_clears_what_a_dead_process_left_in_writing(two_models):
    folder, _, new, _ = two_models
    left = next(path for path in new.folder.iterdir() if path.name.endswith(".writing"))
    os.utime(left, (1, 1))
    assert run_cli("cache", "prune", "--damaged", "--cache-dir", folder) == 0
    assert not left.exists()


def test_prune_refuses_to_guess(two_models, capsys):
    folder, *_ = two_models
    assert run_cli("cache", "prune", "--cache-dir", folder) == 2
    assert "--older-than" in capsys.readouterr().err
    for options, problem in (
        (("--model", "zz"), "no model has"),
        (("--model", ""), "2 models have"),
        (("--all", "--older-than", "9"), "--all"),
        (("--older-than", "-1"), "0 or more"),
        (("--older-than", "nan"), "0 or more"),
    ):
        assert run_cli("cache", "prune", *options, "--cache-dir", folder) == 2
        assert problem in capsys.readouterr().err
    assert len(ReferenceCache(folder).stores()) == 2
