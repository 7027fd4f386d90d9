"""Tree and padded log-probs equal those of separate sequences with full logits, on every family."""

import numpy as np
import pytest
import torch
from families import OTHER_FAMILIES, TREE_FAMILIES, make_model, make_pairs

from dpo_kit.attention import TREE_ATTENTION
from dpo_kit.examples import PairTokens
from dpo_kit.packing import pack_padded, pack_tree
from dpo_kit.scoring import choose_layout, full_logit_logprobs, head_inputs, sequence_logprobs


def plain_loss_gradients(model, pairs, upstream):
    """Separate sequences, full logits, with gradients."""
    model.zero_grad()
    total = 0.0
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    values = []
    for (prompt, reply), factor in zip(sequences, upstream, strict=True):
        ids = torch.tensor(np.concatenate([prompt, reply]))[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(logps[len(prompt) - 1 :].sum())
        total = total + factor * values[-1]
    total.backward()
    return torch.stack(values).detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", TREE_FAMILIES)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_values_and_gradients_equal_the_plain_definition(family, layout):
    model, pairs = make_model(family, torch.float64).eval(), make_pairs()
    upstream = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64)
    expected, gradients = plain_loss_gradients(model, pairs, upstream)
    if layout == "tree":
        assert choose_layout(model, pairs) == ("tree", "")
    batch = pack_tree(pairs) if layout == "tree" else pack_padded(pairs)
    model.zero_grad()
    found = sequence_logprobs(model, batch).sequences
    # Where there is a soft cap, transformers takes the softmax in fp32 whatever the dtype.
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)
    (found * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_fp32_within_1e_5_relative_per_sequence(family):
    model, pairs = make_model(family).eval(), make_pairs(12)
    expected = full_logit_logprobs(model.double(), pairs)
    model.float()
    assert choose_layout(model, pairs)[0] == "tree"
    batch = pack_tree(pairs)
    found = sequence_logprobs(model, batch).sequences.double()
    exact = torch.zeros_like(found).index_add(0, batch.entry_sequence, expected)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_catches_recurrent_models_and_the_padded_path_serves_them(family, dtype):
    # The usual small initialisation: the error of a wrong tree is then small, and must still be seen.
    model, pairs = make_model(family, dtype, initializer_range=0.02).eval(), make_pairs()
    layout, reason = choose_layout(model, pairs)
    assert layout == "padded"
    assert "cannot be trusted with token trees" in reason
    assert model.config._attn_implementation != TREE_ATTENTION


def test_a_sliding_window_is_kept_in_a_long_tree():
    model = make_model("mistral", torch.float64).eval()
    wide = make_model("mistral", torch.float64, sliding_window=None).eval()
    pairs = make_pairs(longest=60)
    expected = full_logit_logprobs(model, pairs)
    assert not torch.allclose(expected, full_logit_logprobs(wide, pairs), rtol=1e-3)
    assert choose_layout(model, pairs)[0] == "tree"
    torch.testing.assert_close(sequence_logprobs(model, pack_tree(pairs)).entries, expected)


def test_replies_without_rejected():
    model = make_model("llama", torch.float64).eval()
    pairs = [PairTokens(p.prompt, p.chosen, None) for p in make_pairs()]
    choose_layout(model, pairs)
    found = sequence_logprobs(model, pack_tree(pairs))
    assert found.sequences.shape == (len(pairs),)
    torch.testing.assert_close(found.entries, full_logit_logprobs(model, pairs))


def test_the_head_is_itself_again_after_an_error():
    model, pairs = make_model("llama"), make_pairs()
    choose_layout(model, pairs)
    batch = pack_tree(pairs)
    batch.prediction_targets[0] = 10**6
    with pytest.raises(ValueError, match="targets must lie in"):
        sequence_logprobs(model, batch)
    assert "forward" not in vars(model.lm_head)
    batch.prediction_rows[0] = 10**6
    with pytest.raises((IndexError, RuntimeError)):
        head_inputs(model, batch)
    assert "forward" not in vars(model.lm_head)


def plain_distributions(model, pairs):
    """[M, V] log-probs that each completion token is drawn from, and [M] the tokens: full logits."""
    rows, tokens = [], []
    for prompt, reply in [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]:
        ids = torch.tensor(np.concatenate([prompt, reply]))[None]
        rows.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        tokens.append(ids[0, len(prompt) :])
    return torch.cat(rows), torch.cat(tokens)


EXTRAS = ("entropy", "squared_probs", "top1")


def plain_extras(logps_MV, tokens):
    p = logps_MV.exp()
    target = logps_MV.gather(1, tokens[:, None])
    return {
        "entropy": -(p * logps_MV).sum(-1),
        "squared_probs": p.square().sum(-1),
        "top1": (target >= logps_MV.max(-1, keepdim=True).values).squeeze(1).to(p.dtype),
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "cohere", "gpt2"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_extras_and_the_divergence_from_a_reference_are_those_of_full_logits(family, layout):
    """Llama's head is tied, Gemma 2's soft-capped and tied, Granite's and Cohere's scaled."""
    pairs = make_pairs()
    model, reference = (make_model(family, torch.float64, seed=seed).eval() for seed in (0, 1))
    logps, tokens = plain_distributions(model, pairs)
    with torch.no_grad():
        reference_logps, _ = plain_distributions(reference, pairs)
    kl = (reference_logps.exp() * (reference_logps - logps)).sum(-1)
    at_tokens = logps.gather(1, tokens[:, None]).squeeze(1)
    upstream = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)
    (kl * upstream + at_tokens * upstream.flip(0)).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    batch = pack_tree(pairs) if layout == "tree" else pack_padded(pairs)
    inputs = head_inputs(reference, batch)
    assert inputs.hidden.shape == (len(batch.prediction_rows), 32)
    found = sequence_logprobs(model, batch, extras=EXTRAS, reference=inputs)
    # Where there is a soft cap, transformers takes the softmax in fp32 whatever the dtype.
    close = {"rtol": 1e-6, "atol": 1e-6} if family == "gemma2" else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(found.entries, at_tokens, **close)
    torch.testing.assert_close(found.reference_entries, full_logit_logprobs(reference, pairs), **close)
    torch.testing.assert_close(found.extras["reference_kl"], kl, **close)
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64)
    sums = sums.index_add(0, batch.entry_sequence, full_logit_logprobs(reference, pairs))
    torch.testing.assert_close(found.reference_sequences, sums, **close)
    for name, value in plain_extras(logps.detach(), tokens).items():
        torch.testing.assert_close(found.extras[name], value, **close)
        assert not found.extras[name].requires_grad
    assert not found.reference_entries.requires_grad
    (found.extras["reference_kl"] * upstream + found.entries * upstream.flip(0)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(p.grad is None for p in reference.parameters())


def test_extras_without_a_reference_are_those_of_full_logits():
    model, pairs = make_model("gemma2").eval(), make_pairs()
    batch = pack_tree(pairs)
    with torch.no_grad():
        expected = plain_extras(*plain_distributions(model.double(), pairs))
        found = sequence_logprobs(model.float(), batch, extras=EXTRAS)
    assert found.reference_sequences is None
    for name, value in expected.items():
        torch.testing.assert_close(found.extras[name].double(), value, rtol=1e-4, atol=1e-5)
    assert sequence_logprobs(model, batch).extras == {}


def test_a_model_does_not_diverge_from_itself():
    """The policy with its adapter off is the reference; a new adapter changes nothing yet."""
    peft = pytest.importorskip("peft")
    model, pairs = make_model("qwen2").eval(), make_pairs()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    batch = pack_tree(pairs)
    with model.disable_adapter():
        inputs = head_inputs(model, batch)
    found = sequence_logprobs(model, batch, reference=inputs)
    torch.testing.assert_close(found.reference_entries, found.entries.detach())
    assert found.extras["reference_kl"].abs().max() < 1e-6
    found.extras["reference_kl"].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in gradients) < 1e-4, "the divergence is smallest here"


def test_a_divergence_alone_reaches_the_hooks_that_hang_on_the_output():
    """As wrappers put them (FSDP): their backward hook is on the tensor that the model returns."""
    model, reference, batch = make_model("llama"), make_model("llama", seed=1), pack_tree(make_pairs())
    fired = []

    def hang(module, inputs, output):
        output.logits.register_hook(lambda gradient: fired.append(float(gradient.abs().max())))

    model.register_forward_hook(hang)
    found = sequence_logprobs(model, batch, reference=head_inputs(reference, batch))
    found.extras["reference_kl"].sum().backward()
    assert fired == [0.0]
