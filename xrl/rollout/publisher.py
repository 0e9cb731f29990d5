"""New weights to the rollout engines, as a step of training: published, checked by the canary, and repeated if lost.

A publisher is collective: every rank calls `publish`, and rank 0 learns what came of it. Those below wrap each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.parallel.control import Control
from xrl.rollout.process import WorkerGone
from xrl.rollout.publish import NoneUpdated, PublishReport
from xrl.types import Sample, WeightBucket
from xrl.weights.transport.shared_memory import Sender

logger = logging.getLogger("xrl")


@dataclass(frozen=True, kw_only=True)
class Published:
    """The outcome of an update of the engines. Only rank 0 knows it."""

    metrics: Mapping[str, float]
    checksums: tuple[str, ...] | None = None  # of the parts, in order; None where no worker has taken all of them
    changed: bool = False  # any weight has other bits than those that were published before

    def plus(self, metrics: Mapping[str, float]) -> Published:
        """The same outcome with more metrics."""
        return replace(self, metrics={**self.metrics, **metrics})


class Publisher(Protocol):
    """Gives the actor's weights to every rollout worker."""

    def publish(self, *, version: int) -> Published:
        """Give the weights to every worker; what is sampled from then on carries `version`. Collective."""
        ...


class Source(Protocol):
    """Where the weights come from."""

    def stream(self, memory: Sender | None, *, version: int) -> Iterator[WeightBucket]: ...


class Stream(Protocol):
    """What takes them to the workers."""

    @property
    def memory(self) -> Sender | None: ...

    def publish(self, buckets: Iterator[WeightBucket], *, version: int) -> PublishReport: ...


class Workers(Protocol):
    """The workers that have taken them."""

    @property
    def num_lost(self) -> int: ...

    @property
    def num_restarted(self) -> int: ...

    def ready(self) -> Sequence[object]: ...

    def none_left(self) -> WorkerGone: ...


class Scores(Protocol):
    """The actor, who knows what an engine should have computed."""

    def mismatch(self, samples: Sequence[Sample] | None) -> list[float]: ...


class AsksCanaries(Protocol):
    """The canary."""

    def sample(self) -> list[Sample]: ...

    def judge(self, differences: Sequence[float]) -> float: ...


class WeightPublisher:
    """Streams the weights to all workers there are, once."""

    def __init__(self, source: Source, stream: Stream | None, progress: Progress | None = None) -> None:
        """
        Args:
            stream: on rank 0; None on the others, which give their part of the weights.
            progress: advances with every part.
        """
        self._source, self._stream = source, stream
        self._progress = progress or Progress()

    def publish(self, *, version: int) -> Published:
        """As `Publisher`. That all workers were lost meanwhile is logged, and leaves `checksums` None."""
        start = time.perf_counter()
        buckets = self._source.stream(self._stream.memory if self._stream else None, version=version)
        metrics: dict[str, float] = {}
        checksums = None
        if self._stream:
            try:
                report = self._stream.publish(self._progress.through(buckets), version=version)
            except NoneUpdated as error:
                logger.error("%s", error)
            else:
                checksums = report.checksums
                metrics = {
                    "sync/gigabytes": report.num_bytes / 1e9,
                    "sync/layers": float(report.num_parts),
                    "sync/resent": float(report.num_resent),
                    "workers/updated": float(report.num_workers),
                }
        # Little or nothing is left of them on rank 0; the other ranks get nothing but must take part.
        for _ in buckets:
            pass
        metrics["seconds/publish"] = time.perf_counter() - start
        return Published(metrics=metrics, checksums=checksums)


class CheckedPublisher:
    """Lets the actor score what each worker samples with its new weights."""

    def __init__(self, inner: Publisher, actor: Scores, canary: AsksCanaries | None) -> None:
        """
        Args:
            canary: on rank 0; None on the others, which take part in the scoring.
        """
        self._inner, self._actor, self._canary = inner, actor, canary

    def publish(self, *, version: int) -> Published:
        """As `Publisher`.

        Raises:
            CanaryFailed: actor and engine do not compute the same. On rank 0.
        """
        published = self._inner.publish(version=version)
        start = time.perf_counter()
        differences = self._actor.mismatch(self._canary.sample() if self._canary else None)
        found: dict[str, float] = {}
        if self._canary and differences:  # without: no worker is left
            found["canary"] = self._canary.judge(differences)
        return published.plus({**found, "seconds/canary": time.perf_counter() - start})


class PersistentPublisher:
    """Publishes anew where all workers were lost over it, as often as a worker is started again."""

    def __init__(self, inner: Publisher, workers: Workers | None, control: Control, *, max_repeats: int) -> None:
        """
        Args:
            workers: on rank 0, None on the others.
        """
        self._inner, self._workers, self._control = inner, workers, control
        self._max_repeats = max_repeats
        self._checksums: tuple[str, ...] | None = None  # of the weights that the engines have

    def publish(self, *, version: int) -> Published:
        """As `Publisher`; at its end a worker is ready.

        Raises:
            WorkerGone: on rank 0, and RunEnded on the others: they were lost each time.
        """
        before, seconds = self._checksums, 0.0
        for _ in range(1 + self._max_repeats):
            published = self._inner.publish(version=version)
            seconds += published.metrics["seconds/publish"]
            self._checksums = published.checksums or self._checksums
            if self._control.agree(self._workers is not None and bool(self._workers.ready())):
                break
            logger.warning("weights version %d have no rollout worker any more: they are published anew", version)
        else:
            raise self._workers.none_left() if self._workers else RunEnded()
        published = replace(published, changed=self._checksums != before).plus({"seconds/publish": seconds})
        if self._workers is None:
            return published
        counts = {"workers/lost": self._workers.num_lost, "workers/restarted": self._workers.num_restarted}
        return published.plus({name: float(count) for name, count in counts.items()})
