"""Which rollout workers there are and who is ready: left out when they die, taken back with the next weights.

A worker's way, as the roster sees it:

    starting --listens--> stale --has taken an update--> ready --dies, hangs, lies--> lost --started again--> starting
                            ^                              |
                            +----- has other weights ------+

Requests go to ready workers only, updates to stale and ready ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xrl.config import RolloutConfig
from xrl.rollout.answers import WorkerFault, name_of, whose_weights
from xrl.rollout.process import WorkerGone, WorkerHandle

logger = logging.getLogger("xrl")

START_TIMEOUT_S = 120.0
# One wrong answer may be a slip of memory or network; so many in a row are not.
FAULTS_IN_A_ROW = 3


@dataclass
class _Standing:
    """What is known of a worker."""

    version: int | None = None  # of the weights that it took whole
    lost: str = ""  # why it is left out
    last_lost: str = ""  # the same, of the last time: it may have been started again
    generation: int = 0  # counts its losses: a connection is of one generation
    started: float = field(default_factory=time.monotonic)
    restarts: int = 0
    is_restarting: bool = False  # in a thread of its own: its process may take time to end
    faults: int = 0  # wrong answers in a row
    is_lost_by_faults: bool = False


class Roster:
    """Who is ready, stale and lost. Any thread may ask, and say what it found of a worker."""

    def __init__(self, workers: Sequence[WorkerHandle], config: RolloutConfig) -> None:
        """
        Args:
            workers: one at least, with numbers of their own.
            config: says what follows the loss of one, and how often it is started again.
        """
        self.workers = list(workers)
        self.version: int | None = None  # of the weights that a ready worker has; None before the first update
        self.num_lost = 0  # workers lost since the start, each as often as it was
        self.num_restarted = 0
        self._config = config
        self._standings = {worker.number: _Standing() for worker in self.workers}
        self._lock = threading.RLock()  # around the standings: several threads look at them
        self._is_closing = False
        self._restarts: list[threading.Thread] = []

    def close(self, timeout_s: float) -> None:
        """Lose nobody and start nobody any more. Waits so long for each start under way."""
        with self._lock:
            self._is_closing = True
        for restart in self._restarts:
            restart.join(timeout_s)

    @property
    def alive(self) -> list[WorkerHandle]:
        """Workers that requests can be sent to.

        Raises:
            WorkerGone: there is none left.
        """
        alive = self.ready()
        if not alive:
            raise self.none_left()
        return alive

    def none_left(self) -> WorkerGone:
        """The error that says so, with what each worker was lost by last."""
        found = [(name_of(worker), self._standings[worker.number]) for worker in self.workers]
        reasons = "; ".join(f"{name}: {standing.last_lost}" for name, standing in found if standing.last_lost)
        return WorkerGone(
            f"no rollout worker is left{f' ({reasons})' if reasons else ''}; {self.workers[-1].log_place}"
        )

    def ready(self) -> list[WorkerHandle]:
        """Workers that requests can be sent to; none where none is left."""
        with self._lock:
            self._notice_ends()
            return [worker for worker in self.workers if self._is_ready(worker)]

    @property
    def can_recover(self) -> bool:
        """Whether the weights of an update may make a worker ready: one that is not lost."""
        with self._lock:
            return any(not standing.lost for standing in self._standings.values())

    def reachable(self) -> list[WorkerHandle]:
        """Workers that listen, whatever weights they have; waits for one to start where there is none.

        Each start has START_TIMEOUT_S, and each worker only so many.

        Raises:
            WorkerGone: none listens and none starts.
        """
        while True:
            with self._lock:
                self._notice_ends()
                found = [worker for worker in self.workers if self._listens(worker)]
                starting = [worker for worker in self.workers if not self._standings[worker.number].lost]
            if found:
                return found
            if not starting:
                raise self.none_left()
            time.sleep(0.1)

    @property
    def is_any_starting(self) -> bool:
        """Whether a worker of ours is on its way. One that does not listen in time is lost by the question."""
        with self._lock:
            self._notice_ends()
            return any(
                worker.is_ours and not self._listens(worker) and not self._standings[worker.number].lost
                for worker in self.workers
            )

    def generation(self, worker: WorkerHandle) -> int:
        """A number that changes whenever the worker is lost: what was arranged with it is of one generation."""
        return self._standings[worker.number].generation

    def updated(self, generations: Mapping[int, int], version: int) -> None:
        """From now on requests go to these workers, which have taken the weights `version` whole.

        Args:
            generations: worker -> the one that has: a worker that was lost since, and started again, has no weights.
        """
        with self._lock:
            self.version = version
            for number, generation in generations.items():
                if self._standings[number].generation == generation:
                    self._standings[number].version = version

    def mark_stale(self, worker: WorkerHandle, found: Sequence[int]) -> None:
        """A worker sampled with other weights than it should have: no more requests until its next update.

        Args:
            found: the versions that its answers carry.
        """
        with self._lock:
            self._standings[worker.number].version = None
        logger.error(
            "rollout worker %d sampled with %s instead of version %s: it gets no more requests before the next update",
            worker.number,
            whose_weights(found),
            self.version,
        )

    def mark_faulty(self, worker: WorkerHandle, fault: WorkerFault, *, generation: int) -> None:
        """An answer was not what was asked for: a worker that gives several of these in a row is lost.

        Args:
            generation: that was asked.

        Raises:
            WorkerGone: `on_lost_worker` is "stop".
        """
        with self._lock:
            standing = self._standings[worker.number]
            if standing.lost or generation != standing.generation:
                return
            standing.faults += 1
            if standing.faults < FAULTS_IN_A_ROW:
                return
            standing.is_lost_by_faults = True
            reason = f"{FAULTS_IN_A_ROW} wrong answers in a row, the last: {fault.detail}"
            self.lose(worker, reason, generation=generation)

    def mark_well(self, worker: WorkerHandle) -> None:
        """An answer was what was asked for."""
        self._standings[worker.number].faults = 0

    def lose(self, worker: WorkerHandle, reason: str, *, generation: int | None = None) -> None:
        """Leave a worker out that is dead, stuck or faulty; start it again where that is ours to do.

        Does not wait for that: a process may take its time to end.

        Args:
            generation: that was found dead or stuck: several requests may find out, and it may run again by then.

        Raises:
            WorkerGone: `on_lost_worker` is "stop".
        """
        with self._lock:
            standing = self._standings[worker.number]
            if standing.lost or self._is_closing or generation not in (None, standing.generation):
                return
            standing.version, standing.lost, standing.faults = None, reason, 0
            standing.last_lost = reason
            standing.generation += 1
            self.num_lost += 1
            logger.error("rollout worker %d is lost (%s); %s", worker.number, reason, worker.log_tail())
            if self._config.on_lost_worker == "stop":
                raise WorkerGone(f"rollout worker {worker.number} is lost ({reason}), and --on-lost-worker is stop")
            if standing.restarts < self._config.rollout_max_restarts and worker.is_ours:
                standing.restarts += 1
                standing.lost, standing.is_restarting = "", True
                self.num_restarted += 1
                logger.warning(
                    "rollout worker %d is started again (%d of %d times), and takes part after the next weight update",
                    worker.number,
                    standing.restarts,
                    self._config.rollout_max_restarts,
                )
                self._restarts = [thread for thread in self._restarts if thread.is_alive()]
                self._restarts.append(threading.Thread(target=self._restart, args=(worker,), daemon=True))
                self._restarts[-1].start()

    def _restart(self, worker: WorkerHandle) -> None:
        """In a thread of its own, without the lock: everybody else goes on meanwhile."""
        standing = self._standings[worker.number]
        failure = ""
        try:
            worker.restart()
        except (WorkerGone, OSError) as error:
            failure = f"it cannot be started again: {error}"
            logger.error("%s is lost: %s", name_of(worker), failure)
        with self._lock:
            standing.lost, standing.is_restarting, standing.started = failure, False, time.monotonic()
            standing.last_lost = failure or standing.last_lost
            is_closing = self._is_closing
        if is_closing:  # it may have been asked to end before it was started
            worker.terminate()

    def _is_ready(self, worker: WorkerHandle) -> bool:
        standing = self._standings[worker.number]
        is_there = bool(worker.url) and not standing.lost and not standing.is_restarting
        return is_there and standing.version == self.version

    def _notice_ends(self) -> None:
        for worker in self.workers:
            standing = self._standings[worker.number]
            if not standing.lost and not standing.is_restarting and worker.has_ended:
                self.lose(worker, "the process ended")

    def _listens(self, worker: WorkerHandle) -> bool:
        standing = self._standings[worker.number]
        if standing.is_restarting or (standing.lost and worker.is_ours):
            return False
        if standing.is_lost_by_faults and standing.lost and standing.restarts >= self._config.rollout_max_restarts:
            return False  # it is well by its own word, again and again
        try:
            listens = worker.poll()
        except (WorkerGone, WorkerFault) as error:
            self.lose(worker, str(error).partition(": the end of")[0])
            return False
        if not listens and worker.is_ours and time.monotonic() > standing.started + START_TIMEOUT_S:
            self.lose(worker, f"it did not start within {START_TIMEOUT_S:g} s")
        if listens and standing.lost:
            logger.warning("rollout worker %d answers again and is taken back", worker.number)
            standing.restarts += standing.is_lost_by_faults
            standing.lost, standing.is_lost_by_faults = "", False
        elif not listens and not worker.is_ours and not standing.lost:
            self.lose(worker, "it does not answer")
        return listens
