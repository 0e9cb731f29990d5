"""How far this process is, for those who wait for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

T = TypeVar("T")

PhaseKind: TypeAlias = Literal["start", "rollout", "update", "publish", "save", "evaluation"]


def _nothing() -> str:
    return ""


@dataclass
class Progress:
    """What a process is at, and a count that grows with every piece of work that it ends.

    Written by the thread that works, read by another: each field is one object, replaced whole.
    """

    phase: str = "start"  # "rollout 3", "update 3", ...: for people
    kind: PhaseKind = "start"  # which of the limits holds: xrl/launch/limits.py
    since: float = field(default_factory=time.monotonic)  # when the phase began, in seconds
    pieces: int = 0  # an answer, a verdict, a layer, a micro-batch: whatever ends
    waits_for: Callable[[], str] = _nothing  # outside of this process; asked by another thread, for people

    def enter(self, phase: str, kind: PhaseKind) -> None:
        """From here on it is at `phase`."""
        self.since, self.phase, self.kind = time.monotonic(), phase, kind
        self.pieces += 1

    def advance(self) -> None:
        """One more piece is done."""
        self.pieces += 1

    def through(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which counts when the next one is asked for."""
        for item in items:
            yield item
            self.pieces += 1

    @contextlib.contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        """While the block runs it may wait for others.

        Args:
            what: for whom and for how long, "8 verdicts, the longest for 61 s", as of now; asked by another thread.
        """
        before, self.waits_for = self.waits_for, what
        try:
            yield
        finally:
            self.waits_for = before
