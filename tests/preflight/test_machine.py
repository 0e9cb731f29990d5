"""Packages and hardware asked for by name must be there."""

from __future__ import annotations

import importlib.util

import pytest

from tests.small_runs import Refusal
from xrl.preflight.machine import has_cuda_driver


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="transformer-engine is installed"
)
def test_transformer_engine_must_be_installed(refusal: Refusal) -> None:
    assert "needs the package transformer-engine" in refusal("--transformer-impl", "transformer_engine")


@pytest.mark.skipif(has_cuda_driver(), reason="this machine has a CUDA driver")
def test_nccl_needs_cuda(refusal: Refusal) -> None:
    assert "--distributed-backend nccl needs CUDA" in refusal("--distributed-backend", "nccl")


@pytest.mark.skipif(has_cuda_driver(), reason="this machine has a CUDA driver")
def test_cuda_ipc_needs_cuda(refusal: Refusal) -> None:
    assert "--weight-transport cuda_ipc needs a CUDA device" in refusal("--weight-transport", "cuda_ipc")


@pytest.mark.skipif(has_cuda_driver(), reason="this machine has a CUDA driver")
@pytest.mark.parametrize("name", ["turbomind", "lmdeploy"])
def test_turbomind_needs_cuda_where_its_workers_run(refusal: Refusal, name: str) -> None:
    assert "--engine turbomind needs a CUDA device" in refusal("--engine", name)
    elsewhere = ["--rollout-worker-urls", "10.0.0.2:7000", "--kernel-backend", "triton"]  # refused for another reason
    assert "--kernel-backend triton needs" in refusal("--engine", name, *elsewhere)


def test_unknown_kernels_are_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRL_KERNEL_BACKEND", "fast")
    assert "XRL_KERNEL_BACKEND=fast is unknown, known are: auto, reference, native, triton" in refusal()


@pytest.mark.skipif(has_cuda_driver(), reason="this machine has a CUDA driver")
def test_triton_needs_its_package_and_cuda(refusal: Refusal) -> None:
    assert "--kernel-backend triton needs" in refusal("--kernel-backend", "triton")
