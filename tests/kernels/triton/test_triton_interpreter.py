"""Triton's kernels in its interpreter, on small shapes; the checks are in `triton_*_worker.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("worker", ["triton_logprob_worker.py", "triton_rows_worker.py"])
def test_kernels_in_the_interpreter_equal_plain_maths(worker: str) -> None:
    # In a process of its own: triton reads TRITON_INTERPRET when a kernel is defined.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / worker)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout


def test_without_triton_the_package_imports_and_says_why_it_cannot_run() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from xrl.kernels.triton import available\n"
        "possible, reason = available()\n"
        "assert not possible and 'triton is not installed' in reason, (possible, reason)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("interpret", "possible"), [("0", False), ("1", True)])
def test_without_a_device_only_the_interpreter_is_available(interpret: str, possible: bool) -> None:
    script = "from xrl.kernels.triton import available; print(*available())"
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.startswith(str(possible))
    assert ("CUDA device" in run.stdout) is not possible
