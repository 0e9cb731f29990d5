"""Actor and engines on the same devices: one leaves before the other comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from xrl.algorithms import Algorithm
from xrl.parallel.control import Control
from xrl.rollout.publisher import Published, Publisher
from xrl.types import Sample, UpdateReport


class Sleeps(Protocol):
    """Engines that give their device up."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Leaves(Protocol):
    """What training needs of a device beside the model's own weights."""

    def offload(self) -> None: ...

    def restore(self) -> None: ...


class Learner(Protocol):
    """Who learns from samples."""

    @property
    def seconds(self) -> Mapping[str, float]: ...

    def learn(self, samples: Sequence[Sample] | None, algorithm: Algorithm) -> list[UpdateReport]: ...


class DeviceTurns:
    """Whose turn it is. Each method is collective."""

    def __init__(self, engines: Sleeps | None, memory: Leaves, control: Control) -> None:
        """
        Args:
            engines: on rank 0, None on the others.
            memory: this rank's.
        """
        self._engines, self._memory, self._control = engines, memory, control
        self._seconds = 0.0

    def to_actor(self) -> None:
        """Engines go to sleep, then what training needs comes back."""
        with self._timed():
            if self._engines:
                self._engines.sleep()
            self._control.meet()  # what one gives up is free before the other takes it
            self._memory.restore()

    def to_engines(self) -> None:
        """The opposite, but for waking the engines: they take the new weights first."""
        with self._timed():
            self._memory.offload()
            self._control.meet()
            if self._engines:  # before the first update, and for workers that were started again meanwhile
                self._engines.sleep()

    def wake(self) -> None:
        """The engines have the new weights."""
        with self._timed():
            if self._engines:
                self._engines.wake()

    def take_seconds(self) -> float:
        """What turns have taken since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


class TurnTakingLearner:
    """Learns while the engines sleep."""

    def __init__(self, inner: Learner, turns: DeviceTurns) -> None:
        self._inner, self._turns = inner, turns

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the last rollout's updates, by phase."""
        return self._inner.seconds

    def learn(self, samples: Sequence[Sample] | None, algorithm: Algorithm) -> list[UpdateReport]:
        """As the learner's. Collective."""
        self._turns.to_actor()
        return self._inner.learn(samples, algorithm)


class TurnTakingPublisher:
    """Publishes, and hands the devices to the engines."""

    def __init__(self, inner: Publisher, turns: DeviceTurns) -> None:
        self._inner, self._turns = inner, turns

    def publish(self, *, version: int) -> Published:
        """As `Publisher`. Collective."""
        self._turns.to_engines()
        published = self._inner.publish(version=version)
        self._turns.wake()
        return published.plus({"seconds/turns": self._turns.take_seconds()})
