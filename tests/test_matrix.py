"""Every combination of the matrix trains as the plain definition says; every other one is refused."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from quantised_models import adapted, quantised, saved
from test_trainer import first_rows, make_dataset, make_trainer, step_gradients
from torch import Tensor, nn

from dpo_kit import matrix
from dpo_kit.errors import InputError
from dpo_kit.matrix import Combination, check_combination, combinations
from dpo_kit.models import load_model
from dpo_kit.reference import AdapterOffReference, LiveReference, NoReference
from dpo_kit.trainer import PreferenceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")

BETA, GAMMA = 0.5, 0.3
LOSSES = {True: {"name": "dpo", "beta": BETA}, False: {"name": "simpo", "beta": BETA, "gamma": GAMMA}}
STEPS, PAIRS = 3, 4
DATA = make_dataset(STEPS * PAIRS)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bases"))


@functools.cache
def start_of(training: str, device: str, base: Path) -> nn.Module:
    """The policy before its first step."""
    bits = training.rpartition("_")[2]
    is_quantised = bits in ("4bit", "8bit")
    body = quantised(base, bits, device=device) if is_quantised else load_model(base).to(device)
    if training == "full":
        return body
    if training == "adapter":
        targets = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return get_peft_model(body, IA3Config(task_type="CAUSAL_LM", **targets))
    return adapted(body)


def trainer_for(folder: Path, asked: Combination, base: Path) -> PreferenceTrainer:
    policy = copy.deepcopy(start_of(asked.training, asked.device, base))
    settings: dict[str, Any] = {"reference_mode": asked.reference, "layout": asked.layout}
    if asked.reference == "moving":
        settings |= {"reference_update_every": 2, "reference_update_weight": 1.0}
    if asked.reference == "adapter":
        assert isinstance(policy, PeftModel)
        policy.save_pretrained(folder / "start")
        settings["reference_adapter"] = str(folder / "start")
    return make_trainer(
        folder,
        model=policy,
        dataset=DATA,
        loss=LOSSES[asked.reference != "none"],
        reference_cache_dir=str(folder / "cache"),
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=asked.device == "cpu",
        **settings,
    )


def plain_logprob(model: nn.Module, prompt: list[int], reply: list[int]) -> Tensor:
    """Of a reply given its prompt, by the model's own logits, in fp64."""
    ids = torch.tensor([prompt + reply], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


def plain_loss(policy: nn.Module, reference: nn.Module | None, rows: list[dict[str, Any]]) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), or SimPO (arXiv 2405.14734, equation 6) without a reference."""
    losses = []
    for row in rows:
        scores = []
        for reply in (row["chosen_ids"], row["rejected_ids"]):
            logprob = plain_logprob(policy, row["prompt_ids"], reply)
            if reference is None:
                scores.append(logprob / len(reply))
            else:
                with torch.no_grad():
                    known = plain_logprob(reference, row["prompt_ids"], reply)
                scores.append(logprob - known)
        margin = BETA * (scores[0] - scores[1]) - (GAMMA if reference is None else 0)
        losses.append(-nn.functional.logsigmoid(margin))
    return torch.stack(losses).mean()


@functools.cache
def losses_of(training: str, needs_reference: bool, device: str, base: Path) -> list[float]:
    """Of each step, with a second model as the reference and the sequences apart."""
    reference = "live" if needs_reference else "none"
    with tempfile.TemporaryDirectory() as folder:
        asked = Combination(training, reference, "padded", device)
        return trained(trainer_for(Path(folder), asked, base))


def trained(trainer: PreferenceTrainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def check_against_the_definition(trainer: PreferenceTrainer, start: nn.Module) -> None:
    """Loss and gradient of a step of the policy that has moved away from its start."""
    rows = first_rows(DATA, PAIRS)
    loss, gradients = step_gradients(trainer, trainer.data_collator(rows))
    has_reference = not isinstance(trainer.reference, NoReference)
    reference = (trainer.reference.model or start) if has_reference else None
    trainer.model.zero_grad()
    expected = plain_loss(trainer.model, reference, rows)
    expected.backward()
    plain = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == plain.keys()
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 1e-3
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-4, atol=2e-5 * largest, msg=name)


def marks_of(asked: Combination) -> list[pytest.MarkDecorator]:
    if asked.device == "cuda":
        return [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    # Half a minute is enough for ordinary tests.
    rare = asked.reference in ("adapter", "moving") and asked.layout == "padded" and asked.training != "full"
    return [pytest.mark.slow] if rare else []


ALL = [pytest.param(each, id=str(each), marks=marks_of(each)) for each in combinations()]


@pytest.mark.parametrize("asked", ALL)
def test_a_combination_trains_as_the_definition_says(tmp_path: Path, base: Path, asked: Combination) -> None:
    trainer = trainer_for(tmp_path, asked, base)
    assert (matrix.training_of(trainer.model), matrix.reference_of(trainer.reference)) == (
        asked.training,
        asked.reference,
    )
    assert trainer.layout == asked.layout
    losses = trained(trainer)
    first = next(line for line in trainer.state.log_history if "rewards/margins" in line)
    assert len(losses) == STEPS
    if asked.reference != "none":
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    if asked.reference != "moving":
        # Whatever the reference is kept in, and however the sequences lie.
        same = losses_of(asked.training, asked.reference != "none", asked.device, base)
        assert losses == pytest.approx(same, rel=1e-4)
    check_against_the_definition(trainer, start_of(asked.training, asked.device, base))


def test_what_is_not_in_it_is_refused_with_the_reason(tmp_path: Path, base: Path) -> None:
    whole = load_model(base)
    with pytest.raises(InputError, match="no adapter"):
        make_trainer(tmp_path, model=whole, reference_mode="adapter_off")
    ia3 = get_peft_model(quantised(base, "4bit"), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="only LoRA is trained; IA3 was not tested there"):
        make_trainer(tmp_path, model=ia3)
    with pytest.raises(InputError, match="'adapter_4bit' was not tested") as caught:
        check_combination(ia3, LiveReference(whole, is_policy=False), "tree", "cpu")
    assert "lora_4bit" in str(caught.value)
    lora, live = copy.deepcopy(start_of("lora_8bit", "cpu", base)), LiveReference(whole, is_policy=False)
    check_combination(lora, live, "tree", "cpu")
    with pytest.raises(InputError, match="device 'mps' was not tested"):
        check_combination(lora, live, "tree", "mps")
    with pytest.raises(InputError, match="not cut into shards"):
        check_combination(lora, live, "tree", "cuda", sharded=True)
    check_combination(copy.deepcopy(start_of("lora", "cpu", base)), live, "tree", "cuda", sharded=True)
    with pytest.raises(InputError, match="no adapter"):
        check_combination(whole, AdapterOffReference(lora, is_policy=True), "tree", "cpu")


def test_the_page_has_the_matrix() -> None:
    page = (Path(__file__).parents[1] / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert matrix.markdown() in page
    assert len(combinations()) == page.count("| yes") * len(matrix.LAYOUTS) * len(matrix.DEVICES)
