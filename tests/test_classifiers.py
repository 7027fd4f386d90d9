"""A transformers classifier as a reward: log-odds of a label, whatever the batch; no text cut in silence."""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.evaluation import load_reward
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

TWO = {0: "NEGATIVE", 1: "POSITIVE"}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 1,
}
PROMPTS = ["the film", "the other film was", "a"]
REPLIES = [" was good", " bad and long and good", ""]


def save_classifier(folder, labels=TWO, model_type="roberta", positions=34, **changes):
    tokenizer = train_byte_level_bpe(["the film was good and the other was bad"] * 3, 280)
    tokenizer.save_pretrained(folder)
    fields = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "id2label": labels}
    fields["label2id"] = {name: number for number, name in labels.items()}
    config = AutoConfig.for_model(model_type, **fields | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    return model.eval(), load_tokenizer(folder)


@torch.no_grad()
def probabilities(model, tokenizer, kind="softmax"):
    """Each text alone, by transformers."""
    texts = [p + r for p, r in zip(PROMPTS, REPLIES, strict=True)]
    logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()
    return (logits.softmax(-1) if kind == "softmax" else logits.sigmoid()).numpy()


@pytest.mark.parametrize(
    ("labels", "asked", "number"),
    [
        (TWO, "", 1),
        (TWO, "@negative", 0),
        ({0: "LABEL_0", 1: "LABEL_1"}, "", 1),
        ({0: "Positive", 1: "neutral", 2: "Negative"}, "", 0),
        ({0: "1 star", 1: "2 stars", 2: "3 stars"}, "@3 stars", 2),
    ],
)
def test_the_reward_is_the_log_odds_of_the_label(labels, asked, number, tmp_path):
    p = probabilities(*save_classifier(tmp_path, labels))[:, number]
    found = load_reward(f"classifier:{tmp_path}{asked}")(PROMPTS, REPLIES)
    np.testing.assert_allclose(found, np.log(p / (1 - p)), rtol=1e-4, atol=1e-4)
    assert np.std(found) > 0.1


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"labels": {0: "score"}}]
)
def test_labels_that_do_not_exclude_each_other(changes, tmp_path):
    p = probabilities(*save_classifier(tmp_path, **changes), kind="sigmoid")[:, -1]
    found = load_reward(f"classifier:{tmp_path}")(PROMPTS, REPLIES)
    np.testing.assert_allclose(found, np.log(p / (1 - p)), rtol=1e-4, atol=1e-4)


def test_batches_change_nothing_and_a_decoder_without_padding_token_works(tmp_path):
    for name, settings in {"encoder": {}, "decoder": {"model_type": "gpt2", "pad_token_id": None}}.items():
        save_classifier(tmp_path / name, **settings)
        reward = load_reward(f"classifier:{tmp_path / name}")
        together = reward(PROMPTS, REPLIES)
        alone = [reward([p], [r])[0] for p, r in zip(PROMPTS, REPLIES, strict=True)]
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    assert reward([], []) == []


def test_messages_are_judged_by_the_reply(tmp_path):
    save_classifier(tmp_path)
    reward = load_reward(f"classifier:{tmp_path}")
    after_messages, alone, empty = reward([[{"role": "user", "content": "x"}], "", ""], ["good", "good", ""])
    assert after_messages == alone
    assert np.isfinite(empty)


def test_a_text_that_is_too_long_is_cut_and_told_of_once(tmp_path):
    """RoBERTa with 34 positions reads 32 tokens: the first two are padding's."""
    _, tokenizer = save_classifier(tmp_path)
    reward = load_reward(f"classifier:{tmp_path}")
    text = " bad" * 32
    assert len(tokenizer(text)["input_ids"]) == 32
    with pytest.warns(DpoKitWarning, match="1 of 3 texts are longer than the 32 tokens"):
        first, second, _ = reward(["", "", ""], [text, text + " good", " bad"])
    assert first == pytest.approx(second, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward([""], [text + " good"])


@pytest.mark.parametrize(
    ("labels", "asked", "problem"),
    [
        (TWO, "@joy", "no label 'joy'.*NEGATIVE, POSITIVE"),
        ({0: "spam", 1: "ham"}, "", "none of the classifier's labels is positive.*spam, ham"),
        ({i: f"LABEL_{i}" for i in range(5)}, "", "none of the classifier's labels is positive"),
    ],
)
def test_labels_that_are_not_there(labels, asked, problem, tmp_path):
    save_classifier(tmp_path, labels)
    with pytest.raises(InputError, match=problem) as caught:
        load_reward(f"classifier:{tmp_path}{asked}", field="candidates.reward")
    assert caught.value.field == "candidates.reward"


def test_a_classifier_that_gives_no_number_is_found_out(tmp_path):
    model, _ = save_classifier(tmp_path)
    with torch.no_grad():
        model.classifier.out_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reply 1 and not a finite number"):
        load_reward(f"classifier:{tmp_path}")(PROMPTS, REPLIES)


def test_a_folder_with_signs_in_its_name(tmp_path):
    folder = tmp_path / "a:b@c"
    save_classifier(folder)
    plain = load_reward(f"classifier:{folder}")(PROMPTS, REPLIES)
    assert load_reward(f"classifier:{folder}@POSITIVE")(PROMPTS, REPLIES) == plain


def test_what_is_no_classifier(tmp_path):
    model, tokenizer = save_classifier(tmp_path / "lm")
    model.roberta.save_pretrained(tmp_path / "lm")
    (tmp_path / "pickled").mkdir()
    tokenizer.save_pretrained(tmp_path / "pickled")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name, problem in (
        ("lm", "weights lack classifier"),
        ("pickled", "safetensors"),
        ("none", "no such folder"),
    ):
        with pytest.raises(InputError, match=problem) as caught:
            load_reward(f"classifier:{tmp_path / name}")
        assert caught.value.field == "eval.reward"
