"""How OpenMP threads of this run's processes wait for each other."""

from __future__ import annotations

from collections.abc import MutableMapping


def set_thread_waiting(environment: MutableMapping[str, str]) -> None:
    """Let waiting threads spin for a moment, then sleep, unless the environment already says how they wait.

    They are those of PyTorch's operations; our kernels' own do the same (csrc/team.cpp). Ranks and rollout workers
    share the cores and take turns, so threads that wait long must sleep. The moment (about 0.1 ms, libgomp's count)
    covers the gaps between small operations, where waking up would cost more than the operation. Must come before torch
    is imported.
    """
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("GOMP_SPINCOUNT", "30000")
