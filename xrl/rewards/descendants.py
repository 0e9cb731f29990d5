"""The processes below another one, found in /proc, and their end. Elsewhere than on Linux none are found."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PAUSE_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the system says of a process."""

    pid: int
    state: str  # Z: it has ended and waits to be reaped
    parent: int
    session: int
    num_threads: int
    resident_bytes: int  # memory it has touched; what it shares with others counts for each of them


def read_processes() -> dict[int, Process]:
    """Every process that can be seen, by its id."""
    found: dict[int, Process] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return found
    for name in names:
        process = read_process(int(name)) if name.isdecimal() else None
        if process is not None:
            found[process.pid] = process
    return found


def read_process(pid: int) -> Process | None:
    """None where there is no such process any more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # Its name, in parentheses, may hold anything.
            fields = file.read().rpartition(b")")[2].split()
        return Process(
            pid=pid,
            state=fields[0].decode(),
            parent=int(fields[1]),
            session=int(fields[3]),
            num_threads=int(fields[17]),
            resident_bytes=int(fields[21]) * _PAGE_BYTES,
        )
    except (OSError, ValueError, IndexError):
        return None


def below(top: int, processes: Mapping[int, Process]) -> list[Process]:
    """The processes that `top` has started, and those that they have."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [top]
    while waiting:
        # Taken out: an id that was given away anew while the list was read must not lead in a circle.
        started = children.pop(waiting.pop(), [])
        found += started
        waiting += [process.pid for process in started]
    return found


def kill_all(find: Callable[[], Collection[int]], *, limit_s: float, reap: Callable[[], object] | None = None) -> bool:
    """Kill what `find` finds until it finds nothing; False where some are left when the time is up.

    A process that a signal waits for starts no other, so each round leaves fewer. One that hangs in the kernel, on a
    disk that is gone, say, ends when that lets it go.

    Args:
        find: ids of those that have not ended.
        reap: called after each round.
    """
    deadline = time.monotonic() + limit_s
    num_clean = 0
    # Twice, as a process that starts while the list is read may be missing in it.
    while num_clean < 2:
        found = find()
        num_clean = 0 if found else num_clean + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if reap is not None:
            reap()
        if found:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
    return True


def alive_below(top: int) -> list[int]:
    """Ids of the processes below `top` that have not ended."""
    return [process.pid for process in below(top, read_processes()) if process.state != "Z"]


def alive_of_session(session: int, mark: bytes) -> list[int]:
    """Ids of the processes of a session, or with `mark` in their environment, that have not ended.

    For those whose parents are gone: the session's leader, too, must not have been reaped yet.
    """
    return [
        process.pid
        for process in read_processes().values()
        if process.state != "Z" and (process.session == session or _has_mark(process.pid, mark))
    ]


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read()
    except OSError:
        return False
