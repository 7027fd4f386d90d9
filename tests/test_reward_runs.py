"""Training reward models: adapters hold the value head, and saved models say the same when padded."""

import pytest
import torch
from families import make_model, make_pairs
from safetensors.torch import load_file
from test_reward_models import make_reward_model
from test_trainer import make_dataset
from transformers import AutoModelForSequenceClassification

from dpo_kit.cli import main
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.models import load_reward_model, value_head
from dpo_kit.packing import pack_tree
from dpo_kit.scoring import full_rewards, sequence_rewards
from dpo_kit.tokenizer import train_byte_level_bpe
from dpo_kit.trainer import PreferenceTrainer

SETTINGS = {
    "loss": "bradley_terry",
    "batch_size": 4,
    "max_steps": 2,
    "learning_rate": 0.01,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_trainer(folder, model, **arguments):
    """Reply tokens are 3 and above."""
    args = PreferenceConfig(output_dir=str(folder), **SETTINGS)
    return PreferenceTrainer(model=model, args=args, train_dataset=make_dataset(), **arguments)


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"task_type": "CAUSAL_LM"},
        {"task_type": "CAUSAL_LM", "modules_to_save": ["score"]},
        {"task_type": "FEATURE_EXTRACTION"},
        {"target_modules": ["q_proj", "score"]},
    ],
)
def test_an_adapter_that_leaves_the_value_head_as_it_is_is_refused(settings, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    with pytest.raises(InputError, match="SEQ_CLS") as caught:
        make_trainer(tmp_path, make_reward_model("llama"), peft_config=lora)
    assert caught.value.field == "model.lora"


@pytest.mark.parametrize("settings", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_an_adapter_is_saved_with_its_value_head(settings, lm_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, pairs = load_reward_model(lm_folder)[0], make_pairs()
    start = model.score.weight.detach().clone()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)
    trainer = make_trainer(tmp_path, model, peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    trained = trainer.model.eval()
    assert (value_head(trained).weight - start).abs().max() > 1e-3
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    expected = full_rewards(trained, pairs)
    torch.testing.assert_close(full_rewards(loaded.eval(), pairs), expected, rtol=1e-5, atol=1e-5)
    for merged in (False, True):
        adapted, said = load_reward_model(tmp_path / "model")
        assert said == ""
        whole = adapted.merge_and_unload() if merged else adapted
        torch.testing.assert_close(full_rewards(whole.eval(), pairs), expected, rtol=1e-5, atol=1e-5)


def padding_tokenizer(token):
    """Its padding token has this id, or it has none."""
    tokenizer = train_byte_level_bpe(["a b"], 258)
    tokenizer.pad_token = None if token is None else tokenizer.convert_ids_to_tokens(token)
    return tokenizer


@pytest.mark.parametrize("before", [None, 7])
def test_what_is_saved_gives_the_same_rewards_when_padded(before, tmp_path):
    model = make_reward_model("llama", pad_token_id=before)
    trainer = make_trainer(tmp_path, model, processing_class=padding_tokenizer(1))
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.pad_token_id == 1
    pairs = make_pairs()
    sequences = [[*p.prompt.tolist(), *p.replies[i].tolist()] for i in range(2) for p in pairs]
    padded = trainer.processing_class.pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        theirs = loaded(**padded).logits[:, 0]
        ours = sequence_rewards(model.eval(), pack_tree(pairs))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", ["none", "an end", "an end, of the model", "an adapter"])
def test_a_padding_token_that_will_not_do_is_told_of_once(settings, tmp_path):
    ends = {row["chosen_ids"][-1] for row in make_dataset()}
    token, before, adapter, message = {
        "none": (None, None, None, "no pad_token_id"),
        "an end": (min(ends), 0, None, f"end with token {min(ends)},"),
        "an end, of the model": (None, min(ends), None, f"end with token {min(ends)},"),
        "an adapter": (1, 0, {"task_type": "SEQ_CLS"}, "num_labels=1, pad_token_id=1"),
    }[settings]
    if adapter:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], **adapter)
    model = make_reward_model("llama", pad_token_id=before)
    tokenizer = padding_tokenizer(token)
    with pytest.warns(DpoKitWarning) as told:
        make_trainer(tmp_path, model, processing_class=tokenizer, peft_config=adapter)
    (said,) = [str(warning.message) for warning in told if warning.category is DpoKitWarning]
    assert message in said


def test_a_recipe_with_lora_trains_the_value_head(tmp_path):
    pytest.importorskip("peft")
    tokenizer = train_byte_level_bpe(["a b"], 258)
    tokenizer.save_pretrained(tmp_path / "lm")
    make_model("llama", vocab_size=len(tokenizer), pad_token_id=1).save_pretrained(tmp_path / "lm")
    row = '{"prompt": "a", "chosen": " b", "rejected": " a"}\n'
    (tmp_path / "pairs.jsonl").write_text(row * 8)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tmp_path / 'lm'}, lora: {{r: 2, target_modules: [q_proj]}}}}\n"
        f"data: {{train: {tmp_path / 'pairs.jsonl'}, cache_dir: {tmp_path / 'cache'}}}\n"
        "loss: bradley_terry\nreport: {enabled: false}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, batch_size: 4, max_steps: 2, disable_tqdm: true, "
        "save_strategy: 'no', use_cpu: true}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "recipe.yaml")])
    assert not left.value.code
    names = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in names
