"""Tree attention against a dense mask over the packed row, in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kit.attention import plan_tree_attention, tree_attention
from dpo_kit.tree import build_tree

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)


def dense(query, key, value, tree, window=None, softcap=None, sinks=None, scale=None):
    """One mask of T x T: a token sees itself and its ancestors (within the window)."""
    sees = np.zeros((len(tree), len(tree)), bool)
    for rows in tree.sequence_rows:
        for i in range(len(rows)):
            first = 0 if window is None else max(0, i - window + 1)
            sees[rows[i], rows[first : i + 1]] = True
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.from_numpy(sees).to(scores.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : len(tree)] @ value).transpose(1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 0.7}, {"sinks": True}, {"scale": 0.3}, {"window": 2, "softcap": 1.5}],
)
@given(given=sequences)
@settings(deadline=None, max_examples=40)
def test_equals_a_dense_mask(options, given):
    tree = build_tree(given)
    generator = torch.Generator().manual_seed(0)
    heads = [4, 2, 2]
    qkv = [torch.randn(1, h, len(tree), 8, generator=generator, dtype=torch.float64) for h in heads]
    query, key, value = (x.requires_grad_() for x in qkv)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(4, generator=generator, dtype=torch.float64)
    names = {"window": "sliding_window", "sinks": "s_aux", "scale": "scaling", "softcap": "softcap"}
    found, weights = tree_attention(
        torch.nn.Identity(), query, key, value, None,
        tree=plan_tree_attention(tree), **{names[k]: v for k, v in options.items()},
    )  # fmt: skip
    expected = dense(query, key, value, tree, **options)
    assert weights is None
    tolerance = 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((found * upstream).sum(), (query, key, value)),
        torch.autograd.grad((expected * upstream).sum(), (query, key, value)),
        rtol=10 * tolerance,
        atol=10 * tolerance,
    )


@pytest.mark.parametrize("value_size", [16, 8])  # latent attention has narrower values
@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_bf16_is_as_exact_as_a_dense_mask_in_bf16(options, value_size):
    generator = np.random.default_rng(1)
    trunk = generator.integers(0, 9, 30)
    tree = build_tree([np.concatenate([trunk, generator.integers(0, 9, n)]) for n in (5, 20, 40)])
    draw = torch.Generator().manual_seed(0)
    sizes = [(4, 16), (2, 16), (2, value_size)]
    exact = [torch.randn(1, h, len(tree), d, generator=draw, dtype=torch.float64) for h, d in sizes]
    upstream = torch.randn(1, len(tree), 4, value_size, generator=draw, dtype=torch.float64).bfloat16()
    low = [x.bfloat16().requires_grad_() for x in exact]
    high = [x.detach().double().requires_grad_() for x in low]
    window = {"sliding_window": options["window"]} if options else {}
    found, _ = tree_attention(torch.nn.Identity(), *low, None, tree=plan_tree_attention(tree), **window)

    def with_gradients(out, inputs):
        return out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), inputs)

    truths = with_gradients(dense(*high, tree, **options), high)
    naives = with_gradients(dense(*low, tree, **options), low)
    for mine, naive, truth in zip(with_gradients(found, low), naives, truths, strict=True):
        allowed = 1.1 * (naive.double() - truth).norm() + 1e-3 * truth.norm()
        assert (mine.double() - truth).norm() <= allowed


def test_needs_a_plan_and_no_mask_or_dropout():
    x = torch.randn(1, 1, 2, 4)
    plan = plan_tree_attention(build_tree([[1, 2]]))
    for wrong in ({"attention_mask": None}, {"attention_mask": x, "tree": plan}):
        with pytest.raises(ValueError, match="tree attention needs a plan"):
            tree_attention(torch.nn.Identity(), x, x, x, **wrong)
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        tree_attention(torch.nn.Identity(), x, x, x, None, tree=plan, dropout=0.1)


def test_padding_stays_small():
    """Sequences of very different lengths do not share a bucket."""
    generator = np.random.default_rng(0)
    lengths = [500, 490, 20, 22, 24, 25, 26]
    tree = build_tree([generator.integers(0, 10**6, n) for n in lengths])
    plan = plan_tree_attention(tree)
    computed = sum(b.query_rows.numel() * b.key_rows.shape[1] for b in plan.buckets)
    assert computed < 1.1 * sum(n * n for n in lengths)
    assert len(plan.buckets) < len(lengths)
