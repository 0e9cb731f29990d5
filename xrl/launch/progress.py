"""How far this process is, for those who wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Progress:
    """What a process is at, and a count that grows with every piece of work that it ends.

    Written by the thread that works, read by another: each field is one object, replaced whole.
    """

    phase: str = "start"  # "rollout 3", "update 3", ...: for people
    pieces: int = 0  # an answer, a verdict, a layer, a micro-batch: whatever ends

    def enter(self, phase: str) -> None:
        """From here on it is at `phase`."""
        self.phase = phase
        self.pieces += 1

    def advance(self) -> None:
        """One more piece is done."""
        self.pieces += 1

    def through(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which counts when the next one is asked for."""
        for item in items:
            yield item
            self.pieces += 1
