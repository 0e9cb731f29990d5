"""Signals of a run's processes, heard by a thread of their own.

By default a signal ends a process, or raises in the middle of whatever its main thread is at: the import of a library,
say. So a run's processes block theirs from their first moment on. One that comes meanwhile is kept, and processes that
are started inherit the block, so that they have no moment without it either. A thread waits for signals, and it is told
who sent each of them. What it does about them is up to `react`; the main thread is interrupted only by `end`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeAlias

from xrl.launch.signals import GRACE_S, STOP_SIGNALS, WAKE, Stopped, end_after, ignore_signals, ignores_hang_up

# Those that a run takes for a request to stop; see xrl/launch/stop.py.
REQUEST_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RUN_SIGNALS = (*REQUEST_SIGNALS, signal.SIGHUP)

# What is done about a signal: its number, and the id of the process that sent it; 0: a terminal, or not known.
Reaction: TypeAlias = Callable[[signal.Signals, int], None]


def block_signals() -> None:
    """From now on signals are kept until somebody listens; in the main thread, before there is another one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _heard(RUN_SIGNALS))


def unblock_signals() -> None:
    """A child of a run that is no part of it, as far as signals go, takes them as any process does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RUN_SIGNALS)


def leave_requests_to_others() -> None:
    """A child of a run that others end: it takes signals as any process does, but for those that only ask a run."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    unblock_signals()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """In such a block the main thread is not interrupted by `Hearing.end`, but right after it: around imports."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WAKE})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {WAKE})


class Hearing:
    """The thread that waits for signals, as long as the `hearing` block takes."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self.react: Reaction = self.end_by
        self._numbers = {*numbers, WAKE}
        self._main = threading.main_thread()
        self._error: BaseException | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def end(self, error: SystemExit, *, within_s: float | None = GRACE_S) -> None:
        """Raise in the main thread, from any thread.

        Args:
            within_s: the process ends after so long, wherever its main thread is stuck; None: that has bounds itself.
        """
        self._error = error
        if within_s is not None:
            end_after(within_s, error.code if isinstance(error.code, int) else 1)
        assert self._main.ident is not None
        signal.pthread_kill(self._main.ident, WAKE)

    def end_by(self, number: signal.Signals, sender: int) -> None:
        """The reaction of a process that has nothing to lose: it ends at once."""
        self.end(Stopped(number))

    def begin(self) -> None:
        """Start the thread; in the main thread."""
        signal.signal(WAKE, self._raise)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._is_over = True
        if self._thread.ident is not None and self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, WAKE)

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {WAKE})
        while not self._is_over:
            number, sender = _wait_for_signal(self._numbers)
            if number != WAKE:
                self.react(number, sender)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        error, self._error = self._error, None
        if error is not None:
            ignore_signals()
            raise error


@contextlib.contextmanager
def hearing(
    numbers: Iterable[signal.Signals] = STOP_SIGNALS, reaction: Callable[[Hearing], Reaction] | None = None
) -> Iterator[Hearing]:
    """Hear signals in such a block, in the main thread.

    Args:
        numbers: the signals; a SIGHUP that is ignored is not among them: `nohup` means it.
        reaction: makes what is done about them, from the first one on; default: each ends the process at once.
    """
    heard = _heard(numbers)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    handler = signal.getsignal(WAKE)
    found = Hearing(heard)
    if reaction is not None:
        found.react = reaction(found)
    found.begin()
    try:
        yield found
    finally:
        found.close()
        signal.signal(WAKE, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heard(numbers: Iterable[signal.Signals]) -> set[signal.Signals]:
    return {number for number in numbers if number != signal.SIGHUP or not ignores_hang_up()}


def _wait_for_signal(numbers: set[signal.Signals]) -> tuple[signal.Signals, int]:
    """The next of these signals, and the process that sent it."""
    if hasattr(signal, "sigwaitinfo"):
        found = signal.sigwaitinfo(numbers)
        return signal.Signals(found.si_signo), found.si_pid
    return signal.Signals(signal.sigwait(numbers)), 0  # macOS does not say who
