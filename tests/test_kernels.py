"""The Triton kernels and `fused` equal the definition; every kernel compiles for sm_80 and sm_90.

On a CUDA machine the tests run there. Without one they run in Triton's interpreter, which must be asked for
before Triton is imported: `test_in_the_interpreter` runs this file again in a process of its own. Compiling
ahead of time needs no GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from dpo_kit.logprob import kernels, naive_token_logprobs, token_logprobs  # noqa: E402
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


def run(function, inputs, softcap=None, scale=1.0, extras=("entropy",), **options):
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
    head = {"bias": None, "softcap": None, "scale": 1.0, "extras": ("entropy",)}
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE, requires_grad=True)
    for target, expected in ((0, 0.0), (1, -2e4), (2, -1e4)):
        logps, extras = fused_token_logprobs(hidden, weight, torch.tensor([target], device=DEVICE), **head)
        assert (logps.item(), extras["entropy"].item()) == (expected, 0.0)
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
    found[3] = found[3][allowed]
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
    logps, entropy, *grads = run(fused_token_logprobs, make(0, 4, 300, bias=True), **options)
    assert logps.shape == entropy.shape == (0,)
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


class Target:
    """What Triton asks a driver before it compiles; there need be no such device."""

    def __init__(self, capability):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda device: 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launchers compile for the target and do not launch; name of the kernel -> what was compiled."""
    found = {}
    launch = JITFunction.run

    def compile_only(self, *args, warmup, **options):
        found[self.__name__] = launch(self, *args, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a thread block: CUDA C++ Programming Guide


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_ahead_of_time(compiled, capability, everything, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(capability))
    hidden, weight = torch.empty(2, 4096, dtype=dtype), torch.empty(507, 4096, dtype=dtype)
    bias, targets = torch.empty(507, dtype=dtype) if everything else None, torch.zeros(2, dtype=torch.long)
    head = {"softcap": 30.0, "scale": 0.5} if everything else {"softcap": None, "scale": 1.0}
    extras = ("entropy",) if everything else ()
    products = kernels.product_buffer(2, 507, hidden)
    logps, lse, *_ = kernels.statistics(products, bias, targets, extras, **head)
    kernels.product_statistics(hidden, weight, bias, targets, extras, **head)
    kernels.to_gradient_(products, bias, targets, logps, lse, first=0, **head)
    assert len(compiled) == 3
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
        # A few registers spilled after the loop over H cost nothing; hundreds would.
        assert stack_bytes(kernel, tmp_path) <= 256, name
    for name in ("_statistics_kernel", "_gradient_kernel"):
        assert "ld.global.v4" in compiled[name].asm["ptx"]  # 16 bytes at a time, for an odd vocabulary too
    if dtype == torch.bfloat16:
        tensor_cores = "wgmma" if capability == 90 else "mma.sync"
        assert tensor_cores in compiled["_product_statistics_kernel"].asm["ptx"]


def stack_bytes(kernel, folder):
    """Local memory of a thread, where spilled registers go."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


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
