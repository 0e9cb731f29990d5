"""A process that was told to end does end, whatever it is waiting for.

Python runs a signal handler between two of its own instructions, so a rank that waits in a collective runs none. The
kernel's side of the signal still writes a byte to a pipe, and a watchdog thread that reads it ends the process when the
main thread has not done so in time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

# From a signal or an error to the end of the process, clean-up (rollout workers!) included. A rank that fails may take
# this long before torchrun tells the others, which may take it once more: the whole run ends within 15 seconds.
GRACE_S = 6.0
PARENT_POLL_S = 1.0
FIRST_S = 1.0

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# From a thread of ours to the main thread (xrl/launch/hearing.py); nothing happens by default, and nobody else sends it
WAKE = signal.SIGURG


class Stopped(SystemExit):
    """A signal ends this process. A SystemExit, so that code which survives errors does not survive this."""

    def __init__(self, number: int, code: int | None = None) -> None:
        """
        Args:
            code: the exit code; default: 128 + number.
        """
        super().__init__(128 + number if code is None else code)
        self.signal = signal.Signals(number)


def raise_on_signals() -> None:
    """From now on STOP_SIGNALS raise `Stopped` in the main thread, and end the process after GRACE_S.

    But for a SIGHUP that is ignored: `nohup` means it.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_signal, args=(read_end,), name="signal-watchdog", daemon=True).start()
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or not ignores_hang_up():
            signal.signal(number, _raise_stopped)


def ignores_hang_up() -> bool:
    """Whether this process was started to outlive its terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def ignore_signals() -> None:
    """Clean-up has begun and ends in time by itself; a second Ctrl-C must not leave it half done."""
    if threading.current_thread() is threading.main_thread():
        for number in (*STOP_SIGNALS, WAKE):
            signal.signal(number, signal.SIG_IGN)


def end_after(seconds: float, code: int) -> None:
    """End the process with `code` if it is still there after so long."""
    timer = threading.Timer(seconds, os._exit, args=(code,))
    timer.daemon = True
    timer.start()


def stop_with_parent(first: Callable[[], None] = lambda: None) -> None:
    """When the parent is gone, killed say, send this process SIGTERM: nobody else would end it.

    Args:
        first: is called before, in another thread; it gets FIRST_S.
    """
    watch = threading.Thread(target=_watch_parent, args=(os.getppid(), first), name="parent-watchdog", daemon=True)
    watch.start()


def _raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    raise Stopped(number)


def _end_after_signal(read_end: int) -> None:
    while (number := os.read(read_end, 1)[0]) not in STOP_SIGNALS:
        pass
    time.sleep(GRACE_S)
    os._exit(128 + number)


def _watch_parent(parent_pid: int, first: Callable[[], None]) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    # Whatever becomes of it, on a disk that is gone, say, nothing may keep this process.
    before = threading.Thread(target=first, name="before-the-end", daemon=True)
    before.start()
    before.join(FIRST_S)
    os.kill(os.getpid(), signal.SIGTERM)
