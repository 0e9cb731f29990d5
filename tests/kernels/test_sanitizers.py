"""`make test-sanitized` runs all tests of this folder with kernels that notice wrong accesses: that they do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.skipif(not SANITIZED, reason="the kernels are built without sanitizers")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_reading_beyond_the_end_of_a_tensor_ends_the_process(isa: str) -> None:
    program = """
import torch, xrl._C
x, weight, out = torch.ones(4, 64), torch.ones(32), torch.ones(4, 64)
xrl._C.rms_norm_f32(x.data_ptr(), weight.data_ptr(), 1e-6, 4, 64, out.data_ptr(), 1)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | {"XRL_CPU_ISA": isa}, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
