"""Threads of our own kernels, and of PyTorch's operations beside them.

Our kernels share their work with whatever thread comes (csrc/team.h). PyTorch's, on OpenMP, wait for every thread to
come and go: beside other programs, where a thread waits for a core for milliseconds, that costs more than small
operations take.
"""

from __future__ import annotations

import torch

from xrl.kernels.arguments import check_count
from xrl.kernels.native import native_module

_MOST_THREADS = 1024  # kMostThreads in csrc/team.h
# Parameters of a model. What PyTorch does for smaller ones is over before a sleeping thread has woken up.
SMALL_MODEL = 16_000_000


def num_threads() -> int:
    """Threads that a kernel of ours shares its work with: those of `use_threads`, else as many as PyTorch's."""
    module = native_module()
    chosen = 0 if module is None else int(module.num_threads())
    return chosen or min(torch.get_num_threads(), _MOST_THREADS)


def use_threads(count: int, *, num_parameters: int) -> None:
    """Have our kernels in this process, and PyTorch's in this thread, run on `count` threads.

    PyTorch's stay on this thread where the model is small and our kernels are there to do most of the work.

    Args:
        num_parameters: that this process computes with.

    Raises:
        ValueError: fewer than 1, or more than kernels take (csrc/team.h).
    """
    check_count("count", count)
    module = native_module()
    if module is not None:
        module.set_num_threads(count)
    torch.set_num_threads(1 if module is not None and num_parameters < SMALL_MODEL else count)
