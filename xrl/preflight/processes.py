"""How much is started on this machine: a digit too many must not take it down."""

from __future__ import annotations

import os
from pathlib import Path

from xrl.config import Settings, SettingsError
from xrl.launch.variables import rank_number
from xrl.preflight.machine import has_cuda_driver

# Of ranks, workers or threads. On the CPU more of them than cores are slow, but right: layouts are tried out that way.
PER_CORE = 4
ALWAYS_ALLOWED = 16
# Judges may wait for others most of the time, such as a server of theirs.
JUDGES_PER_CORE = 16
JUDGES_ALWAYS_ALLOWED = 64


def check_processes(settings: Settings, *, world_size: int) -> None:
    """Refuse more ranks than CUDA devices, and more of anything than the cores could ever run.

    Raises:
        SettingsError: naming the flag, the number found, and how many there may be.
    """
    cores = num_cores()
    most = max(PER_CORE * cores, ALWAYS_ALLOWED)
    here = rank_number(os.environ, "LOCAL_WORLD_SIZE", world_size)
    _check("--nproc-per-node", here, most, cores)
    _check("--rollout-num-workers", settings.rollout.rollout_num_workers, most, cores)
    _check("--rollout-num-threads", settings.rollout.rollout_num_threads, most, cores)
    most_judges = max(JUDGES_PER_CORE * cores, JUDGES_ALWAYS_ALLOWED)
    _check("--judge-num-workers", settings.rewards.judge_num_workers, most_judges, cores)
    devices = num_cuda_devices()
    if devices and here > devices:
        raise SettingsError(
            f"--nproc-per-node {here} needs a CUDA device for each rank, and {devices} "
            f"{'is' if devices == 1 else 'are'} visible: start at most {devices}, or hide them (CUDA_VISIBLE_DEVICES=) "
            f"to train on the CPU"
        )


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_cuda_devices() -> int:
    """CUDA devices that a run would find, as far as that shows without torch; 0: none, or there is no telling."""
    if not has_cuda_driver():
        return 0
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return len([name for name in visible.split(",") if name.strip()]) if present else 0


def _check(flag: str, found: int | None, most: int, cores: int) -> None:
    if found is not None and found > most:
        raise SettingsError(
            f"{flag} {found:,} is more than the {most:,} that this machine with {cores} cores is asked to run: give "
            f"{most:,} at most"
        )
