"""What a comparison refuses before anything is made, and what it takes for finished when it goes on."""

import json
import shutil

import pytest
import yaml
from families import make_model
from frontier_folder import write_comparison_folder
from pair_files import write

from dpo_kit.comparison.checks import check_comparison
from dpo_kit.comparison.execute import Ended, Job, changed_key, outcome, recipe_digest
from dpo_kit.comparison.folder import open_folder
from dpo_kit.comparison.frontier import run_frontier
from dpo_kit.comparison.page import write_page
from dpo_kit.comparison.record import Record
from dpo_kit.comparison.results import read_table, write_table
from dpo_kit.comparison.runs import runs_of
from dpo_kit.comparison.tables import MARKS, markdown_tables, print_tables
from dpo_kit.errors import InputError
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import alone_in
from dpo_kit.tokenizer import train_byte_level_bpe

HOSTILE = "[/red] a|b [bold]c[/bold]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The content of a recipe, and its files."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = train_byte_level_bpe(["the film was good and the other one was bad"] * 3, 280)
    tokenizer.save_pretrained(folder / "lm")
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(folder / "lm")
    write(folder / "pairs.jsonl", {"prompt": "a", "chosen": " good", "rejected": " bad"})
    write(folder / "prompts.jsonl", {"prompt": "a"}, {"prompt": "the"})
    (folder / "reward.py").write_text("def reward(text):\n    return len(text)\n")
    return folder, {
        "model": {"path": str(folder / "lm")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "train": {"use_cpu": True, "bf16": False},
        "eval": {"prompts": str(folder / "prompts.jsonl"), "reward": f"{folder / 'reward.py'}:reward"},
    }


def recipe_of(made, folder, methods=None, **changes):
    frontier = {"methods": methods or {"dpo": {"label": "DPO"}}, "output_dir": str(folder)}
    return Recipe.check(json.loads(json.dumps(made[1] | changes)) | {"frontier": frontier})


def finish(run):
    """What a run leaves that has ended."""
    resolved = run.recipe.resolved(run.recipe.training_config())
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    (run.folder / "summary.json").write_text(json.dumps({"recipe": recipe_digest(run.recipe)}))


def test_a_folder_is_one_comparisons_at_a_time(made, tmp_path):
    recipe = recipe_of(made, tmp_path / "f")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    taken = pytest.raises(InputError, match="another process is carrying out")
    with alone_in(tmp_path / "f", "comparison", "frontier.output_dir"), taken:
        run_frontier(tmp_path / "recipe.yaml", [], quick=False, say=print)
    assert not (tmp_path / "f" / "recipe.yaml").exists()
    with alone_in(tmp_path / "f", "comparison", "frontier.output_dir"):
        pass


@pytest.mark.parametrize(
    "key",
    [
        "model.path",
        "sft.corpus",
        "candidates",
        "frontier.workers",
        "eval.max_new_tokens",
        "eval",
        "train.seed",
        "ppo.output_dir",
        "reward_model.train.max_steps",
    ],
)
@pytest.mark.parametrize("how", ["set", "sweep"])
def test_a_method_changes_nothing_that_is_the_same_for_all(made, tmp_path, key, how):
    value = [1] if how == "sweep" else 1
    recipe = recipe_of(made, tmp_path, {"mine": {"label": "Mine", how: {key: value}}})
    with pytest.raises(InputError, match="a method cannot change this") as caught:
        runs_of(recipe, tmp_path)
    assert caught.value.field == f"frontier.methods.mine: {key}"


def test_a_method_changes_its_own(made, tmp_path):
    free = {"eval.every": 3, "data.max_length": 20, "train.max_steps": 2, "reward_model.path": "rm"}
    (run,) = runs_of(recipe_of(made, tmp_path, {"mine": {"label": "Mine", "set": free}}), tmp_path)
    assert (run.recipe.eval.every, run.recipe.data.max_length) == (3, 20)


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"../x": {"label": "X"}}, "no key of a method"),
        ({".x": {"label": "X"}}, "no key of a method"),
        ({"sft": {"label": "X"}}, "shared work"),
        ({"reference": {"label": "X"}}, "shared work"),
        ({"x": {"label": "X", "seeds": []}}, "seeds"),
        ({"x": {"label": "X", "sweep": {"loss.beta": []}}}, "sweep"),
        ({"x": {"label": "X", "command": "best_of_n", "set": {"best_of_n.n": [0]}}}, "best_of_n"),
    ],
)
def test_methods_that_make_no_runs_are_refused(made, tmp_path, methods, match):
    with pytest.raises(InputError, match=match):
        runs_of(recipe_of(made, tmp_path, methods), tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ppo.settings": {"learning_rat": 1}}, "ppo.settings.learning_rat"),
        ({"ppo.settings": {"num_ppo_epochs": "many"}}, "ppo.settings.num_ppo_epochs"),
        ({"ppo.reward": "/nowhere.py:reward"}, "ppo.reward"),
    ],
)
def test_what_a_run_by_rl_would_refuse_is_refused_at_once(made, tmp_path, changes, field):
    pytest.importorskip("trl")
    recipe = recipe_of(made, tmp_path, {"mine": {"label": "Mine", "command": "ppo", "set": changes}})
    with pytest.raises(InputError) as caught:
        check_comparison(recipe, runs_of(recipe, tmp_path))
    assert caught.value.field == f"frontier.methods.mine: {field}"


def test_runs_that_would_start_from_different_weights_are_refused(made, tmp_path):
    model = {"config": {"model_type": "llama"}, "tokenizer": str(made[0] / "lm")}
    recipe = recipe_of(made, tmp_path, model=model)
    with pytest.raises(InputError, match="other random weights"):
        check_comparison(recipe, runs_of(recipe, tmp_path))


def test_a_finished_run_stays_one_where_nothing_that_matters_changed(made, tmp_path, monkeypatch):
    (run,) = runs_of(recipe_of(made, tmp_path / "a"), tmp_path / "a")
    finish(run)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a", tmp_path / "b", type(tmp_path)("b")):
        data = {"train": str(made[0] / "pairs.jsonl"), "num_proc": 2, "cache_dir": str(tmp_path / "tokens")}
        (again,) = runs_of(recipe_of(made, folder, data=data), folder)
        assert recipe_digest(again.recipe) != recipe_digest(run.recipe)
        assert outcome(again) == "done"
    (other,) = runs_of(recipe_of(made, "b", {"dpo": {"label": "D", "set": {"loss.beta": 7}}}), tmp_path / "b")
    assert outcome(other) == ""
    assert changed_key(other) == "loss.beta"
    # A summary that is of no recipe which is there says nothing.
    (tmp_path / "b" / "runs" / run.name / "summary.json").write_text('{"recipe": "of another"}')
    assert changed_key(other) == "recipe"


def test_a_changed_file_is_named(made, tmp_path):
    recipe = recipe_of(made, tmp_path / "f")
    runs = runs_of(recipe, tmp_path / "f")
    with alone_in(tmp_path / "f", "comparison", "frontier.output_dir"):
        open_folder(tmp_path / "f", recipe, runs)
        open_folder(tmp_path / "f", recipe, runs)
        for name in ("reward.py", "pairs.jsonl", "prompts.jsonl"):
            before = (made[0] / name).read_bytes()
            (made[0] / name).write_bytes(before + b"\n")
            with pytest.raises(InputError, match="was changed since") as caught:
                open_folder(tmp_path / "f", recipe, runs)
            assert caught.value.file == str(made[0] / name)
            (made[0] / name).write_bytes(before)
        open_folder(tmp_path / "f", recipe, runs)


def test_a_log_of_progress_bars_ends_in_one_line(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"training\n\r 10%|#   |\r\x1b[31m100%|####|\x1b[0m\nerror: no room\r\n")
    ending = Ended(Job("run", "train", tmp_path, log), 1, 1.0)
    assert ending.last_lines(1) == "error: no room"
    assert ending.last_lines(2) == "100%|####|\nerror: no room"
    write_table(tmp_path / "t.csv", ["a", "b"], [{"a": "x\ry\nz", "b": 1}])
    assert read_table(tmp_path / "t.csv") == [{"a": "x y z", "b": "1"}]


def test_tables_show_text_as_it_is(tmp_path, capsys):
    folder = write_comparison_folder(tmp_path / "f")
    rows = read_table(folder / "runs.csv")
    rows[0] |= {"outcome": "failed", "problem": HOSTILE}
    write_table(folder / "runs.csv", list(rows[0]), rows)
    print_tables(folder)
    assert HOSTILE in capsys.readouterr().err
    last = markdown_tables(folder).splitlines()[-1]
    assert last.replace(r"\|", "").count("|") == 5
    assert r"a\|b" in last


def test_tables_and_page_have_the_same_marks_and_columns(tmp_path):
    folder = write_comparison_folder(tmp_path / "f")
    page = write_page(folder).read_text().split("Reward at matched KL")[1]
    cells, rest = page.split("</tbody>", 1)
    markdown = markdown_tables(folder)
    rows = "\n".join(line for line in markdown.splitlines() if line.startswith("| "))
    counts = [(cells.count(mark), rows.count(mark)) for mark in MARKS.values()]
    assert all(one == other for one, other in counts)
    assert counts[0][0] > 5
    for words in ("over prompts alone: each setting was run once", "▼ below DPO beyond chance"):
        assert words in rest
        assert words in markdown
    for column in ("Diverged", "Time, DPO = 1", "Peak memory"):
        assert column in rest
        assert column in markdown


def test_the_reward_beside_a_reply_of_best_of_n_is_called_expected(tmp_path):
    page = write_page(write_comparison_folder(tmp_path / "f")).read_text()
    samples = page.split("Samples at a KL")[1].split("Where it went wrong")[0]
    rows = samples.split("<tr>")
    assert all(("expected</div>" in row) == ("Best-of-N<" in row) for row in rows)
    assert samples.count("expected</div>") == 6


def test_replies_are_read_once(tmp_path, monkeypatch):
    record, read = Record(write_comparison_folder(tmp_path / "f")), []
    monkeypatch.setattr("dpo_kit.comparison.record.read_lines", lambda path: read.append(path) or [])
    for point in record.of("dpo") * 3:
        record.rewards(point)
        record.standard_error(point)
    assert len(read) == len(set(read)) == len(record.of("dpo"))
