"""One step, top to bottom, and the loop around it: take experience, learn, publish, report.

Every rank runs the same; what only rank 0 does is behind the parts. Each part is a Protocol here, so that a loop of
another kind is other parts, or a subclass with another `step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from xrl.algorithms import Algorithm
from xrl.collaborators import Learns, Reports, Stops, Takes
from xrl.experience.asking import Need
from xrl.experience.experience import Batch
from xrl.launch.progress import Progress
from xrl.metrics.memory import return_freed_memory
from xrl.rollout.publisher import Published, Publisher

logger = logging.getLogger("xrl")
T = TypeVar("T")


class Trainer:
    """Takes experience, learns from it, publishes the weights and reports, again and again."""

    def __init__(
        self,
        experience: Takes,
        learner: Learns,
        algorithm: Algorithm,
        publisher: Publisher,
        reporter: Reports,
        *,
        num_steps: int,
        first_step: int = 0,
        hooks: Sequence[Hook] = (),
        stopping: Stops | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            num_steps: rollouts to learn from.
            first_step: those of them that were learned from before, by an attempt that this one goes on from.
            hooks: called after the first publication (step 0) and after each step, in order, on every rank.
            stopping: ends a run whose experience says Need.STOP.
            progress: is told what this rank is at.
        """
        self.experience = experience
        self.learner = learner
        self.algorithm = algorithm
        self.publisher = publisher
        self.reporter = reporter
        self.num_steps = num_steps
        self.first_step = first_step
        self.hooks = tuple(hooks)
        self.stopping = stopping
        self.progress = progress or Progress()
        self.version = 0  # of the weights that the engines have
        self.taken_at: float | None = None  # when the last rollout was there, in seconds of `time.perf_counter`

    def train(self) -> None:
        """Train from the first rollout to the last. Collective, as are all methods."""
        self.publish(version=self.first_step)
        if self.first_step in (0, self.num_steps):
            self.after(self.first_step)
        for step in range(self.first_step + 1, self.num_steps + 1):
            self.step(step)
            self.after(step)

    def step(self, step: int) -> None:
        """Take experience, learn, publish, report."""
        start = time.perf_counter()
        self.progress.enter(f"rollout {step}", "rollout")
        batch = self.take(step)
        self.taken_at = time.perf_counter()
        self.reporter.taken(step, batch)
        self.progress.enter(f"update {step}", "update")
        updates = self.learner.learn(batch.samples, self.algorithm)
        self.reporter.learned(step, updates)
        return_freed_memory()  # to the rollout workers, whose turn it is now
        published = self.publish(version=step)
        seconds = time.perf_counter() - start
        self.reporter.published(step, published, phases=self.learner.seconds, seconds=seconds)

    def take(self, step: int) -> Batch:
        """What is learned from in a step."""
        return self.asked(lambda: self.experience.take(step))

    def publish(self, *, version: int) -> Published:
        """Give the weights to every rollout worker; what is sampled from then on carries `version`."""
        self.version = version
        self.progress.enter(f"weights version {version} to the engines", "publish")
        return self.publisher.publish(version=version)

    def asked(self, ask: Callable[[], T | Need]) -> T:
        """What `ask` comes to; as often as it needs the weights, they are published once more.

        Raises:
            RunStopped: on every rank, where it was cut off as the run is asked to stop.
        """
        while isinstance(found := ask(), Need):
            if found is Need.STOP:
                assert self.stopping is not None
                self.stopping.end(self, self.version)
            logger.warning("no rollout worker is ready: weights version %d are published once more", self.version)
            self.publish(version=self.version)
        return found

    def after(self, step: int) -> None:
        """What is done between steps: evaluation, checkpoints, an early end."""
        for hook in self.hooks:
            hook(self, step)


Hook = Callable[[Trainer, int], None]
