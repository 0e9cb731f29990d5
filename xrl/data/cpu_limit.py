"""A bound on how long Python code of somebody else's computes."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn


class CpuLimit:
    """Raises TimeoutError in its block once this process has computed for so many seconds in it.

    Of its own time, so that a busy machine changes nothing. Only the main thread can be interrupted: in others the
    block runs as it is.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._is_bound = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._is_bound:
            self._before = signal.signal(signal.SIGVTALRM, _raise_timeout)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_bound:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._before)


def _raise_timeout(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError
