"""How a trainer talks to its rollout workers: HTTP, from one thread of its own, with what is answered checked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from xrl.launch import descriptors
from xrl.launch.exit import RunFailed
from xrl.rollout import protocol
from xrl.rollout.access import Access, AccessDenied, WorkerInUse
from xrl.rollout.answers import (
    SMALL_ANSWER_BYTES,
    WeightsId,
    WorkerFault,
    WorkerRefused,
    checked_completions,
    checked_refusal,
    completions_limit,
    name_of,
    read_answer,
    shown,
)
from xrl.rollout.lease import KEEP_ALIVE_S
from xrl.rollout.process import WorkerGone, WorkerHandle
from xrl.types import Completion, GenerateRequest
from xrl.weights.transport import TransportError

logger = logging.getLogger("xrl")
T = TypeVar("T")

# A worker answers for its health beside whatever its engine does.
HEALTH_TIMEOUT_S = 10.0
# What the client's thread adds to the time-outs of what it is asked to do, on a busy machine.
SLACK_S = 60.0
# Errors of a worker that are not the run's: its side of the transport broke, or it is another run's by now.
COSTS_THE_WORKER = frozenset(kind.__name__ for kind in (TransportError, AccessDenied, WorkerInUse))


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that is not answered yet."""

    worker: str
    path: str
    since: float


class Client:
    """Calls workers. Coroutines run in its thread: `start` and `wait_for` bring them there."""

    def __init__(self, access: Access, *, vocab_size: int, num_workers: int) -> None:
        """
        Args:
            access: who we are to the workers.
            vocab_size: answers hold ids in [0, vocab_size).
            num_workers: that share the connections which may be open at once.
        """
        self.access = access
        self.vocab_size = vocab_size
        self.num_workers = num_workers
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self._keeping: Future[None] | None = None
        # As many connections as may be open at once, shared out: a connection is kept for a while after its request.
        self._connections_per_worker: int | None = None
        self._has_said_bound = False
        self._calls: dict[int, _Call] = {}  # that are not answered yet; read by any thread
        self._call_numbers = itertools.count()

    def stop_keeping(self) -> None:
        """Say no more to workers that `keep` tells that we are there."""
        if self._keeping is not None:
            self._keeping.cancel()

    def close(self, timeout_s: float) -> None:
        """End the thread, and the connections. Waits so long for each of the two; a second time does nothing."""
        self.stop_keeping()
        if self._thread.is_alive():
            if self._session is not None:
                with contextlib.suppress(TimeoutError):  # the thread hangs, and ends with the process
                    asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(timeout_s)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)

    def start(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        """Run a coroutine in the client's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait_for(self, coroutine: Coroutine[object, object, T], *, timeout_s: float, doing: str) -> T:
        """Run a coroutine in the client's thread, and wait for its end.

        Args:
            timeout_s: the time-outs within it; the client's thread gets SLACK_S more.
            doing: what is waited for.

        Raises:
            RunFailed: it has not ended by then.
        """
        return self.result_of(self.start(coroutine), timeout_s=timeout_s, doing=doing)

    def result_of(self, running: Future[T], *, timeout_s: float, doing: str) -> T:
        """Wait for what `start` has started, as `wait_for` does."""
        # Twice: where this process was stopped for a while, its other thread was too, and has just gone on.
        for limit_s in (timeout_s + SLACK_S, SLACK_S):
            if not wait([running], timeout=limit_s).not_done:
                return running.result()  # Unbounded: it is done.
        running.cancel()
        raise RunFailed(
            f"{doing}: the thread that asks the rollout workers has not come to an end within "
            f"{timeout_s + 2 * SLACK_S:g} s"
        )

    def keep(self, workers: Sequence[WorkerHandle]) -> None:
        """Tell these workers from now on that we are still there, until `stop_keeping`.

        An update of the actor takes longer than they wait for a word.
        """
        if workers and self._keeping is None:
            self._keeping = self.start(self._keep(workers))

    async def _keep(self, workers: Sequence[WorkerHandle]) -> None:
        async def tell(worker: WorkerHandle) -> None:
            timeout = aiohttp.ClientTimeout(total=KEEP_ALIVE_S)
            with contextlib.suppress(OSError, aiohttp.ClientError):  # time is up, too
                async with self._http().get(worker.url + protocol.LEASE, timeout=timeout):
                    pass

        while True:
            await asyncio.gather(*map(tell, workers))
            await asyncio.sleep(KEEP_ALIVE_S)

    async def completions(
        self, worker: WorkerHandle, request: GenerateRequest, *, version: int | None, timeout_s: float
    ) -> list[Completion]:
        """A worker's answer to a request, checked.

        Args:
            version: of this run's weights that are to have sampled it; None: any.

        Raises:
            StaleAnswer: other weights have.
            WorkerGone, TimeoutError, WorkerFault, WorkerRefused: as `post`.
        """
        weights = None if version is None else WeightsId(run_id=self.access.run_id, version=version)
        answer = await self.post(
            worker,
            protocol.GENERATE,
            protocol.request_to_json(request),
            timeout_s=timeout_s,
            limit_bytes=completions_limit(request),
        )
        return checked_completions(answer, request, worker=name_of(worker), vocab_size=self.vocab_size, weights=weights)

    async def post(
        self,
        worker: WorkerHandle,
        path: str,
        body: Mapping[str, object],
        *,
        timeout_s: float,
        limit_bytes: int = SMALL_ANSWER_BYTES,
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
        call = next(self._call_numbers)
        self._calls[call] = _Call(worker=name, path=path, since=time.monotonic())
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
        finally:
            del self._calls[call]
        if response.status != 200:
            kind, sentence = checked_refusal(answer, worker=name)
            # What breaks between the two costs the worker, not the run.
            if kind in COSTS_THE_WORKER:
                raise WorkerGone(f"{kind}: {sentence}")
            raise WorkerRefused(name, f"{kind}: {sentence}")
        return answer

    def waits_for(self) -> str:
        """Which calls are not answered yet and for how long, "32 answers to /generate of rollout worker 1
        (10.0.0.2:7000), the longest for 40 s": for people, from any thread."""
        since: dict[str, list[float]] = {}
        for call in list(self._calls.values()):
            since.setdefault(f"to {call.path} of {call.worker}", []).append(call.since)
        now = time.monotonic()
        return "; ".join(
            f"{len(times)} answers {which}, the longest for {now - min(times):.0f} s"
            for which, times in sorted(since.items())
        )

    async def is_well(self, worker: WorkerHandle) -> bool:
        """Whether a worker says that it is well."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._http().get(
                worker.url + protocol.HEALTH, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except (OSError, aiohttp.ClientError):  # time is up, too
            return False

    def _http(self) -> aiohttp.ClientSession:
        """Only in the client's thread."""
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

    def max_requests(self, worker: WorkerHandle) -> int:
        """How many requests may be at a worker at once: each is a connection, an open file here and one there."""
        if self._connections_per_worker is None:
            self._connections_per_worker = max(1, descriptors.spare_connections() // self.num_workers)
        theirs = worker.max_requests
        return self._connections_per_worker if theirs is None else min(self._connections_per_worker, theirs)

    def say_bound(self, worker: WorkerHandle) -> None:
        """Warn, once a run, that the limit of open files holds requests back."""
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
