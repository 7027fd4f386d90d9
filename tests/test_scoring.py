"""Tree and padded log-probs equal those of separate sequences with full logits, on every family."""

import numpy as np
import pytest
import torch
from families import OTHER_FAMILIES, TREE_FAMILIES, make_model, make_pairs

from dpo_kit.attention import TREE_ATTENTION
from dpo_kit.examples import PairTokens
from dpo_kit.packing import pack_padded, pack_tree
from dpo_kit.scoring import choose_layout, full_logit_logprobs, sequence_logprobs


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
