"""The compiled module `xrl._C`, where it was built.

`XRL_KERNEL_BACKEND=reference` turns the compiled kernels off.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType


@functools.cache
def native_module() -> ModuleType | None:
    """`xrl._C`, or None where it is not built or switched off."""
    if os.environ.get("XRL_KERNEL_BACKEND", "auto") == "reference":
        return None
    try:
        return importlib.import_module("xrl._C")
    except ImportError:
        return None
