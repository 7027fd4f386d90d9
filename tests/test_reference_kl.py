"""token_logprobs_and_kl equals the definition, values and gradients, whatever is cut, kept or missing."""

import math

import pytest
import torch

from dpo_kit.logprob import (
    EXTRAS,
    HeadInputs,
    naive_token_kl,
    naive_token_logprobs,
    token_logprobs,
    token_logprobs_and_kl,
)

PLAIN = {"softcap": None, "scale": 1.0, "bias": False}
HEADS = [
    (PLAIN, PLAIN),
    ({"softcap": 2.0, "scale": 0.5, "bias": True}, PLAIN),
    (PLAIN, {"softcap": 3.0, "scale": 2.0, "bias": True}),
    ({"softcap": None, "scale": 0.3, "bias": True}, {"softcap": None, "scale": 0.3, "bias": True}),
]


def make_head(n, h, v, *, softcap=None, scale=1.0, bias=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [draw(n, h), draw(v, h) / h**0.5, draw(v) if bias else None]
    return HeadInputs(*(None if x is None else x.to(dtype).requires_grad_() for x in tensors), softcap, scale)


def make_targets(n, v, seed=0):
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))


def leaves(head):
    return [x for x in (head.hidden, head.weight, head.bias) if x is not None]


def naive(policy, reference, targets):
    """Log-probs of both and the KL, by the definitions."""
    logps, reference_logps = (
        naive_token_logprobs(
            x.hidden, x.weight, targets, bias=x.bias, softcap=x.softcap, scale=x.scale, extras=()
        )[0]
        for x in (policy, reference)
    )
    return logps, reference_logps.detach(), naive_token_kl(policy, reference)


def with_gradients(function, policy, reference, targets, **options):
    """[log-probs, reference log-probs, KL, gradients of a random sum of log-probs and KL]."""
    logps, reference_logps, kl, *_ = function(policy, reference, targets, **options)
    weights = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(targets.device)
    loss = (weights[0] * logps + weights[1] * kl).sum()
    return [logps, reference_logps, kl, *torch.autograd.grad(loss, leaves(policy))]


def to(head, dtype_or_device):
    tensors = (head.hidden, head.weight, head.bias)
    return HeadInputs(
        *(None if x is None else x.detach().to(dtype_or_device).requires_grad_() for x in tensors),
        head.softcap,
        head.scale,
    )


def test_hand_worked():
    # Reference 1/2, 1/4, 1/4; policy 1/8, 2/8, 5/8.
    one = torch.ones(3, 1, dtype=torch.float64)
    rows = [torch.tensor(x, dtype=torch.float64).log()[:, None] for x in ([2, 1, 1], [1, 2, 5])]
    reference, policy = HeadInputs(one, rows[0]), HeadInputs(one, rows[1].requires_grad_())
    logps, reference_logps, kl, extras = token_logprobs_and_kl(
        policy, reference, torch.arange(3), extras=EXTRAS
    )
    torch.testing.assert_close(logps.exp(), torch.tensor([1, 2, 5], dtype=torch.float64) / 8)
    torch.testing.assert_close(reference_logps.exp(), torch.tensor([2, 1, 1], dtype=torch.float64) / 4)
    expected = 0.5 * math.log(4) + 0.25 * math.log(1) + 0.25 * math.log(0.4)
    torch.testing.assert_close(kl, torch.full((3,), expected, dtype=torch.float64))
    assert extras["top1"].tolist() == [0, 0, 1]
    # p - q at the logits of the first row.
    (gradient,) = torch.autograd.grad(kl[0], policy.weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([-3, 0, 3], dtype=torch.float64) / 8)


