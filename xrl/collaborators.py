"""What a trainer is made of: whom it asks for what. Every part is a Protocol, so that others can take its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from xrl.algorithms import Algorithm
from xrl.experience.asking import Need
from xrl.experience.experience import Batch
from xrl.rollout.publisher import Published
from xrl.types import Sample, UpdateReport, WeightBucket

if TYPE_CHECKING:
    from xrl.trainer import Trainer


class Takes(Protocol):
    """Where experience comes from."""

    def take(self, step: int) -> Batch | Need:
        """What is learned from in a step. Collective.

        Need.WEIGHTS: the weights are published once more. Need.STOP: the run is asked to stop.
        """
        ...


class Learns(Protocol):
    """The model that is trained."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the last call of `learn`, by phase."""
        ...

    def learn(self, samples: Sequence[Sample] | None, algorithm: Algorithm) -> list[UpdateReport]:
        """Update the weights; `samples` are rank 0's, None on the others. Collective."""
        ...


class Weights(Protocol):
    """Its weights, for those who keep them."""

    def weights(self, *, version: int) -> Iterator[WeightBucket]: ...


class Reports(Protocol):
    """Who is told of each step. Its methods are collective."""

    def taken(self, step: int, batch: Batch) -> None: ...

    def learned(self, step: int, updates: Sequence[UpdateReport]) -> None:
        """Before anybody gets to see the new weights: what it raises keeps them from everybody."""
        ...

    def published(self, step: int, published: Published, *, phases: Mapping[str, float], seconds: float) -> None: ...


class Stops(Protocol):
    """Who ends a run that is asked to stop."""

    def end(self, trainer: Trainer, step: int) -> NoReturn:
        """Save what is there after `step`, and end the run. Collective."""
        ...
