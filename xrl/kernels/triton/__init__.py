"""Kernels in Triton. Importing this package imports no triton; its modules do, so ask `available` first."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def available() -> tuple[bool, str]:
    """Whether Triton kernels can run here; if not, why, in a sentence."""
    if find_spec("triton") is None:
        return False, "triton is not installed; `pip install triton` installs it on Linux"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return True, ""
    return False, "Triton needs a CUDA device, and torch finds none (TRITON_INTERPRET=1 runs it slowly on a CPU)"
