"""The compiled module `xrl._C`, where it was built, and which backend runs what.

`XRL_KERNEL_BACKEND=reference` turns the compiled kernels off.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch  # first, so that only torch's OpenMP runtime is loaded


@functools.cache
def native_module() -> ModuleType | None:
    """`xrl._C`, or None where it is not built or switched off."""
    if os.environ.get("XRL_KERNEL_BACKEND", "auto") == "reference":
        return None
    try:
        return importlib.import_module("xrl._C")
    except ImportError:
        return None


def describe() -> str:
    """One line on what runs the CPU kernels here."""
    module = native_module()
    if module is None:
        return "plain PyTorch (xrl._C is not built, or XRL_KERNEL_BACKEND=reference)"
    return f"xrl._C with {module.cpu_isa()}, {torch.get_num_threads()} threads"
