"""CUDA kernels compile for devices that are not here, without spills; the module loads without a driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from xrl.kernels.head.backend import why_not
from xrl.kernels.native import native_module

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# What each file holds, so that a kernel which is lost is noticed.
NUM_KERNELS = {"logprob.cu": 4, "grpo_rows.cu": 1, "grpo_cluster.cu": 2, "launch.cu": 0}
# With so many, a multiprocessor holds four blocks of 256 threads; two of a cluster, whose shared memory is the limit.
MAX_REGISTERS = {"grpo_cluster.cu": 128}
USUAL_MAX_REGISTERS = 64

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH or in /usr/local/cuda")


def compile_kernels(file: str, architecture: str, kind: str, out: Path) -> str:
    """Compiles to `out` with the warnings of the build, and returns what the compiler says."""
    assert NVCC is not None
    warnings = ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", kind, "-Xptxas=-v", *warnings, f"-I{CSRC}"]
    run = subprocess.run(
        [*command, "-o", str(out), str(CSRC / "cuda" / file)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_all_kernels_are_listed() -> None:
    assert set(NUM_KERNELS) == {path.name for path in (CSRC / "cuda").glob("*.cu")}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("file", NUM_KERNELS)
def test_no_kernel_spills_registers_or_uses_local_memory(file: str, architecture: str, tmp_path: Path) -> None:
    said = compile_kernels(file, architecture, "-cubin", tmp_path / "kernels.cubin")
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(usage) == len(registers) == NUM_KERNELS[file], said
    assert all(numbers == ("0", "0", "0") for numbers in usage), said
    assert all(number <= MAX_REGISTERS.get(file, USUAL_MAX_REGISTERS) for number in registers), said


@pytest.mark.slow
@needs_nvcc
def test_rows_are_read_and_written_16_bytes_at_a_time(tmp_path: Path) -> None:
    compile_kernels("logprob.cu", "compute_80", "-ptx", tmp_path / "kernels.ptx")
    kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    assert len(kernels) == NUM_KERNELS["logprob.cu"]
    for kernel in kernels:
        assert re.search(r"ld\.global\.cs\.v4\.[bu]32", kernel), kernel[:200]
        if "gradient_kernel" in kernel.split("(")[0]:
            assert re.search(r"st\.global\.cs\.v4\.[bu]32", kernel), kernel[:200]


@pytest.mark.slow
@needs_nvcc
def test_a_cluster_reads_its_rows_by_bulk_copies_alone(tmp_path: Path) -> None:
    compile_kernels("grpo_cluster.cu", "compute_90", "-ptx", tmp_path / "kernels.ptx")
    kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    assert len(kernels) == NUM_KERNELS["grpo_cluster.cu"]
    for kernel in kernels:
        assert "cp.async.bulk.shared::cluster.global" in kernel
        assert "barrier.cluster.arrive" in kernel and "barrier.cluster.wait" in kernel
        assert not re.search(r"ld\.global\S*\.v4", kernel)
        assert re.search(r"st\.global\.cs\.v4\.[bu]32", kernel)


def test_module_loads_without_a_driver_and_says_what_it_was_built_for() -> None:
    module = native_module()
    assert module is not None
    architectures = module.cuda_architectures()
    assert bool(architectures) == module.cuda_built()
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?|native|all|all-major", name) for name in architectures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_backend_says_so_in_a_sentence() -> None:
    reason = why_not("native", torch.device("cuda"))
    assert reason in ("torch finds no CUDA device", "xrl._C was built without CUDA kernels")
