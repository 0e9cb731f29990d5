"""The primitives of `xrl.kernels.head.backend.Backend` in Triton."""

from xrl.kernels.triton.grpo_rows import grpo_rows
from xrl.kernels.triton.logprob import gradient, statistics

__all__ = ["gradient", "grpo_rows", "statistics"]
