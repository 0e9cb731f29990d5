"""Many rollout workers: started, watched, left out when they die, and taken back with the next weights.

A worker's way, as the pool sees it:

    starting --listens--> stale --has taken an update--> ready --dies, hangs, lies--> lost --started again--> starting
                            ^                              |
                            +----- has other weights ------+

Requests go to ready workers only, updates to stale and ready ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from xrl.config import RolloutConfig
from xrl.launch import descriptors
from xrl.launch.exit import RunFailed
from xrl.models.shape import read_model_shape
from xrl.rollout import protocol
from xrl.rollout.access import Access, AccessDenied, WorkerInUse, new_key, new_run_id
from xrl.rollout.answers import (
    SMALL_ANSWER_BYTES,
    StaleAnswer,
    WeightsId,
    WorkerFault,
    WorkerRefused,
    check_done,
    checked_completions,
    checked_refusal,
    completions_limit,
    name_of,
    read_answer,
    shown,
    whose_weights,
)
from xrl.rollout.claims import trainers_key
from xrl.rollout.dispatch import Dispatch, NoneReady, RolloutCounts
from xrl.rollout.lease import KEEP_ALIVE_S
from xrl.rollout.process import RemoteWorker, WorkerGone, WorkerHandle, WorkerProcess
from xrl.types import Completion, GenerateRequest
from xrl.weights.transport import TransportError

__all__ = ["RolloutCounts", "WorkerGone", "WorkerPool"]

logger = logging.getLogger("xrl")
T = TypeVar("T")

START_TIMEOUT_S = 120.0
# A worker answers for its health beside whatever its engine does.
HEALTH_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3.0
# Sleeping and waking move weights and caches, and build what the device computes with.
TURN_TIMEOUT_S = 120.0
# One wrong answer may be a slip of memory or network; so many in a row are not.
FAULTS_IN_A_ROW = 3
# What the pool's thread adds to the time-outs of what it is asked to do, on a busy machine.
SLACK_S = 60.0


# Errors of a worker that are not the run's: its side of the transport broke, or it is another run's by now.
COSTS_THE_WORKER = frozenset(kind.__name__ for kind in (TransportError, AccessDenied, WorkerInUse))


@dataclass
class _Standing:
    """What the pool knows of a worker."""

    version: int | None = None  # of the weights that it took whole
    lost: str = ""  # why it is left out
    last_lost: str = ""  # the same, of the last time: it may have been started again
    life: int = 0  # counts its starts and losses: a connection is of one life
    started: float = field(default_factory=time.monotonic)
    restarts: int = 0
    is_restarting: bool = False  # in a thread of its own: its process may take time to end
    faults: int = 0  # wrong answers in a row
    is_lost_by_faults: bool = False


class WorkerPool:
    """Starts workers, talks to them from a thread of its own, and ends them on the way out."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_dir: Path,
        dtype: str,
        devices: Sequence[str],
        num_threads: int,
        max_model_len: int,
        log_dir: Path,
        vocab_size: int | None = None,
        access: Access | None = None,
    ) -> None:
        """
        Args:
            config: with `worker_addresses`, those workers are used and none is started.
            devices: torch device of each worker to start; their number is the number of workers.
            num_threads: CPU threads of each worker.
            max_model_len: longest prompt + response in tokens.
            log_dir: each worker's output goes to a file here.
            vocab_size: answers hold ids in [0, vocab_size); default: as the model's config.json says.
            access: who we are to the workers; default: a run of its own, with a key of its own or, for workers that
                somebody started, with that of their file.
        """
        self.config = config
        self.vocab_size = read_model_shape(model_dir).vocab_size if vocab_size is None else vocab_size
        self.access = access or Access(
            key=trainers_key(config.rollout_worker_key_file) if config.worker_addresses else new_key(),
            run_id=new_run_id(log_dir.parent.name),
        )
        arguments = [
            f"--engine={config.engine}",
            f"--model={model_dir}",
            f"--dtype={dtype}",
            f"--max-batch-size={config.rollout_max_batch_size}",
            f"--num-threads={num_threads}",
            f"--max-model-len={max_model_len}",
        ]
        self.workers: list[Any] = [
            RemoteWorker(number, host, port, access=self.access)
            for number, (host, port) in enumerate(config.worker_addresses)
        ] or [
            WorkerProcess(
                number,
                [*arguments, f"--device={device}"],
                key=self.access.key,
                num_threads=num_threads,
                log=log_dir / f"rollout_worker_{number}.log",
                python=config.rollout_python,
            )
            for number, device in enumerate(devices)
        ]
        self.version: int | None = None  # of the weights that a ready worker has; None before the first update
        self.num_lost = 0  # workers lost since the start, each as often as it was
        self.num_restarted = 0
        self._standings = {worker.number: _Standing() for worker in self.workers}
        self._lock = threading.RLock()  # around the standings: both threads look at them
        self._has_started = self._is_closing = False
        self._restarts: list[threading.Thread] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-pool", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self._keeping: Future[None] | None = None
        # As many connections as may be open at once, shared out: a connection is kept for a while after its request.
        self._connections_per_worker: int | None = None
        self._has_said_bound = False
        self._dispatch: Dispatch | None = None  # of the last call of `generate`

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker that was started here, whatever state it is in."""
        with self._lock:
            self._is_closing = True
        for restart in self._restarts:
            restart.join(STOP_TIMEOUT_S)
        if self._keeping is not None:
            self._keeping.cancel()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            if self._session is not None:
                with contextlib.suppress(TimeoutError):  # the thread hangs, and ends with the process
                    asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(STOP_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)

    @property
    def headers(self) -> Mapping[str, str]:
        """What every call of a worker shows, for calls by hand."""
        return self.access.headers

    def claim(self) -> None:
        """Workers that somebody started are this run's from now on, those that answer by now; `close` gives them back.

        Raises:
            SettingsError: another run has one, or its key is another one.
        """
        remote = [worker for worker in self.workers if isinstance(worker, RemoteWorker)]
        for worker in remote:
            worker.claim()
        if remote and self._keeping is None:
            self._keeping = self.start(self._keep(remote))

    async def _keep(self, workers: Sequence[RemoteWorker]) -> None:
        """Tell them that we are still there: an update of the actor takes longer than they wait for a word."""

        async def tell(worker: RemoteWorker) -> None:
            timeout = aiohttp.ClientTimeout(total=KEEP_ALIVE_S)
            with contextlib.suppress(OSError, aiohttp.ClientError):  # time is up, too
                async with self._http().get(worker.url + protocol.LEASE, timeout=timeout):
                    pass

        while True:
            await asyncio.gather(*map(tell, workers))
            await asyncio.sleep(KEEP_ALIVE_S)

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
        """As `alive`, or none."""
        with self._lock:
            self._notice_ends()
            return [worker for worker in self.workers if self._is_ready(worker)]

    def is_any_left(self) -> bool:
        """Whether an update may make a worker ready: one that is not lost."""
        with self._lock:
            return any(not standing.lost for standing in self._standings.values())

    def reachable(self) -> list[WorkerHandle]:
        """Workers that listen, whatever weights they have; waits for one to start where there is none.

        Each start has START_TIMEOUT_S, and each worker only so many.

        Raises:
            WorkerGone: none listens and none starts.
        """
        self.wait_until_ready()
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

    def wait_until_ready(self) -> None:
        """At the start: wait until every worker listens.

        Raises:
            WorkerGone: one ended or did not start in time.
            WorkerFault: what is at its address is no worker.
        """
        if self._has_started:
            return
        self.claim()
        for worker in self.workers:
            worker.wait_until_listening(START_TIMEOUT_S)
        self._has_started = True

    def life(self, worker: WorkerHandle) -> int:
        """A number that changes whenever the worker is lost: what was arranged with it is of one life."""
        return self._standings[worker.number].life

    def updated(self, lives: Mapping[int, int], version: int) -> None:
        """From now on requests go to these workers, which have taken the weights `version` whole.

        Args:
            lives: worker -> the life in which it has: one that was lost since, and started again, has no weights.
        """
        with self._lock:
            self.version = version
            for number, life in lives.items():
                if self._standings[number].life == life:
                    self._standings[number].version = version

    def found_stale(self, worker: WorkerHandle, found: Sequence[int]) -> None:
        """A worker sampled with other weights than it should have: no more requests until its next update."""
        with self._lock:
            self._standings[worker.number].version = None
        logger.error(
            "rollout worker %d sampled with %s instead of version %s: it gets no more requests before the next update",
            worker.number,
            whose_weights(found),
            self.version,
        )

    def found_faulty(self, worker: WorkerHandle, fault: WorkerFault, *, life: int) -> None:
        """An answer was not what was asked for: a worker that gives several of these in a row is lost.

        Raises:
            WorkerGone: `on_lost_worker` is "stop".
        """
        with self._lock:
            standing = self._standings[worker.number]
            if standing.lost or life != standing.life:
                return
            standing.faults += 1
            if standing.faults < FAULTS_IN_A_ROW:
                return
            standing.is_lost_by_faults = True
            self.lose(worker, f"{FAULTS_IN_A_ROW} wrong answers in a row, the last: {fault.detail}", life=life)

    def found_well(self, worker: WorkerHandle) -> None:
        """An answer was what was asked for."""
        self._standings[worker.number].faults = 0

    def lose(self, worker: WorkerHandle, reason: str, *, life: int | None = None) -> None:
        """Leave a worker out that is dead, stuck or faulty; start it again where that is ours to do.

        Does not wait for that: a process may take its time to end.

        Args:
            life: in which it was found dead or stuck: several requests may find out, and it may run again by then.

        Raises:
            WorkerGone: `on_lost_worker` is "stop".
        """
        with self._lock:
            standing = self._standings[worker.number]
            if standing.lost or self._is_closing or life not in (None, standing.life):
                return
            standing.version, standing.lost, standing.faults = None, reason, 0
            standing.last_lost = reason
            standing.life += 1
            self.num_lost += 1
            logger.error("rollout worker %d is lost (%s); %s", worker.number, reason, worker.log_tail())
            if self.config.on_lost_worker == "stop":
                raise WorkerGone(f"rollout worker {worker.number} is lost ({reason}), and --on-lost-worker is stop")
            if standing.restarts < self.config.rollout_max_restarts and worker.can_restart:
                standing.restarts += 1
                standing.lost, standing.is_restarting = "", True
                self.num_restarted += 1
                logger.warning(
                    "rollout worker %d is started again (%d of %d times), and takes part after the next weight update",
                    worker.number,
                    standing.restarts,
                    self.config.rollout_max_restarts,
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

    def generate(
        self, requests: Sequence[GenerateRequest], counts: RolloutCounts, *, may_update: bool = False
    ) -> Iterator[tuple[int, list[Completion] | None] | NoneReady]:
        """Yield each request's place and completions as they finish; None for one whose tries are spent.

        Requests still running when the iterator is closed are aborted.

        Args:
            may_update: as in `Dispatch`.

        Raises:
            WorkerGone: the last worker died.
        """
        self.wait_until_ready()
        dispatch = self._dispatch = Dispatch(self, counts, may_update=may_update)
        running = self.start(dispatch.run(requests))
        try:
            num_left = len(requests)
            while num_left:
                result = dispatch.next_result()
                num_left -= not isinstance(result, NoneReady)
                yield result
        finally:
            running.cancel()

    def ask_all(self, request: GenerateRequest, *, timeout_s: float) -> list[tuple[WorkerHandle, list[Completion]]]:
        """Every ready worker's completions; one that does not answer, or wrongly, is lost. None where none is ready.

        Raises:
            WorkerRefused: a worker cannot.
            WorkerGone: one is lost, and `on_lost_worker` is "stop".
        """

        async def ask(worker: WorkerHandle) -> tuple[WorkerHandle, list[Completion]] | None:
            life = self.life(worker)
            try:
                return worker, await self.completions(worker, request, timeout_s=timeout_s)
            except StaleAnswer as error:
                self.found_stale(worker, error.versions)
            except WorkerFault as error:
                self.lose(worker, error.detail, life=life)
            except (WorkerGone, TimeoutError) as error:
                self.lose(worker, str(error), life=life)
            return None

        async def ask_everyone() -> list[tuple[WorkerHandle, list[Completion]] | None]:
            return await asyncio.gather(*map(ask, self.ready()))

        answers = self.wait_for(ask_everyone(), timeout_s=timeout_s, doing=f"answers to {request.id}")
        return [answer for answer in answers if answer is not None]

    async def completions(
        self, worker: WorkerHandle, request: GenerateRequest, *, timeout_s: float
    ) -> list[Completion]:
        """A worker's answer to a request, checked. Raises as `post`, and StaleAnswer."""
        weights = None if self.version is None else WeightsId(run_id=self.access.run_id, version=self.version)
        answer = await self.post(
            worker,
            protocol.GENERATE,
            protocol.request_to_json(request),
            timeout_s=timeout_s,
            limit_bytes=completions_limit(request),
        )
        return checked_completions(answer, request, worker=name_of(worker), vocab_size=self.vocab_size, weights=weights)

    def sleep(self) -> None:
        """Have every worker give its device to the actor, weights and all: an update comes before the next request.

        Waits for workers that are starting: they must not take the device while the actor uses it.

        Raises:
            WorkerRefused: a worker cannot.
            WorkerGone: no worker is left.
        """
        while self._is_any_starting():  # START_TIMEOUT_S at most
            time.sleep(0.1)
        self._tell_all(f"{protocol.SLEEP}?level=2")

    def wake(self) -> None:
        """The opposite: each engine takes what memory it wants. Raises as `sleep`."""
        self._tell_all(protocol.WAKE)

    def _is_any_starting(self) -> bool:
        with self._lock:
            self._notice_ends()
            # One that does not listen in time is lost by being asked.
            return any(
                worker.can_restart and not self._listens(worker) and not self._standings[worker.number].lost
                for worker in self.workers
            )

    def _tell_all(self, path: str) -> None:
        async def tell(worker: WorkerHandle) -> None:
            life = self.life(worker)
            try:
                check_done(await self.post(worker, path, {}, timeout_s=TURN_TIMEOUT_S), worker=name_of(worker))
            except WorkerFault as error:
                self.lose(worker, f"{path}: {error.detail}", life=life)
            except (WorkerGone, TimeoutError) as error:
                self.lose(worker, str(error), life=life)

        async def tell_everyone() -> None:
            await asyncio.gather(*map(tell, workers))

        workers = self.reachable()
        self.wait_for(tell_everyone(), timeout_s=TURN_TIMEOUT_S, doing=path)

    def cut_short(self) -> None:
        """End the rollout that `generate` is at: what is left of it comes back at once, as it is."""
        if self._dispatch is not None:
            self.start(self._dispatch.cut_short())

    def max_requests(self, worker: WorkerHandle) -> int:
        """How many requests may be at a worker at once: each is a connection, an open file here and one there."""
        if self._connections_per_worker is None:
            self._connections_per_worker = max(1, descriptors.spare_connections() // len(self.workers))
        theirs = worker.max_requests
        return self._connections_per_worker if theirs is None else min(self._connections_per_worker, theirs)

    def say_bound(self, worker: WorkerHandle) -> None:
        """Once a run: open files are what holds requests back."""
        if self._has_said_bound:
            return
        self._has_said_bound = True
        most, ours = self.max_requests(worker), self._connections_per_worker
        whose = (
            f"{descriptors.limit():,} of this process" if most == ours else f"that of rollout worker {worker.number}"
        )
        logger.warning(
            "a rollout worker gets at most %s requests at a time, fewer than it could decode, because of the limit of "
            "open files (%s): raise the hard limit, `ulimit -H -n`, for more speed",
            f"{most:,}",
            whose,
        )

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait_for(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float, doing: str) -> T:
        """Run it in the pool's thread, and wait for its end.

        Args:
            timeout_s: the time-outs within it; the pool's thread gets SLACK_S more.
            doing: what is waited for.

        Raises:
            RunFailed: it has not ended by then.
        """
        return self.result_of(self.start(coroutine), timeout_s=timeout_s, doing=doing)

    def result_of(self, running: Future[T], *, timeout_s: float, doing: str) -> T:
        """As `wait_for`, of what was started before."""
        # Twice: where this process was stopped for a while, its other thread was too, and has just gone on.
        for limit_s in (timeout_s + SLACK_S, SLACK_S):
            if not wait([running], timeout=limit_s).not_done:
                return running.result()  # Unbounded: it is done.
        running.cancel()
        raise RunFailed(
            f"{doing}: the thread that asks the rollout workers has not come to an end within "
            f"{timeout_s + 2 * SLACK_S:g} s"
        )

    async def post(
        self, worker: WorkerHandle, path: str, body: Any, *, timeout_s: float, limit_bytes: int = SMALL_ANSWER_BYTES
    ) -> object:
        """One call of a worker; its answer as `read_answer` gives it, not checked any further.

        Args:
            limit_bytes: of the answer.

        Raises:
            WorkerGone: it cannot be reached, or its side of the weights' transport broke.
            TimeoutError: no answer in time.
            WorkerFault: the answer is neither JSON nor completions as arrays, or too long.
            WorkerRefused: it cannot do that.
        """
        name = name_of(worker)
        try:
            async with self._http().post(
                worker.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s), allow_redirects=False
            ) as response:
                answer = await read_answer(response, limit_bytes=limit_bytes, worker=name)
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {path} within {timeout_s:g} s") from error
        except aiohttp.ClientResponseError as error:
            raise WorkerFault(name, f"{path}: the answer is no HTTP: {shown(error.message)}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerGone(f"{path}: {error or type(error).__name__}") from error
        if response.status != 200:
            kind, sentence = checked_refusal(answer, worker=name)
            # What breaks between the two costs the worker, not the run.
            if kind in COSTS_THE_WORKER:
                raise WorkerGone(f"{kind}: {sentence}")
            raise WorkerRefused(name, f"{kind}: {sentence}")
        return answer

    def _http(self) -> aiohttp.ClientSession:
        """Only in the pool's thread."""
        if self._session is None:
            # Every request in flight keeps a connection of its own: `max_requests` bounds them. A bound here would let
            # the time of a request run while it waits for a connection. Nothing that a worker answers makes us ask
            # somebody else, remember something or unpack more than was sent.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", **self.access.headers},
            )
        return self._session

    async def answers(self, worker: WorkerHandle) -> bool:
        """Whether a worker says that it is well."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._http().get(
                worker.url + protocol.HEALTH, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except (OSError, aiohttp.ClientError):  # time is up, too
            return False

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
        if standing.is_restarting or (standing.lost and worker.can_restart):
            return False
        if standing.is_lost_by_faults and standing.lost and standing.restarts >= self.config.rollout_max_restarts:
            return False  # it is well by its own word, again and again
        try:
            listens = worker.poll()
        except (WorkerGone, WorkerFault) as error:
            self.lose(worker, str(error).partition(": the end of")[0])
            return False
        if not listens and worker.can_restart and time.monotonic() > standing.started + START_TIMEOUT_S:
            self.lose(worker, f"it did not start within {START_TIMEOUT_S:g} s")
        if listens and standing.lost:
            logger.warning("rollout worker %d answers again and is taken back", worker.number)
            standing.restarts += standing.is_lost_by_faults
            standing.lost, standing.is_lost_by_faults = "", False
        elif not listens and not worker.can_restart and not standing.lost:
            self.lose(worker, "it does not answer")
        return listens
