"""Kernels in Triton. Importing this package imports no triton."""

from __future__ import annotations


def available() -> tuple[bool, str]:
    """Whether Triton kernels can run here; if not, why, in a sentence."""
    return False, "there are no Triton kernels yet"
