"""What was asked for by name must be on this machine."""

from __future__ import annotations

import ctypes
import importlib.util

from xrl.config import Settings, SettingsError


def check_machine(settings: Settings) -> None:
    """Refuse layers and backends that this machine cannot run.

    Raises:
        SettingsError: transformer-engine is not installed, or there is no CUDA driver for it or for NCCL.
    """
    if settings.model.transformer_impl == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise SettingsError(
                "--transformer-impl transformer_engine needs the package transformer-engine, which is not installed: "
                "pip install 'xrl[cuda]', or use --transformer-impl local"
            )
        if not _has_cuda_driver():
            raise SettingsError(
                "--transformer-impl transformer_engine needs a CUDA device, and this machine has no CUDA driver: "
                "use --transformer-impl local"
            )
    if settings.parallel.distributed_backend == "nccl" and not _has_cuda_driver():
        raise SettingsError(
            "--distributed-backend nccl needs CUDA devices, and this machine has no CUDA driver: use gloo or auto"
        )


def _has_cuda_driver() -> bool:
    # torch.cuda.is_available() would say, but it takes seconds to import.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
