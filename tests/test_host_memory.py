"""Freed memory stays within and goes back after."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from dpo_kit.host_memory import keep_freed_memory

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

size = 200 * 2**20
with keep_freed_memory():
    before = resident()
    torch.ones(size, dtype=torch.uint8)
    print(resident() - before > size // 2)
print(resident() - before < size // 4)
torch.ones(size, dtype=torch.uint8)
print(resident() - before < size // 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_stays_within_and_goes_back_after():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
