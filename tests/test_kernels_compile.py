"""Every Triton kernel compiles for sm_80 and sm_90, ahead of time: no GPU is needed."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from dpo_kit.logprob import EXTRAS, kernels  # noqa: E402


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
    extras = EXTRAS if everything else ()
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