@pytest.mark.parametrize("v", [123, 252, 507])
@pytest.mark.parametrize("hidden_sizes", [(13, 13), (24, 7)])
@pytest.mark.parametrize(("policy", "reference"), HEADS)
@pytest.mark.parametrize("keep", ["all", "some", "none"])
def test_equals_the_definition_in_fp64(v, hidden_sizes, policy, reference, keep):
    n, row = 37, v * 16
    inputs = make_head(n, hidden_sizes[0], v, **policy), make_head(n, hidden_sizes[1], v, **reference, seed=1)
    expected = with_gradients(naive, *inputs, make_targets(n, v))
    options = {"keep_bytes": {"all": 10**9, "some": row * 9, "none": 0}[keep], "chunk_bytes": row * 5}
    found = with_gradients(token_logprobs_and_kl, *inputs, make_targets(n, v), **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_blocks_within_a_chunk(monkeypatch):
    inputs = make_head(37, 13, 123, softcap=2.0), make_head(37, 7, 123, seed=1), make_targets(37, 123)
    expected = with_gradients(naive, *inputs)
    monkeypatch.setattr("dpo_kit.logprob.head.BLOCK_BYTES", 123 * 4 * 3)
    for keep_bytes in (10**9, 0):
        found = with_gradients(token_logprobs_and_kl, *inputs, keep_bytes=keep_bytes)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("policy", "reference"), HEADS)
@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_has_no_more_error_than_the_naive_path_of_its_dtype(dtype, policy, reference, keep_bytes):
    n, v = 64, 507
    inputs = (
        make_head(n, 33, v, **policy, dtype=dtype),
        make_head(n, 21, v, **reference, dtype=dtype, seed=1),
    )
    targets = make_targets(n, v)
    truth = with_gradients(naive, *(to(x, torch.float64) for x in inputs), targets)
    plain = with_gradients(naive, *inputs, targets)
    found = with_gradients(
        token_logprobs_and_kl, *inputs, targets, keep_bytes=keep_bytes, chunk_bytes=v * 4 * 20
    )
    for mine, theirs, exact in zip(found, plain, truth, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (mine, theirs))
        assert error <= 1.2 * allowed + torch.finfo(dtype).eps


def test_log_probs_and_extras_are_those_of_token_logprobs():
    policy, targets = make_head(37, 13, 123, softcap=2.0, bias=True), make_targets(37, 123)
    reference = make_head(37, 7, 123, seed=1)
    names = ("top1", "entropy")
    found, found_reference, _, found_extras = token_logprobs_and_kl(policy, reference, targets, extras=names)
    logps, extras = token_logprobs(
        policy.hidden, policy.weight, targets, bias=policy.bias, softcap=2.0, extras=names, impl="chunked"
    )
    assert torch.equal(found, logps)
    assert torch.equal(
        found_reference, token_logprobs(reference.hidden, reference.weight, targets, impl="chunked")
    )
    assert list(found_extras) == list(names)
    torch.testing.assert_close(found_extras, extras, rtol=0, atol=0)


def test_gradcheck():
    policy, reference = make_head(5, 4, 7, bias=True), make_head(5, 3, 7, seed=1)

    def both(hidden, weight, bias):
        inputs = HeadInputs(hidden, weight, bias, 2.5, 1.5)
        logps, _, kl, _ = token_logprobs_and_kl(inputs, reference, make_targets(5, 7))
        return logps, kl

    assert torch.autograd.gradcheck(both, tuple(leaves(policy)), nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_a_policy_that_is_the_reference_has_no_divergence_and_no_gradient(dtype, keep_bytes):
    head = make_head(40, 33, 507, softcap=5.0, scale=0.7, bias=True, dtype=dtype)
    reference = to(head, dtype)
    _, _, kl, _ = token_logprobs_and_kl(
        head, reference, make_targets(40, 507), keep_bytes=keep_bytes, chunk_bytes=507 * 8 * 9
    )
    assert not kl.any()
    assert not any(x.any() for x in torch.autograd.grad(kl.sum(), leaves(head)))


def test_a_small_divergence_is_not_lost_in_fp32():
    """The second-order quantity 1/2 sum p d^2, from logits a hundred thousand times its size."""
    policy = make_head(16, 33, 507, scale=3.0, dtype=torch.float32)
    reference = to(policy, torch.float32)
    with torch.no_grad():
        reference.weight.add_(1e-2 * torch.randn(507, 33, generator=torch.Generator().manual_seed(2)))
    _, _, kl, _ = token_logprobs_and_kl(policy, reference, make_targets(16, 507))
    truth = naive_token_kl(to(policy, torch.float64), to(reference, torch.float64))
    assert truth.max() < 0.05
    torch.testing.assert_close(kl.double(), truth, rtol=1e-3, atol=1e-6)
    assert kl.min() >= 0


def test_extreme_logits_stay_finite():
    one = torch.ones(3, 1)
    policy = HeadInputs(one, torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True))
    reference = HeadInputs(one, torch.tensor([[9e3], [-1e4], [8e3]]))
    _, _, kl, _ = token_logprobs_and_kl(policy, reference, torch.arange(3))
    assert kl.tolist() == [0.0] * 3  # both are sure of the first token
    _, _, kl, _ = token_logprobs_and_kl(policy, HeadInputs(one, -reference.weight), torch.arange(3))
    assert kl.tolist() == [2e4] * 3  # the reference is sure of the second
    (gradient,) = torch.autograd.grad(kl.sum(), policy.weight)
    assert gradient.squeeze(1).tolist() == [3.0, -3.0, 0.0]


