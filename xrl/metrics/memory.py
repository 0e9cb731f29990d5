"""How much memory a process and its children take."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil


def peak_rss_bytes(pid: int | None = None) -> int:
    """Sum of each process's own highest resident memory, over a process (left out: this one) and its descendants.

    The kernel keeps these, so nothing needs to watch. An upper bound: pages that processes share are counted in
    each, and the peaks need not fall together. `PeakMemory` with pss counts shared pages once.
    """
    return _over_tree(pid, _peak_rss)


def rss_bytes(pid: int | None = None) -> int:
    """Resident memory now, of a process and its descendants; shared pages count in each."""
    return _over_tree(pid, lambda process: int(process.memory_info().rss))


def pss_bytes(pid: int | None = None) -> int:
    """Proportional memory now, of a process and its descendants: a page shared by n processes counts 1/n in each.

    Linux only; elsewhere resident memory stands in.
    """
    return _over_tree(pid, _pss)


def return_freed_memory() -> None:
    """Hand memory that this process has freed back to the system, where the C library can (glibc).

    The allocator keeps what a phase of the run has used for the next such phase; meanwhile other processes of the run
    need it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cuda_peak_bytes() -> int:
    """Most bytes this process has had allocated on its CUDA device; 0 without one."""
    # Imported here: a process that only watches others must not grow by torch itself.
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class PeakMemory:
    """Watches a process tree from a thread, and keeps the highest sum it sees.

    with PeakMemory(pss_bytes) as peak:
        ...
    peak.bytes
    """

    def __init__(
        self,
        measure: Callable[[int | None], int] = pss_bytes,
        *,
        pid: int | None = None,
        interval_s: float = 0.25,
    ) -> None:
        self.bytes = 0
        self._measure = measure
        self._pid = pid
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()  # Unbounded: it takes one sample more, and waits for nobody.
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, self._measure(self._pid))


def _over_tree(pid: int | None, measure: Callable[[psutil.Process], int]) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            total += measure(process)
        except psutil.NoSuchProcess:  # ended since the tree was listed
            continue
    return total


def _peak_rss(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (OSError, UnicodeDecodeError):
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # given in KiB
    return int(process.memory_info().rss)


def _pss(process: psutil.Process) -> int:
    try:
        # A kernel without smaps_rollup reports no pss, or 0.
        return int(getattr(process.memory_full_info(), "pss", 0)) or int(process.memory_info().rss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
