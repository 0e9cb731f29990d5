"""The primitives of `backend.Backend` through the compiled CUDA kernels."""

from __future__ import annotations

from types import ModuleType


def why_not(module: ModuleType) -> str:
    """Why the compiled CUDA kernels cannot run, in a sentence; empty where they can."""
    built = getattr(module, "cuda_built", lambda: False)()
    return "" if built else "xrl._C was built without CUDA kernels"
