"""Whether a judge and what it has started keep to their limits, as a sum: looked at often, at little cost.

To read the whole process table takes milliseconds. It is read at once when it may hold too many: the system numbers
processes and threads one after the other, so a judge cannot have more than it had and the system has made since. Else
it is read so rarely that it takes a thousandth of a core. Where nothing happens, looks become rarer too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from xrl.rewards.descendants import Process, below, read_process, read_processes
from xrl.rewards.limits import THREADS_PER_PROCESS, JudgeLimits

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 0.4
SCAN_S = 1.0
SCAN_SHARE = 0.001


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A limit that was passed."""

    failure: str  # "memory limit", "process limit"
    detail: str


class Watch:
    """Watches everything below one process."""

    def __init__(self, top: int, limits: JudgeLimits) -> None:
        """
        Args:
            top: the id of the process above the judge, which itself does not count.
        """
        self.top = top
        self.limits = limits
        self.pause_s = SHORTEST_PAUSE_S  # until the next look
        self._known: list[Process] = []
        self._newest = -1  # when the whole table was read
        self._next_scan = 0.0
        self._last_seen = (-1, -1)  # what tells whether anything happens

    def excess(self) -> Excess | None:
        """Look at the processes again; returns a limit that they have passed."""
        newest = newest_id()
        now = time.monotonic()
        if now >= self._next_scan or self._may_be_too_many(newest):
            self._newest = newest
            self._known = below(self.top, read_processes())
            took = time.monotonic() - now
            self._next_scan = now + max(SCAN_S, took / SCAN_SHARE)
        else:
            again = [read_process(process.pid) for process in self._known]
            self._known = [process for process in again if process is not None]
        seen = newest, sum(process.resident_bytes for process in self._known)
        self.pause_s = min(1.5 * self.pause_s, LONGEST_PAUSE_S) if seen == self._last_seen else SHORTEST_PAUSE_S
        self._last_seen = seen
        return self._too_many() or self._too_large()

    def _may_be_too_many(self, newest: int) -> bool:
        most = self.limits.max_processes
        if most is None:
            return False
        made = newest - self._newest
        return made < 0 or len(self._known) + made > most  # they start again from low numbers

    def _too_many(self) -> Excess | None:
        most = self.limits.max_processes
        if most is None:
            return None
        num_alive = sum(process.state != "Z" for process in self._known)
        num_threads = sum(max(1, process.num_threads) for process in self._known)
        if num_alive <= most and num_threads <= most * THREADS_PER_PROCESS:
            return None
        return Excess(
            failure="process limit",
            detail=f"the judge had {num_alive} processes with {num_threads} threads at once, more than "
            f"--judge-max-processes {most} ({most * THREADS_PER_PROCESS} threads)",
        )

    def _too_large(self) -> Excess | None:
        most = self.limits.memory_bytes
        if most is None or sum(process.resident_bytes for process in self._known) <= most:
            return None
        total = sum(_own_bytes(process) for process in self._known)
        if total <= most:
            return None
        return Excess(
            failure="memory limit",
            detail=f"the judge and what it started held {total / 1e9:.2f} GB, "
            f"more than --judge-memory-gb {most / 1e9:g}",
        )


def newest_id() -> int:
    """The id of the process or thread that was made last; always the same where the system does not say."""
    try:
        with open("/proc/loadavg", "rb") as file:
            return int(file.read().split()[4])
    except (OSError, ValueError, IndexError):
        return 0


def _own_bytes(process: Process) -> int:
    """Its memory, what it shares with others divided by their number; slower to find out."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as file:
            (line,) = (line for line in file if line.startswith(b"Pss:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return process.resident_bytes
