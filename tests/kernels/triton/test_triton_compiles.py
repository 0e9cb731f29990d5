"""Triton's kernels compile for devices that are not here, without spills, and for no length or temperature anew."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
WORKER = Path(__file__).with_name("triton_compile_worker.py")


def run_worker(*arguments: str) -> str:
    # In a process of its own: triton must not have been imported with TRITON_INTERPRET=1.
    run = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(WORKER.parents[3])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module", params=["80", "90", "100"])
def compiled(request: pytest.FixtureRequest) -> list[str]:
    """A line a variant for one kind of device, see the worker."""
    return [line for line in run_worker("compile", request.param).splitlines() if " REG:" in line]


def test_no_kernel_spills_registers(compiled: list[str]) -> None:
    assert len(compiled) == 18
    for variant in compiled:
        assert " STACK:0 " in variant and " LOCAL:0 " in variant and "spills 0" in variant, variant
        # At most half of what a thread can have: two programs share a multiprocessor at the least.
        assert int(re.search(r"REG:(\d+)", variant)[1]) <= 128, variant


def test_rows_are_read_and_written_16_bytes_at_a_time(compiled: list[str]) -> None:
    for line in compiled:
        if line.startswith("statistics"):
            assert "ld.global.v4.b32" in line, line
        if line.startswith("gradient"):
            assert "ld.global.v4.b32" in line and "st.global.v4.b32" in line, line


def test_lengths_strides_alignments_and_temperatures_compile_once() -> None:
    assert run_worker("variants").split() == ["statistics", "1", "gradient", "2", "grpo_rows", "1"]
