"""What rank 0 asks of the rollout engines while the other ranks wait, and give the weights once more if it must be."""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from xrl.launch.stop import StopAsked
from xrl.parallel.control import Control

T = TypeVar("T")


class Need(enum.IntEnum):
    """What must be done before the engines can answer."""

    NOTHING = 0
    WEIGHTS = 1  # no worker is ready, and one may be with the current weights, published once more
    STOP = 2  # nothing: the run is asked to stop, and what was under way is thrown away


Asking = Generator[Need, None, T]
"""Something that engines are asked: yields what it needs to go on, and returns what it came to."""


class Asked(Generic[T]):
    """Runs one `Asking` after another, on rank 0, and tells the other ranks what it needs."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._running: Asking[T] | None = None

    def go_on(self, begin: Callable[[], Asking[T]]) -> T | Need:
        """Go on with what is under way, or begin. Collective.

        Args:
            begin: called on rank 0 alone.

        Returns:
            Need.WEIGHTS, on every rank: publish them, and call this again. Need.STOP, on every rank: it was cut off.
            Otherwise what it came to, on rank 0, and Need.NOTHING on the others.
        """
        if not self._control.leads:
            return self._control.agree(Need.NOTHING)
        if self._running is None:
            self._running = begin()
        try:
            need = next(self._running)
        except StopIteration as end:
            self._running = None
            self._control.agree(Need.NOTHING)
            found: T = end.value
            return found
        except StopAsked:
            self._running = None
            return self._control.agree(Need.STOP)
        return self._control.agree(need)
