"""Train and held-out files share no prompt, and more data moves none."""

import pytest
from pair_files import write

from dpo_kit.errors import InputError
from dpo_kit.pairs import LoadOptions, read_pairs
from dpo_kit.pairs.splitting import normalised, split_pairs

ROWS = [{"prompt": f"Question {i % 150}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(300)]


def split(folder, rows, **options):
    folder.mkdir(exist_ok=True)
    source = write(folder / "in.jsonl", *rows)
    found = split_pairs(source, folder / "train.jsonl", folder / "eval.jsonl", **options)
    return found, *([*read_pairs(folder / name)[0]] for name in ("train.jsonl", "eval.jsonl"))


def prompts(rows):
    return {row["prompt"] for row in rows}


def test_every_row_is_on_one_side_and_no_prompt_on_both(tmp_path):
    found, train, held_out = split(tmp_path, ROWS, share=0.2)
    assert sorted(row["chosen"] for row in train + held_out) == sorted(row["chosen"] for row in ROWS)
    assert not prompts(train) & prompts(held_out)
    # 150 draws of 0.2: 30 expected, five deviations are 24
    assert 6 <= len(prompts(held_out)) <= 54
    assert (found.train_rows, found.held_out_rows) == (len(train), len(held_out))
    assert (found.train_prompts, found.held_out_prompts) == (len(prompts(train)), len(prompts(held_out)))


def test_more_data_in_another_order_keeps_earlier_prompts_on_their_side(tmp_path):
    _, train, held_out = split(tmp_path / "a", ROWS[:100], share=0.2)
    _, more_train, more_held_out = split(tmp_path / "b", ROWS[::-1], share=0.2)
    assert prompts(train) < prompts(more_train)
    assert prompts(held_out) < prompts(more_held_out)


def test_another_seed_is_another_draw_and_the_same_seed_the_same_bytes(tmp_path):
    _, _, first = split(tmp_path / "a", ROWS, share=0.2)
    _, _, other = split(tmp_path / "b", ROWS, share=0.2, options=LoadOptions(seed=1))
    assert prompts(first) != prompts(other)
    before = (tmp_path / "a" / "eval.jsonl").read_bytes()
    split(tmp_path / "a", ROWS, share=0.2)
    assert (tmp_path / "a" / "eval.jsonl").read_bytes() == before


def test_case_white_space_and_width_make_no_new_prompt(tmp_path):
    variants = ["What is  it", " what IS\nit ", "Ｗhat is it"]
    rows = [
        {"prompt": f"{variant} {i}", "chosen": "a", "rejected": "b"}
        for i in range(40)
        for variant in variants
    ]
    _, train, held_out = split(tmp_path, rows, share=0.3)
    assert not {normalised(row["prompt"]) for row in train} & {normalised(row["prompt"]) for row in held_out}
    assert len(train) % 3 == len(held_out) % 3 == 0
    assert normalised(variants[0]) == normalised(variants[1]) == normalised(variants[2]) == "what is it"


def test_so_many_prompts_and_no_more(tmp_path):
    found, train, held_out = split(tmp_path, ROWS, prompts=7)
    assert len(prompts(held_out)) == found.held_out_prompts == 7
    assert len(held_out) == 14
    assert not prompts(train) & prompts(held_out)


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        (ROWS[:2], {"share": 1e-6}, "none falls on the held-out side"),
        (ROWS[:2], {"prompts": 2}, "has 2 prompts"),
        (ROWS, {"share": 1.0}, "between 0 and 1"),
        (ROWS, {"prompts": 0}, "1 or more"),
    ],
)
def test_a_split_that_leaves_a_side_empty_is_refused(tmp_path, rows, settings, problem):
    with pytest.raises(InputError, match=problem):
        split(tmp_path, rows, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_two_sides_are_two_files(tmp_path):
    source = write(tmp_path / "in.jsonl", *ROWS)
    with pytest.raises(InputError, match="written twice"):
        split_pairs(source, tmp_path / "a.jsonl", tmp_path / "." / "a.jsonl")
    with pytest.raises(InputError, match="one of the sources"):
        split_pairs(source, tmp_path / "a.jsonl", source)