@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_tokens_that_both_rule_out_do_not_count(keep_bytes):
    policy, reference = make_head(4, 3, 200, bias=True), make_head(4, 5, 200, bias=True, seed=1)
    allowed, targets = torch.tensor([3, 77, 150]), torch.tensor([0, 1, 2, 0])
    mask = torch.full((200,), -torch.inf, dtype=torch.float64)
    mask[allowed] = 0

    def masked(head):
        return HeadInputs(head.hidden, head.weight, (head.bias + mask).detach().requires_grad_())

    def few(head):
        chosen = (head.weight[allowed], head.bias[allowed])
        return HeadInputs(head.hidden, *(x.detach().requires_grad_() for x in chosen))

    expected = with_gradients(naive, few(policy), few(reference), targets)
    found = with_gradients(
        token_logprobs_and_kl, masked(policy), masked(reference), allowed[targets], keep_bytes=keep_bytes
    )
    assert all(x.isfinite().all() for x in found)
    found[4:] = [x[allowed] for x in found[4:]]
    torch.testing.assert_close(found, expected)


def test_what_the_policy_rules_out_and_the_reference_does_not_is_infinitely_far():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    policy = HeadInputs(torch.ones(1, 2), torch.zeros(3, 2, requires_grad=True), bias)
    reference = HeadInputs(torch.ones(1, 2), torch.zeros(3, 2))
    kl = token_logprobs_and_kl(policy, reference, torch.tensor([0]))[2]
    assert kl.item() == math.inf
    assert torch.autograd.grad(kl.sum(), policy.weight)[0].isfinite().all()


def test_each_input_of_the_policy_gets_a_gradient_only_when_it_asks_and_the_reference_never():
    policy, reference = make_head(8, 5, 11, bias=True), make_head(8, 4, 11, bias=True, seed=1)
    for wanted in range(3):
        tensors = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(leaves(policy))]
        logps, reference_logps, kl, _ = token_logprobs_and_kl(
            HeadInputs(*tensors), reference, make_targets(8, 11)
        )
        assert not reference_logps.requires_grad
        (logps.sum() + kl.sum()).backward()
        assert [x.grad is not None for x in tensors] == [i == wanted for i in range(3)]
    assert all(x.grad is None for x in leaves(reference))


def test_a_head_shared_by_policy_and_reference():
    policy = make_head(9, 5, 123)
    reference = HeadInputs(make_head(9, 5, 123, seed=1).hidden, policy.weight)
    targets = make_targets(9, 123)
    found = with_gradients(token_logprobs_and_kl, policy, reference, targets)
    torch.testing.assert_close(found, with_gradients(naive, policy, reference, targets))


