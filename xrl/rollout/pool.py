"""Many rollout workers: started, watched, left out when they die, and taken back with the next weights.

A worker's way, as the pool sees it:

    starting --listens--> stale --has taken an update--> ready --dies, hangs--> lost --started again--> starting
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
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from xrl.config import RolloutConfig
from xrl.launch import descriptors
from xrl.rollout import protocol
from xrl.rollout.access import Access, AccessDenied, WorkerInUse, new_key, new_run_id
from xrl.rollout.claims import trainers_key
from xrl.rollout.dispatch import Dispatch, RolloutCounts
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


# Errors of a worker that are not the run's: its side of the transport broke, or it is another run's by now.
COSTS_THE_WORKER = frozenset(kind.__name__ for kind in (TransportError, AccessDenied, WorkerInUse))


@dataclass
class _Standing:
    """What the pool knows of a worker."""

    version: int | None = None  # of the weights that it took whole
    lost: str = ""  # why it is left out
    life: int = 0  # counts its starts and losses: a connection is of one life
    started: float = field(default_factory=time.monotonic)
    restarts: int = 0


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
        access: Access | None = None,
    ) -> None:
        """
        Args:
            config: with `worker_addresses`, those workers are used and none is started.
            devices: torch device of each worker to start; their number is the number of workers.
            num_threads: CPU threads of each worker.
            max_model_len: longest prompt + response in tokens.
            log_dir: each worker's output goes to a file here.
            access: who we are to the workers; default: a run of its own, with a key of its own or, for workers that
                somebody started, with that of their file.
        """
        self.config = config
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
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-pool", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self._keeping: Future[None] | None = None
        # As many connections as may be open at once, shared out: a connection is kept for a while after its request.
        self._connections_per_worker: int | None = None
        self._has_said_bound = False
        self._dispatch: Dispatch | None = None  # of the last call of `generate`
        # Publishes the current weights once more, in the thread that calls `generate`: for when no worker is ready, and
        # one that is started again, or has other weights, could be. Without it, the loss of the last one is the end.
        self.recover: Callable[[], None] | None = None

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
        if self._keeping is not None:
            self._keeping.cancel()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            if self._session is not None:
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
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
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
            raise WorkerGone(f"no rollout worker is left{self._reasons()}; {self.workers[-1].log_tail()}")
        return alive

    def ready(self) -> list[WorkerHandle]:
        """As `alive`, or none."""
        with self._lock:
            self._notice_ends()
            return [worker for worker in self.workers if self._is_ready(worker)]

    @property
    def can_recover(self) -> bool:
        """Whether `recover` may make a worker ready: one that is not lost."""
        with self._lock:
            return self.recover is not None and any(not standing.lost for standing in self._standings.values())

    def reachable(self) -> list[WorkerHandle]:
        """Workers that listen, whatever weights they have; waits for one to start where there is none.

        Raises:
            WorkerGone: none listens and none starts.
        """
        self.wait_until_ready()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with self._lock:
                self._notice_ends()
                found = [worker for worker in self.workers if self._listens(worker)]
                starting = [worker for worker in self.workers if not self._standings[worker.number].lost]
            if found:
                return found
            if not starting or time.monotonic() > deadline:
                raise WorkerGone(f"no rollout worker is left{self._reasons()}; {self.workers[-1].log_tail()}")
            time.sleep(0.1)

    def wait_until_ready(self) -> None:
        """At the start: wait until every worker listens.

        Raises:
            RuntimeError: one ended or did not start in time.
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

    def updated(self, workers: Sequence[WorkerHandle], version: int) -> None:
        """From now on requests go to these workers, which have taken the weights `version` whole."""
        with self._lock:
            self.version = version
            for worker in workers:
                self._standings[worker.number].version = version

    def found_stale(self, worker: WorkerHandle, found: Sequence[int]) -> None:
        """A worker sampled with other weights than it should have: no more requests until its next update."""
        with self._lock:
            self._standings[worker.number].version = None
        logger.error(
            "rollout worker %d sampled with weights version %s instead of %s: it gets no more requests before the next "
            "update",
            worker.number,
            ", ".join(map(str, found)),
            self.version,
        )

    def lose(self, worker: WorkerHandle, reason: str, *, life: int | None = None) -> None:
        """Leave a worker out that is dead or stuck; start it again where that is ours to do.

        Args:
            life: in which it was found dead or stuck: several requests may find out, and it may run again by then.

        Raises:
            WorkerGone: `on_lost_worker` is "stop".
        """
        with self._lock:
            standing = self._standings[worker.number]
            if standing.lost or self._is_closing or life not in (None, standing.life):
                return
            standing.version, standing.lost = None, reason
            standing.life += 1
            self.num_lost += 1
            logger.error("rollout worker %d is lost (%s); %s", worker.number, reason, worker.log_tail())
            if self.config.on_lost_worker == "stop":
                raise WorkerGone(f"rollout worker {worker.number} is lost ({reason}), and --on-lost-worker is stop")
            if standing.restarts < self.config.rollout_max_restarts and worker.restart():
                standing.restarts += 1
                standing.lost, standing.started = "", time.monotonic()
                self.num_restarted += 1
                logger.warning(
                    "rollout worker %d is started again (%d of %d times), and takes part after the next weight update",
                    worker.number,
                    standing.restarts,
                    self.config.rollout_max_restarts,
                )

    def generate(
        self, requests: Sequence[GenerateRequest], counts: RolloutCounts
    ) -> Iterator[tuple[int, list[Completion] | None]]:
        """Yield each request's place and completions as they finish; None for one whose tries are spent.

        Requests still running when the iterator is closed are aborted.

        Raises:
            WorkerGone: the last worker died.
        """
        self.wait_until_ready()
        dispatch = self._dispatch = Dispatch(self, counts)
        running = self.start(dispatch.run(requests))
        try:
            for _ in requests:
                yield dispatch.next_result()
        finally:
            running.cancel()

    def ask_all(self, body: Any, *, timeout_s: float) -> list[tuple[WorkerHandle, Any]]:
        """Every ready worker's answer to the same `/generate` call; a worker that does not answer is lost.

        Raises:
            RuntimeError: a worker refused: names it.
            WorkerGone: no worker is left.
        """

        async def ask(worker: WorkerHandle) -> tuple[WorkerHandle, Any] | None:
            life = self.life(worker)
            try:
                return worker, await self.post(worker, protocol.GENERATE, body, timeout_s=timeout_s)
            except (WorkerGone, TimeoutError) as error:
                self.lose(worker, str(error), life=life)
                return None
            except RuntimeError as error:
                raise RuntimeError(f"rollout worker {worker.number}: {error}") from error

        async def ask_everyone() -> list[tuple[WorkerHandle, Any] | None]:
            return await asyncio.gather(*map(ask, self.alive))

        answers = self.start(ask_everyone()).result()
        _ = self.alive
        return [answer for answer in answers if answer is not None]

    def sleep(self) -> None:
        """Have every worker give its device to the actor, weights and all: an update comes before the next request.

        Waits for workers that are starting: they must not take the device while the actor uses it.

        Raises:
            RuntimeError: a worker refused: names it.
            WorkerGone: no worker is left.
        """
        while self._is_any_starting():
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
                isinstance(worker, WorkerProcess)
                and not self._listens(worker)
                and not self._standings[worker.number].lost
                for worker in self.workers
            )

    def _tell_all(self, path: str) -> None:
        async def tell(worker: WorkerHandle) -> None:
            life = self.life(worker)
            try:
                await self.post(worker, path, {}, timeout_s=TURN_TIMEOUT_S)
            except (WorkerGone, TimeoutError) as error:
                self.lose(worker, str(error), life=life)
            except RuntimeError as error:
                raise RuntimeError(f"rollout worker {worker.number}: {error}") from error

        async def tell_everyone() -> None:
            await asyncio.gather(*map(tell, workers))

        workers = self.reachable()
        self.start(tell_everyone()).result()

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

    async def post(self, worker: WorkerHandle, path: str, body: Any, *, timeout_s: float) -> Any:
        """One call of a worker; its answer.

        Raises:
            WorkerGone: it cannot be reached, or its side of the weights' transport broke.
            TimeoutError: no answer in time.
            RuntimeError: it refused.
        """
        try:
            async with self._http().post(
                worker.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                answer = await response.json()
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {path} within {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise WorkerGone(f"{path}: {error or type(error).__name__}") from error
        if response.status != 200:
            refusal = f"{answer.get('type')}: {answer.get('error')}"
            # What breaks between the two costs the worker, not the run.
            raise WorkerGone(refusal) if answer.get("type") in COSTS_THE_WORKER else RuntimeError(refusal)
        return answer

    def _http(self) -> aiohttp.ClientSession:
        """Only in the pool's thread."""
        if self._session is None:
            # Every request in flight keeps a connection of its own: `max_requests` bounds them. A bound here would let
            # the time of a request run while it waits for a connection.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=dict(self.access.headers)
            )
        return self._session

    async def answers(self, worker: WorkerHandle) -> bool:
        """Whether a worker says that it is well."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._http().get(worker.url + protocol.HEALTH, timeout=timeout) as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return False

    def _is_ready(self, worker: WorkerHandle) -> bool:
        standing = self._standings[worker.number]
        return bool(worker.url) and not standing.lost and standing.version == self.version

    def _notice_ends(self) -> None:
        for worker in self.workers:
            if not self._standings[worker.number].lost and worker.has_ended:
                self.lose(worker, "the process ended")

    def _listens(self, worker: WorkerHandle) -> bool:
        standing = self._standings[worker.number]
        is_process = isinstance(worker, WorkerProcess)
        if standing.lost and is_process:
            return False
        try:
            listens = worker.poll()
        except RuntimeError as error:
            self.lose(worker, str(error).partition(":")[0])
            return False
        if not listens and is_process and time.monotonic() > standing.started + START_TIMEOUT_S:
            self.lose(worker, f"it did not start within {START_TIMEOUT_S:g} s")
        if listens and standing.lost:
            logger.warning("rollout worker %d answers again and is taken back", worker.number)
            standing.lost = ""
        elif not listens and not is_process and not standing.lost:
            self.lose(worker, "it does not answer")
        return listens

    def _reasons(self) -> str:
        lost = [f"{number}: {standing.lost}" for number, standing in self._standings.items() if standing.lost]
        return f" ({'; '.join(lost)})" if lost else ""
