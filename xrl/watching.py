"""How a run watches its own ranks: what it needs for that, where it writes down what it sees, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import psutil

from xrl.config import Settings
from xrl.files.disk import NotWritten
from xrl.files.notes import Notes
from xrl.files.whole import write_whole
from xrl.launch.exit import EXIT_STOPPED, RunHung, announce_end, exit_now
from xrl.launch.hang import Hang
from xrl.launch.limits import Limits
from xrl.launch.progress import Progress
from xrl.launch.signals import end_after
from xrl.launch.watch import Self, Store, Watch
from xrl.metrics.ending import Ending
from xrl.metrics.run_folder import RunFolder
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.recorder import overdue_s, pending_collectives
from xrl.parallel.store import attempt_number, connect_to_store

# A run may hang because its disk does: nothing that is written or read at the end may keep it.
DISK_LIMIT_S = 3.0
END_LIMIT_S = 8.0


def watch_ranks(settings: Settings, groups: ParallelGroups, progress: Progress, ending: Ending) -> Watch:
    """From here on a rank that is stopped or hangs ends the run, and is named."""

    def connect() -> Store:
        if "MASTER_ADDR" in os.environ:
            return connect_to_store(os.environ)
        if ending.folder is None:
            raise RuntimeError("there is no run folder yet")
        return Notes(ending.folder.doctor)

    return Watch(
        connect,
        Self(rank=groups.rank, progress=progress, pending=pending_collectives),
        world_size=groups.layout.world_size,
        limits=Limits.of(settings),
        tell=lambda hang: tell_hung(hang, ending),
        end=end_hung,
        overdue_s=partial(overdue_s, limit_s=60.0 * settings.parallel.distributed_timeout_minutes),
    )


def write_whereabouts(folder: RunFolder, *, world_size: int) -> None:
    """Write down where `xrl doctor` finds the ranks; without room for it, it does not find them."""
    store = [os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])] if "MASTER_ADDR" in os.environ else None
    process = psutil.Process()
    content: dict[str, Any] = {
        "world_size": world_size,
        "store": store,  # address and port; without: notes in the folder
        "attempt": attempt_number(os.environ),
        "host": socket.gethostname(),  # of rank 0
        "pid": process.pid,
        "started": process.create_time(),
    }
    with contextlib.suppress(OSError):
        folder.hang.unlink(missing_ok=True)  # of an earlier attempt at the same run
    with contextlib.suppress(NotWritten):
        write_whole(folder.ranks, f"{json.dumps(content)}\n".encode(), flush=False)


def tell_hung(hang: Hang, ending: Ending) -> None:
    """Say what is known of a run that hangs, and write it down; whatever comes of that, the process ends soon."""
    end_after(END_LIMIT_S, EXIT_STOPPED)
    error = RunHung(hang.text())

    def note() -> str:
        if ending.folder is not None:
            write_down(ending.folder, hang)
        return ending.words_about(error)

    announce_end(error, _within(DISK_LIMIT_S, note))


def end_hung(hang: Hang | None) -> NoReturn:
    """End this process, and silent ranks of this host: torchrun would wait half a minute for one that is stopped."""
    for report in hang.ranks if hang else ():
        if report.silent_s is not None and report.beat is not None and report.beat.host == socket.gethostname():
            _kill_sibling(report.beat.pid)
    exit_now(EXIT_STOPPED)


def _kill_sibling(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.ppid() == os.getppid():  # else it is no rank of ours any more
            process.kill()


def write_down(folder: RunFolder, hang: Hang) -> None:
    """For `xrl doctor`, when the run has ended."""
    content = {"time": datetime.now().isoformat(timespec="seconds"), **dataclasses.asdict(hang)}
    with contextlib.suppress(NotWritten):
        write_whole(folder.hang, f"{json.dumps(content, indent=2)}\n".encode(), flush=False)


def _within(limit_s: float, action: Callable[[], str]) -> str:
    """What comes of it, empty where nothing has come by then."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else ""
