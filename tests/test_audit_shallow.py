"""Labels that can be won without reading are called so, and random ones are not."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit.audit.findings import Audit, Example
from dpo_kit.audit.inspection import inspect_pairs
from dpo_kit.audit.shallow import (
    ShallowChecks,
    cross_validated_scores,
    fit_logistic,
    independent,
    wilson,
)
from dpo_kit.audit.surface import FEATURES, surface
from dpo_kit.pairs.kinds import LISTS, PAIRS, UNPAIRED

HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-base/test.jsonl.gz"
WORDS = ["river", "stone", "cloud", "lamp", "winter", "paper", "garden", "music", "bread", "window"]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def pair(number: int, chosen: str, rejected: str, held_out: bool = False) -> Example:
    row = {"prompt": f"Question {number}?", "chosen": chosen, "rejected": rejected}
    return Example(row, PAIRS, row["prompt"], (chosen, rejected), f"a.jsonl:{number}", "a.jsonl", held_out)


def result_of(examples: list[Example], **settings):
    checks = ShallowChecks(**settings)
    for example in examples:
        checks.add(example)
    return checks.result()


def planted(share: float, count: int = 1500) -> list[Example]:
    """Pairs whose longer reply is chosen with that probability, and nothing else tells them apart."""
    draw = random.Random(1)
    examples = []
    for number in range(count):
        long, short = (text(draw, words) for words in (40, 20))
        right = draw.random() < share
        examples.append(pair(number, *((long, short) if right else (short, long))))
    return examples


def test_a_planted_length_bias_is_found_at_its_size():
    examples = planted(0.8)
    longer = np.mean([len(a) > len(b) for a, b in (example.replies for example in examples)])
    found = result_of(examples)
    rule, model = found.figures["length_rule"], found.figures["model"]
    assert rule["longer_chosen"] == pytest.approx(longer, abs=1e-12)
    assert rule["interval"][0] < 0.8 < rule["interval"][1]
    assert rule["accuracy"] == rule["longer_chosen"]
    assert model["accuracy"] == pytest.approx(longer, abs=0.02)
    assert {finding.name: finding.severity for finding in found.findings} == {
        "length_bias": "warning",
        "shallow_labels": "warning",
    }
    sentence = next(f.sentence for f in found.findings if f.name == "shallow_labels")
    assert "can be won without reading" in sentence
    assert "where chance is 50%" in sentence
    assert "held-out" not in sentence
    assert "'length'" in sentence or "'words'" in sentence
    assert sum(part["count"] for part in rule["by_difference"]) == len(examples)
    bounds = [bound for part in rule["by_difference"] for bound in (part["from"], part["to"])]
    assert bounds == sorted(bounds)


def test_shorter_replies_are_a_bias_too_and_a_sure_rule_is_an_error():
    found = result_of([pair(i, *reversed(e.replies)) for i, e in enumerate(planted(1.0, 300))])
    bias = next(finding for finding in found.findings if finding.name == "length_bias")
    assert bias.severity == "error"
    assert bias.sentence.startswith("The shorter reply is the preferred one in 100.0% of 300 pairs")
    assert found.figures["length_rule"]["accuracy"] == 1.0
    assert {finding.severity for finding in found.findings if finding.name == "shallow_labels"} == {"error"}


def test_a_small_set_is_not_accused_by_chance():
    def severities(right, count):
        pairs = [pair(i, *(("aa", "b") if i < right else ("a", "bb"))) for i in range(count)]
        return [f.severity for f in result_of(pairs).findings if f.name == "length_bias"]

    # 19 of 19 are too few; 18 of 20 are 0.70 to 0.97, 90 of 100 are 0.83 to 0.94.
    assert severities(19, 19) == []
    assert severities(18, 20) == ["warning"]
    assert severities(90, 100) == ["error"]
    assert severities(12, 20) == []


def test_what_is_not_tested_is_said_and_single_features_are_looked_at_all_the_same():
    row = [pair(0, "yes " * 9 + ".", "no") for _ in range(300)]
    found = result_of(row)
    assert found.figures["model"] is None
    severities = {finding.name: finding.severity for finding in found.findings}
    assert severities == {
        "length_bias": "error",
        "surface_giveaway": "warning",
        "shallow_not_tested": "note",
    }
    (note,) = (f for f in found.findings if f.name == "shallow_not_tested")
    assert "fewer than 20 different prompts (1)" in note.sentence
    few = result_of(row[:5])
    assert [finding.name for finding in few.findings] == ["shallow_not_tested"]
    assert "fewer than 20 pairs (5)" in few.findings[0].sentence


def test_pairs_of_one_prompt_are_worth_less_than_as_many_prompts():
    # 20 prompts of 50 pairs each, which all agree: as good as 20 pairs.
    right = np.repeat(np.arange(20) % 10 < 6, 50).astype(float)
    groups = np.repeat(np.arange(20), 50)
    assert independent(right, groups) == pytest.approx(19)
    assert independent(right, np.arange(1000)) == 1000
    assert independent(np.ones(1000), groups) == 20
    # Within each prompt as many right as in all: nothing is known better or worse for it.
    assert independent(np.tile(np.arange(50) % 2, 20).astype(float), groups) == 1000
    examples = [
        pair(i // 50, "aa", "b") if i // 50 % 10 < 6 else pair(i // 50, "a", "bb") for i in range(1000)
    ]
    assert result_of(examples).figures["length_rule"]["interval"] == pytest.approx(wilson(0.6 * 19, 19))


def test_a_feature_in_which_hardly_a_pair_differs_is_left_out():
    draw = random.Random(0)
    pairs = [pair(i, text(draw, 30) + " **b**" * (i < 3), text(draw, 30)) for i in range(400)]
    names = [feature["name"] for feature in result_of(pairs).figures["features"]]
    assert "bold" not in names
    assert "length" in names


def test_a_length_that_mostly_does_not_differ_is_no_bias():
    pairs = [pair(i, "aa", "b" if i < 50 else "bb") for i in range(500)]
    found = result_of(pairs)
    assert found.figures["length_rule"]["longer_chosen"] == 1.0
    assert found.figures["length_rule"]["accuracy"] == 0.55
    assert "length_bias" not in [finding.name for finding in found.findings]


def test_random_labels_cannot_be_won():
    found = result_of(planted(0.5))
    assert found.findings == ()
    # 1,500 labels: two standard errors are 0.026, and the folds make it a little worse than chance.
    assert found.figures["model"]["accuracy"] == pytest.approx(0.5, abs=0.04)


def test_a_mark_on_one_side_gives_the_labels_away():
    draw = random.Random(0)
    pairs = [(text(draw, 30), text(draw, 30)) for _ in range(400)]
    # A tenth of the chosen replies ends with white space, as data from another source may.
    found = result_of([pair(i, a + " " * (i % 10 == 0), b) for i, (a, b) in enumerate(pairs)])
    assert [finding.name for finding in found.findings] == ["surface_giveaway"]
    assert found.findings[0].count == 40
    assert "'ends with white space', the one with more of it is preferred in 100.0%" in (
        found.findings[0].sentence
    )


def test_swapping_the_replies_flips_every_feature_and_nothing_else():
    examples = planted(0.8, 200)
    swapped = [pair(i, *reversed(example.replies)) for i, example in enumerate(examples)]
    one, other = (result_of(each).figures["features"] for each in (examples, swapped))
    assert {f["name"]: -f["coefficient"] for f in one} == pytest.approx(
        {f["name"]: f["coefficient"] for f in other}, abs=1e-9
    )
    for name in FEATURES:
        shares = [f["accuracy"] for each in (one, other) for f in each if f["name"] == name]
        assert not shares or sum(shares) == pytest.approx(1)


def test_surface_by_hand():
    reply = " Sure! See https://a.b:\n- **one** 1\n- two 2"
    found = dict(zip(FEATURES, surface("One or two?", reply).tolist(), strict=True))
    counts = {
        "length": len(reply),
        "words": 9,
        "sentences": 1,
        "new lines": 2,
        "paragraphs": 0,
        "list items": 2,
        "bold": 2,
        "exclamation marks": 1,
        "question marks": 0,
    }
    for name, count in counts.items():
        assert found[name] == pytest.approx(np.log1p(count)), name
    # sure see https a b one 1 two 2; "one" and "two" are the prompt's.
    assert (found["different words"], found["words of the prompt"]) == (1, pytest.approx(2 / 9))
    assert found["digits"] == pytest.approx(2 / len(reply))
    assert found["capitals"] == pytest.approx(2 / len(reply))
    yes = {name for name in FEATURES if found[name] == 1 and name != "different words"}
    assert yes == {"opens with 'Sure'", "has a URL", "begins with white space"}


def test_the_fit_is_the_optimum_that_torch_finds():
    random_ = np.random.default_rng(0)
    x = random_.normal(size=(300, 6)) + 0.3
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = -torch.nn.functional.logsigmoid(torch.from_numpy(x) @ w).sum() + 0.5 * 1.0 * w @ w
        loss.backward()
        return loss

    optimiser.step(closure)
    found = fit_logistic(x)
    assert found == pytest.approx(w.detach().numpy(), abs=1e-6)
    gradient = found - x.T @ (1 / (1 + np.exp(x @ found)))
    assert np.abs(gradient).max() < 1e-5


def test_the_fit_stays_finite_where_the_labels_are_separable():
    x = np.abs(np.random.default_rng(0).normal(size=(1000, 1))) * 50
    w = fit_logistic(x)
    assert np.isfinite(w).all()
    assert abs(w[0] - (x[:, 0] / (1 + np.exp(x[:, 0] * w[0]))).sum()) < 1e-5


def test_a_model_is_judged_on_prompts_that_it_has_not_seen():
    # Feature k is on in fold k alone and always right there: whoever has not seen the fold knows nothing.
    folds = np.arange(500) % 5
    scores = cross_validated_scores(np.eye(5)[folds], folds)
    assert np.array_equal(scores, np.zeros(500))


def test_wilsons_interval():
    # Newcombe 1998, table I.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=5e-5)


def test_unpaired_rows_are_judged_alike_however_many_are_desirable():
    draw = random.Random(3)
    rows = []
    for number in range(2000):
        label = draw.random() < 0.9
        completion = text(draw, 40 if label and draw.random() < 0.9 else 20)
        row = {"prompt": f"Question {number}?", "completion": completion, "label": label}
        place = f"a.jsonl:{number}"
        rows.append(Example(row, UNPAIRED, row["prompt"], (completion,), place, "a.jsonl", False))
    found = result_of(rows)
    undesirable = sum(not row.row["label"] for row in rows)
    assert undesirable - 5 <= found.figures["pairs"] <= undesirable
    # A desirable reply is the longer one in 9 of 10 such pairs, and as long but for chance in the tenth.
    assert found.figures["length_rule"]["longer_chosen"] == pytest.approx(0.95, abs=0.05)
    assert found.figures["model"]["accuracy"] > 0.85


def test_a_lists_best_reply_is_set_against_each_worse_one():
    row = {"prompt": "q", "completions": ["aaaa", "aa", "a", "aaaaa"], "scores": [2.0, 2.0, 1.0, 0.0]}
    example = Example(row, LISTS, "q", tuple(row["completions"]), "a.jsonl:1", "a.jsonl", False)
    figures = result_of([example]).figures
    assert (figures["pairs"], figures["model"]) == (2, None)
    assert figures["length_rule"]["longer_chosen"] == 0.5


def test_what_is_kept_does_not_grow_and_all_pairs_count_for_the_length_rule():
    checks = ShallowChecks(sample=100)
    for example in planted(0.8, 600):
        checks.add(example)
    checks.add(pair(0, "held out", "b", held_out=True))
    figures = checks.result().figures
    assert (figures["pairs"], figures["model"]["pairs"]) == (600, 100)
    assert sum(part["count"] for part in figures["length_rule"]["by_difference"]) == 600


@pytest.mark.skipif(not HH.exists(), reason="the HH sample is not in ../shared/data")
def test_hh_prefers_shorter_replies_a_little_and_cannot_be_won():
    audit = inspect_pairs(HH)
    assert isinstance(audit, Audit)
    rule, model = (audit.figures["shallow"][name] for name in ("length_rule", "model"))
    assert rule["longer_chosen"] == audit.statistics.longer_chosen_share
    assert 0.55 < model["accuracy"] < 0.66
    assert not [f for f in audit.findings if f.name == "shallow_labels" and f.severity != "note"]
