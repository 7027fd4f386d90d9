"""token_logprobs: `chunked` equals the definition, values and gradients, whatever the chunking."""

import itertools
import math

import pytest
import torch

from dpo_kit.logprob import EXTRAS, chunked_token_logprobs, naive_token_logprobs, token_logprobs

SIZES = [(1, 1, 2), (7, 13, 123), (37, 24, 507), (64, 33, 252)]  # N, H, V


def make(n, h, v, dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, dtype=torch.float64) / h**0.5).to(dtype).requires_grad_()
    bias_v = (
        torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    )
    targets = torch.randint(0, v, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    return hidden, weight, bias_v, targets, upstream


def grads(function, hidden, weight, bias, targets, upstream, **options):
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    logps, _ = function(hidden, weight, targets, bias=bias, extras=(), **options)
    return logps, torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), leaves)


def test_hand_worked():
    # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    hidden = torch.tensor([[1.0]], dtype=torch.float64).expand(3, 1)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    for impl in ("naive", "chunked", "auto"):
        logps, extras = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), extras=EXTRAS, impl=impl)
        torch.testing.assert_close(logps.exp(), torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64))
        entropy = -(0.125 * math.log(0.125) + 0.25 * math.log(0.25) + 0.625 * math.log(0.625))
        torch.testing.assert_close(extras["entropy"], torch.full((3,), entropy, dtype=torch.float64))
        squares = (1 + 4 + 25) / 64
        torch.testing.assert_close(extras["squared_probs"], torch.full((3,), squares, dtype=torch.float64))
        assert extras["top1"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.25), (2.0, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("keep", ["all", "some", "none"])
def test_equals_the_definition_in_fp64(size, bias, softcap, scale, keep):
    inputs = make(*size, bias=bias)
    row = size[2] * 8
    budget = {"all": 10**9, "some": row * 9, "none": 0}[keep]
    expected = grads(naive_token_logprobs, *inputs, softcap=softcap, scale=scale)
    found = grads(
        chunked_token_logprobs, *inputs, softcap=softcap, scale=scale, keep_bytes=budget, chunk_bytes=row * 5
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.5)])
def test_extras_in_any_subset_and_order(impl, softcap, scale):
    hidden, weight, bias, targets, _ = make(37, 24, 507, bias=True)
    logits = scale * (hidden @ weight.T + bias).detach()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    targets[::2] = logits.argmax(-1)[::2]
    distribution = torch.distributions.Categorical(logits=logits)
    expected = {
        "entropy": distribution.entropy(),
        "squared_probs": distribution.probs.square().sum(-1),
        "top1": (targets == logits.argmax(-1)).double(),
    }
    head = {"bias": bias, "softcap": softcap, "scale": scale, "impl": impl}
    plain = token_logprobs(hidden, weight, targets, **head)
    for count in range(1, len(EXTRAS) + 1):
        for names in itertools.permutations(EXTRAS, count):
            logps, found = token_logprobs(hidden, weight, targets, extras=names, **head)
            assert torch.equal(logps, plain)
            assert list(found) == list(names)
            torch.testing.assert_close(found, {name: expected[name] for name in names})
            assert not any(x.requires_grad for x in found.values())


def test_a_target_as_likely_as_the_likeliest_is_on_top():
    hidden, weight = torch.ones(4, 1), torch.tensor([[2.0], [1.0], [2.0], [0.0]])
    for impl in ("naive", "chunked"):
        _, extras = token_logprobs(hidden, weight, torch.arange(4), extras=("top1",), impl=impl)
        assert extras["top1"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_low_precision_has_no_more_error_than_the_naive_low_precision_path(dtype, keep_bytes):
    low = make(64, 33, 507, dtype=dtype)
    truth = grads(
        naive_token_logprobs,
        *[x if x is None or not x.is_floating_point() else x.detach().double().requires_grad_() for x in low],
        softcap=None,
        scale=1.0,
    )
    naive = grads(naive_token_logprobs, *low, softcap=None, scale=1.0)
    found = grads(
        chunked_token_logprobs, *low, softcap=None, scale=1.0, keep_bytes=keep_bytes, chunk_bytes=507 * 20
    )

    def error(result):
        values = [result[0], *result[1]]
        return [
            ((x.detach().double() - t).norm() / t.norm()).item()
            for x, t in zip(values, [truth[0], *truth[1]], strict=True)
        ]

    for mine, theirs in zip(error(found), error(naive), strict=True):
        assert mine <= 1.2 * theirs + 1e-3


@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_the_gradient_of_a_sure_token_survives_low_precision(keep_bytes):
    """1 - p of a probability near 1 is lost where p itself is rounded to bf16."""
    hidden = torch.ones(4, 2, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(50, 2, dtype=torch.bfloat16)
    weight[7] = 6.0  # p = 1 / (1 + 49 exp(-12)) = 0.9997
    targets = torch.full((4,), 7)
    options = {"bias": None, "softcap": None, "scale": 1.0, "extras": ()}
    found, _ = chunked_token_logprobs(hidden, weight, targets, **options, keep_bytes=keep_bytes)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact, _ = naive_token_logprobs(exact_hidden, weight.double(), targets, **options)
    (truth,) = torch.autograd.grad(exact.sum(), exact_hidden)
    assert (gradient.double() - truth).norm() <= 0.02 * truth.norm()


def test_autocast_computes_in_the_autocast_dtype_and_reduces_in_fp32():
    hidden, weight, _, targets, _ = make(16, 24, 123, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, targets)
        naive = token_logprobs(hidden, weight, targets, impl="naive")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_each_input_gets_a_gradient_only_when_it_asks():
    hidden, weight, bias, targets, _ = make(8, 5, 11, bias=True)
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((hidden, weight, bias))]
        token_logprobs(leaves[0], leaves[1], targets, bias=leaves[2]).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]


def test_gradcheck():
    hidden, weight, bias, targets, _ = make(5, 4, 7, bias=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, softcap=2.5, scale=1.5),
        (hidden, weight, bias),
        nondet_tol=1e-12,  # the second pass computes again what the first one had kept
    )


def test_huge_logits_stay_finite():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    for target, expected in ((0, 0.0), (1, -2e4), (2, -1e4)):
        logp = token_logprobs(hidden, weight, torch.tensor([target]))
        assert logp.item() == expected
        (gradient,) = torch.autograd.grad(logp.sum(), weight)
        assert torch.isfinite(gradient).all()


def test_soft_cap_with_an_underflowed_probability_has_a_finite_gradient():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [-500.0]], requires_grad=True)
    token_logprobs(hidden, weight, torch.tensor([1]), softcap=100.0).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_no_rows():
    hidden, weight = torch.empty(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logps = token_logprobs(hidden, weight, torch.empty(0, dtype=torch.long))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert not weight.grad.any()
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 99, 0])}, r"0 \.\. 10, got 0 \.\. 99"),
        ({"targets": torch.tensor([0, -100, 0])}, r"got -100 \.\. 0"),
        ({"targets": torch.tensor([0])}, r"expected targets \[3\], got \(1,\)"),
        ({"hidden": torch.randn(3, 5)}, r"hidden \(3, 5\) and weight \(11, 4\)"),
        ({"bias": torch.randn(4)}, r"expected bias \[11\]"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"extras": ("entropie",)}, "unknown extras"),
        ({"impl": "triton3"}, "unknown impl"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(11, 4),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(arguments | change))