def test_without_grad_mode_there_is_no_gradient():
    policy, reference = make_head(8, 5, 11), make_head(8, 4, 11, seed=1)
    expected = token_logprobs_and_kl(policy, reference, make_targets(8, 11))
    with torch.no_grad():
        found = token_logprobs_and_kl(policy, reference, make_targets(8, 11))
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert not x.requires_grad
        assert torch.equal(x, y)


@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_a_graph_can_be_gone_through_twice(keep_bytes):
    policy, reference = make_head(9, 5, 123), make_head(9, 4, 123, seed=1)
    logps, _, kl, _ = token_logprobs_and_kl(policy, reference, make_targets(9, 123), keep_bytes=keep_bytes)
    first = torch.autograd.grad((logps + kl).sum(), leaves(policy), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad((logps + kl).sum(), leaves(policy)), first)


def test_what_is_kept_stays_within_the_budget():
    policy, reference, row = make_head(40, 5, 123), make_head(40, 4, 123, seed=1), 123 * 16
    for keep_bytes, chunks in ((0, 0), (row * 10 - 1, 0), (row * 25, 2), (row * 40, 4)):
        *_, kl, _ = token_logprobs_and_kl(
            policy, reference, make_targets(40, 123), keep_bytes=keep_bytes, chunk_bytes=row * 10
        )
        assert [pair is not None for pair in kl.grad_fn.kept] == [True] * chunks + [False] * (4 - chunks)


@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_a_reference_of_lower_precision_is_computed_in_its_own(keep_bytes):
    policy = make_head(37, 13, 507, dtype=torch.float32)
    reference = make_head(37, 7, 507, dtype=torch.bfloat16, seed=1)
    targets = make_targets(37, 507)
    found = with_gradients(token_logprobs_and_kl, policy, reference, targets, keep_bytes=keep_bytes)
    expected = with_gradients(naive, policy, reference, targets)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3:], expected[3:], rtol=0, atol=2e-2)


def test_autocast_computes_in_the_autocast_dtype_and_reduces_in_fp32():
    inputs = make_head(16, 24, 123, dtype=torch.float32), make_head(16, 9, 123, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(token_logprobs_and_kl, *inputs, make_targets(16, 123))
    low = [to(x, torch.bfloat16) for x in inputs]
    expected = with_gradients(token_logprobs_and_kl, *low, make_targets(16, 123))
    assert all(x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=0)
    torch.testing.assert_close(found[3:], [x.float() for x in expected[3:]], rtol=2**-7, atol=1e-6)


def test_no_rows():
    policy, reference = make_head(0, 4, 9, bias=True), make_head(0, 3, 9, seed=1)
    logps, reference_logps, kl, extras = token_logprobs_and_kl(
        policy, reference, make_targets(0, 9), extras=EXTRAS
    )
    assert all(x.shape == (0,) for x in (logps, reference_logps, kl, *extras.values()))
    assert not any(x.any() for x in torch.autograd.grad((logps + kl).sum(), leaves(policy)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": make_head(3, 4, 12)}, "one vocabulary, got 11 and 12 tokens"),
        ({"reference": make_head(2, 4, 11)}, r"expected targets \[2\], got \(3,\)"),
        ({"targets": torch.tensor([0, 11, 0])}, r"0 \.\. 10, got 0 \.\. 11"),
        ({"extras": ("kl",)}, "unknown extras"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "policy": make_head(3, 5, 11),
        "reference": make_head(3, 4, 11),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs_and_kl(**(arguments | change))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep_bytes", [10**9, 0])
def test_on_a_gpu(keep_bytes):
    inputs = make_head(37, 13, 507, **HEADS[1][0]), make_head(37, 7, 507, seed=1)
    inputs = *(to(x, "cuda") for x in inputs), make_targets(37, 507).cuda()
    expected = with_gradients(naive, *inputs)
    found = with_gradients(token_logprobs_and_kl, *inputs, keep_bytes=keep_bytes, chunk_bytes=507 * 16 * 5)
    torch.testing.assert_close(found, expected)
