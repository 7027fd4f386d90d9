"""The Triton kernels and `fused` equal the definition.

On a CUDA machine the tests run there. Without one they run in Triton's interpreter, which must be asked for
before Triton is imported: `test_in_the_interpreter` runs this file again in a process of its own.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from dpo_kit.logprob import EXTRAS, kernels, naive_token_logprobs, token_logprobs  # noqa: E402
from dpo_kit.logprob.fused import fused_token_logprobs  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not kernels.INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    not (CUDA or kernels.INTERPRETED), reason="runs within test_in_the_interpreter"
)
# D is kept; D is made again, by 128 rows and by 128 columns.
KEPT, AGAIN = {}, {"keep_bytes": 0, "chunk_bytes": 0}
kept_and_again = pytest.mark.parametrize("options", [KEPT, AGAIN], ids=["kept", "again"])
heads = pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (2.0, 0.3, True)])
# Kernels load the padding of a buffer, which holds anything, and throw the results away.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _larger_tiles_in_the_interpreter(monkeypatch):
    """Its time goes by the number of programs."""
    if kernels.INTERPRETED:
        monkeypatch.setattr(kernels, "TILE", 4 * kernels.TILE)


@pytest.fixture(autouse=True)
def _uninitialised_is_nan():
    """So that an element which nobody writes is found in a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(n, h, v, dtype=torch.float64, bias=False):
    """hidden, weight, bias, targets, upstream."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype).requires_grad_()

    targets = torch.randint(0, v, (n,), generator=generator).to(DEVICE)
    upstream = torch.randn(n, generator=generator, dtype=torch.float64).to(DEVICE)
    return draw(n, h), draw(v, h), draw(v) if bias else None, targets, upstream


def double(inputs):
    return [x.detach().double().requires_grad_(x.requires_grad) if x is not None else None for x in inputs]


def run(function, inputs, softcap=None, scale=1.0, extras=("squared_probs", "entropy"), **options):
    """Log-probs, extras and the gradients of what asks for one."""
    hidden, weight, bias, targets, upstream = inputs
    scale = scale / hidden.shape[1] ** 0.5
    logps, found = function(
        hidden, weight, targets, bias=bias, softcap=softcap, scale=scale, extras=extras, **options
    )
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    grads = (
        torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), leaves) if logps.requires_grad else ()
    )
    return [logps.detach(), *found.values(), *grads]


@runs_kernels
@pytest.mark.parametrize("size", [(1, 1, 2), (7, 13, 123), (130, 5, 252), (3, 33, 507)])
@heads
@kept_and_again
def test_equals_the_definition_in_fp64(size, softcap, scale, bias, options):
    inputs = make(*size, bias=bias)
    expected = run(naive_token_logprobs, inputs, softcap, scale)
    found = run(fused_token_logprobs, inputs, softcap, scale, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@heads
@kept_and_again
def test_has_no_more_error_than_the_naive_path_of_its_dtype(dtype, softcap, scale, bias, options):
    inputs = make(130, 33, 300, dtype, bias)
    *floats, upstream = double([*inputs[:3], inputs[4]])
    truth = run(naive_token_logprobs, [*floats, inputs[3], upstream], softcap, scale)
    naive = run(naive_token_logprobs, inputs, softcap, scale)
    found = run(fused_token_logprobs, inputs, softcap, scale, **options)
    for mine, theirs, exact in zip(found, naive, truth, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (mine, theirs))
        assert error <= 1.2 * allowed + 0.2 * torch.finfo(dtype).eps + 1e-6


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1, 2), (130, 33, 507), (64, 70, 123)])
@heads
def test_one_kernel_without_logits_equals_the_definition(dtype, size, softcap, scale, bias):
    inputs = make(*size, dtype, bias)
    *floats, upstream = double([*inputs[:3], inputs[4]])
    with torch.no_grad():
        truth = run(naive_token_logprobs, [*floats, inputs[3], upstream], softcap, scale)
        found = run(fused_token_logprobs, inputs, softcap, scale, fused_product=True)
    # Nothing is rounded to the dtype of the input, so the tolerance is that of fp32.
    torch.testing.assert_close([x.double() for x in found], truth, rtol=1e-5, atol=2e-6)


@runs_kernels
def test_a_row_over_several_tiles(monkeypatch):
    inputs = make(5, 4, 507, bias=True)
    expected = run(fused_token_logprobs, inputs, 2.0)
    monkeypatch.setattr(kernels, "TILE", 64)
    torch.testing.assert_close(run(fused_token_logprobs, inputs, 2.0), expected, rtol=1e-12, atol=1e-14)


@runs_kernels
@pytest.mark.parametrize("one_kernel", [False, True])
def test_extras_in_any_subset_and_order(one_kernel, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    with torch.no_grad():
        hidden, weight, bias, targets, _ = make(6, 4, 507, torch.float32, bias=True)
        weight[300:] = weight[:207]  # every logit is there twice, in different tiles
        bias[300:] = bias[:207]
        targets[::2] = (hidden @ weight.T + bias).argmax(-1)[::2]
        targets[2] = (targets[2] + 300) % 600
        head = {"bias": bias, "softcap": 9.0, "scale": 0.5}
        expected, truth = naive_token_logprobs(hidden, weight, targets, extras=EXTRAS, **head)
        assert 3 <= truth["top1"].sum() < 6
        for count in range(len(EXTRAS) + 1):
            for names in itertools.permutations(EXTRAS, count):
                head["extras"] = names
                logps, found = fused_token_logprobs(hidden, weight, targets, fused_product=one_kernel, **head)
                assert list(found) == list(names)
                torch.testing.assert_close(logps, expected)
                torch.testing.assert_close(found, {name: truth[name] for name in names})


@runs_kernels
def test_log_probs_are_equal_to_the_bit_with_and_without_gradient():
    inputs = make(130, 16, 300, torch.bfloat16)
    chunks = {"chunk_bytes": 0}
    found = [run(fused_token_logprobs, inputs, keep_bytes=keep, **chunks)[0] for keep in (0, 10**9)]
    with torch.no_grad():
        found += run(fused_token_logprobs, inputs, **chunks)[:1]
    inputs[1].requires_grad_(False)
    found += run(fused_token_logprobs, inputs, **chunks)[:1]
    assert all(torch.equal(x, found[0]) for x in found)


@runs_kernels
@kept_and_again
def test_each_input_gets_a_gradient_only_when_it_asks(options):
    inputs = make(9, 5, 300, bias=True)
    expected = run(naive_token_logprobs, inputs, 2.0, extras=())[1:]
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs[:3])]
        found = run(fused_token_logprobs, [*leaves, *inputs[3:]], 2.0, extras=(), **options)[1:]
        torch.testing.assert_close(found, [expected[wanted]], rtol=1e-10, atol=1e-12)


@runs_kernels
@kept_and_again
def test_the_gradient_of_a_sure_token_survives_low_precision(options):
    """1 - p of a probability near 1 is lost where p itself is rounded to bf16."""
    weight = torch.zeros(50, 2, dtype=torch.bfloat16, device=DEVICE)
    weight[7] = 6.0  # p = 1 / (1 + 49 exp(-12)) = 0.9997
    targets = torch.full((4,), 7, device=DEVICE)
    inputs = [torch.ones(4, 2, dtype=torch.bfloat16, device=DEVICE), weight]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.ones(4, device=DEVICE)
    found = run(fused_token_logprobs, [*inputs, None, targets, upstream], scale=2**0.5, **options)
    exact = double([*inputs, upstream])
    truth = run(naive_token_logprobs, [*exact[:2], None, targets, exact[2]], scale=2**0.5)
    for mine, expected in zip(found, truth, strict=True):
        assert (mine.double() - expected).norm() <= 0.02 * expected.norm()


@runs_kernels
def test_the_targets_gradient_does_not_depend_on_a_second_rounding_of_its_logit():
    """Recomputed logits may be rounded otherwise; at p near 1 the difference exceeds 1 - p."""
    products = kernels.product_buffer(1, 3, torch.empty(0, dtype=torch.bfloat16, device=DEVICE))
    products.copy_(torch.tensor([[20.0, 12.0, 11.0]]))
    target = torch.tensor([0], device=DEVICE)
    logp, lse = kernels.statistics(products, None, target, (), softcap=None, scale=1.0)
    products[0, 0] = 20.125
    kernels.to_gradient_(products, None, target, logp, lse, first=0, softcap=None, scale=1.0)
    expected = torch.tensor([20.0, 12.0, 11.0], dtype=torch.float64).softmax(0).neg().cpu()
    expected[0] += 1
    torch.testing.assert_close(products[0].double().cpu(), expected, rtol=0.01, atol=0)


@runs_kernels
def test_gradcheck():
    hidden, weight, bias, targets, _ = make(3, 2, 5, bias=True)

    def logps(h, w, b):
        return fused_token_logprobs(h, w, targets, bias=b, softcap=2.5, scale=1.5, extras=())[0]

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@runs_kernels
@kept_and_again
def test_a_graph_can_be_gone_through_twice(options):
    hidden, weight, _, targets, _ = make(9, 5, 300)
    head = {"bias": None, "softcap": None, "scale": 1.0, "extras": ()}
    loss = fused_token_logprobs(hidden, weight, targets, **head, **options)[0].sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


@runs_kernels
def test_autocast_computes_in_its_dtype_and_reduces_in_fp32():
    inputs = make(16, 24, 300, torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs[:2]]
    expected = run(fused_token_logprobs, [*low, *inputs[2:]])
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(fused_token_logprobs, inputs)
    assert all(x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(found, [x.float() for x in expected], rtol=2**-8, atol=1e-6)


@runs_kernels
def test_extreme_logits():
    head = {"bias": None, "softcap": None, "scale": 1.0, "extras": EXTRAS}
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE, requires_grad=True)
    for target, expected in ((0, 0.0), (1, -2e4), (2, -1e4)):
        logps, extras = fused_token_logprobs(hidden, weight, torch.tensor([target], device=DEVICE), **head)
        assert logps.item() == expected
        assert {name: x.item() for name, x in extras.items()} == {
            "entropy": 0.0,
            "squared_probs": 1.0,
            "top1": float(target == 0),
        }
        (gradient,) = torch.autograd.grad(logps.sum(), weight)
        assert torch.isfinite(gradient).all()


@runs_kernels
def test_a_bias_of_minus_infinity_masks_tokens(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    hidden, weight, bias, _, upstream = make(4, 3, 200, bias=True)
    allowed = torch.tensor([3, 77, 150], device=DEVICE)
    mask = torch.full_like(bias, -torch.inf)
    mask[allowed] = 0
    inputs = hidden, weight, (bias + mask).detach(), allowed[[0, 1, 2, 0]], upstream
    found = run(fused_token_logprobs, inputs)
    places = torch.tensor([0, 1, 2, 0], device=DEVICE)
    few = hidden, weight[allowed].detach().requires_grad_(), bias[allowed].detach(), places, upstream
    expected = run(naive_token_logprobs, few)
    found[4] = found[4][allowed]
    torch.testing.assert_close(found, expected)


@runs_kernels
def test_what_is_not_a_number_stays_so():
    hidden, weight, _, targets, _ = make(3, 2, 70)
    head = {"bias": None, "softcap": None, "scale": 1.0, "extras": ("entropy",)}
    with torch.no_grad():
        hidden[1, 0] = torch.nan
        logps, extras = fused_token_logprobs(hidden, weight, targets, **head)
        outside = torch.tensor([-100, 70, 1 << 40], device=DEVICE)
        lost, _ = fused_token_logprobs(hidden[:1].expand(3, 2), weight, outside, **head)
    assert logps.isnan().tolist() == extras["entropy"].isnan().tolist() == [False, True, False]
    assert lost.isnan().all()


@runs_kernels
@kept_and_again
def test_no_rows(options):
    inputs = make(0, 4, 300, bias=True)
    logps, *rest = run(fused_token_logprobs, inputs, extras=EXTRAS, **options)
    extras, grads = rest[: len(EXTRAS)], rest[len(EXTRAS) :]
    assert all(x.shape == (0,) for x in (logps, *extras))
    assert all(not grad.any() for grad in grads)


@runs_kernels
def test_one_kernel_gives_no_gradient_and_says_so():
    with pytest.raises(ValueError, match="gives no gradient"):
        run(fused_token_logprobs, make(2, 3, 4, torch.float32), fused_product=True)


@runs_kernels
def test_the_dispatch_knows_it_and_any_strides_will_do():
    hidden, weight, bias, targets, _ = make(6, 4, 10, bias=True)
    strided = hidden[::2], weight.T.contiguous().T[::2], targets[::2] // 2
    expected = token_logprobs(*strided, bias=bias[::2], impl="naive")
    torch.testing.assert_close(token_logprobs(*strided, bias=bias[::2], impl="fused"), expected)


@pytest.mark.skipif(CUDA or kernels.INTERPRETED, reason="the kernels run here")
def test_without_a_gpu_or_triton_the_message_says_so(monkeypatch):
    hidden, weight, _, targets, _ = make(3, 4, 5)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        token_logprobs(hidden, weight, targets, impl="fused")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="needs triton, which is not installed"):
        token_logprobs(hidden, weight, targets, impl="fused")


@pytest.mark.skipif(kernels.INTERPRETED, reason="once is enough")
def test_triton_is_imported_only_where_it_is_used():
    code = "import sys, dpo_kit.logprob; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(CUDA or kernels.INTERPRETED, reason="the kernels run here")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("frozen", [False, True])
def test_extra_memory_of_a_large_vocabulary(frozen):
    """Target: under 1 GB at a vocabulary of 150k beyond inputs, results and gradients."""
    hidden = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(150_000, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=not frozen)
    targets = torch.randint(0, 150_000, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, weight, targets, impl="fused").sum().backward()
    grads = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    assert torch.cuda.max_memory_allocated() - before - grads < 1e9


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("options", [{"keep_bytes": 1 << 40, "chunk_bytes": 1 << 40}, {}])
def test_more_than_2_to_the_31_products(options):
    hidden = torch.randn(20_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(130_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 130_000, (20_000,), device="cuda")
    head = {"bias": None, "softcap": None, "scale": 0.125, "extras": ()}
    logps, _ = fused_token_logprobs(hidden, weight, targets, **head, **options)
    (found,) = torch.autograd.grad(logps.sum(), hidden)
    last = hidden[-64:].detach().double().requires_grad_()
    truth, _ = naive_token_logprobs(last, weight.detach().double(), targets[-64:], **head)
    (expected,) = torch.autograd.grad(truth.sum(), last)
    torch.testing.assert_close(logps[-64:].double(), truth, rtol=0.02, atol=0.05)
    assert (found[-64:].double() - expected).norm() <= 0.02 * expected.norm()
