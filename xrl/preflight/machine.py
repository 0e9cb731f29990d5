"""What was asked for by name must be on this machine."""

from __future__ import annotations

import ctypes
import importlib.util
import os

from xrl.config import Settings, SettingsError
from xrl.config.model import KERNEL_BACKENDS


def check_machine(settings: Settings) -> None:
    """Refuse layers, engines and backends that this machine cannot run.

    Raises:
        SettingsError: transformer-engine or the kernels asked for are not there, or there is no CUDA driver for them,
            for the engine or for NCCL.
    """
    _check_kernel_backend(settings.model.kernel_backend)
    if settings.model.transformer_impl == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise SettingsError(
                "--transformer-impl transformer_engine needs the package transformer-engine, which is not installed: "
                "pip install 'xrl[cuda]', or use --transformer-impl local"
            )
        if not has_cuda_driver():
            raise SettingsError(
                "--transformer-impl transformer_engine needs a CUDA device, and this machine has no CUDA driver: "
                "use --transformer-impl local"
            )
    if settings.parallel.distributed_backend == "nccl" and not has_cuda_driver():
        raise SettingsError(
            "--distributed-backend nccl needs CUDA devices, and this machine has no CUDA driver: use gloo or auto"
        )
    if settings.rollout.engine == "turbomind" and not settings.rollout.worker_addresses and not has_cuda_driver():
        raise SettingsError(
            "--engine turbomind needs a CUDA device for each worker, and this machine has no CUDA driver: use "
            "--engine embedded, or workers on other hosts with --rollout-worker-urls"
        )
    if settings.rollout.weight_transport == "cuda_ipc" and not has_cuda_driver():
        raise SettingsError(
            "--weight-transport cuda_ipc needs a CUDA device, and this machine has no CUDA driver: use shared_memory"
        )


def _check_kernel_backend(name: str) -> None:
    what = f"--kernel-backend {name}"
    if name == "auto":
        name = os.environ.get("XRL_KERNEL_BACKEND", "auto")
        what = f"XRL_KERNEL_BACKEND={name}"
    if name not in KERNEL_BACKENDS:
        raise SettingsError(f"{what} is unknown, known are: {', '.join(KERNEL_BACKENDS)}")
    if name == "native" and importlib.util.find_spec("xrl._C") is None:
        raise SettingsError(f"{what} needs the compiled kernels, which are not built: pip install -e .")
    if name != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise SettingsError(f"{what} needs the package triton, which is not installed: pip install 'xrl[cuda]'")
    # With TRITON_INTERPRET=1 it runs anywhere, slowly.
    if not has_cuda_driver() and os.environ.get("TRITON_INTERPRET") != "1":
        raise SettingsError(f"{what} needs a CUDA device, and this machine has no CUDA driver")


def has_cuda_driver() -> bool:
    """Whether this machine can run CUDA, as far as that shows without torch."""
    # torch.cuda.is_available() would say, but it takes seconds to import.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
