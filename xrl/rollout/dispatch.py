"""The requests of one rollout over the ready workers: the least loaded takes the next, what fails goes elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from xrl.config import RolloutConfig
from xrl.launch.exit import RunFailed
from xrl.rollout import protocol
from xrl.rollout.answers import StaleAnswer, WorkerFault, WorkerRefused, name_of
from xrl.rollout.client import Client
from xrl.rollout.process import WorkerGone, WorkerHandle
from xrl.rollout.roster import Roster
from xrl.types import Completion, GenerateRequest

logger = logging.getLogger("xrl")

# A request's place, and its completions; None where its tries are spent.
Answered: TypeAlias = tuple[int, list[Completion] | None]

# Sequences sent to a worker beyond what it decodes at once, so that it never waits for the next.
QUEUE_AHEAD = 1.25
# An abort is answered at once, or not at all.
ABORT_TIMEOUT_S = 5.0
ABORT_AGAIN_S = 0.1
# Between looks at whether those that are to answer are still at it.
LOOK_S = 30.0
# Between calls of what the caller does meanwhile.
WAIT_S = 0.5


@dataclass
class RolloutCounts:
    """What became of the requests of one rollout."""

    sent: int = 0  # requests asked for
    finished: int = 0
    failed: int = 0  # given up after the last retry
    retried: int = 0  # tries after the first, all requests together
    stale: int = 0  # answers refused because other weights had sampled them
    unfinished: int = 0  # cut off, to go on in the next rollout
    why_failed: str = field(default="", compare=False)  # the last try of the first request that was given up


@dataclass(frozen=True)
class NoneReady:
    """In the place of an answer: no worker can be asked, and one may be again with the weights of an update."""


@dataclass
class _Load:
    """What a worker has been given and not finished."""

    requests: int = 0
    sequences: int = 0
    tokens: int = 0


class Dispatch:
    """One rollout. `run` in the client's thread, `next_result` in the caller's."""

    def __init__(
        self, roster: Roster, client: Client, config: RolloutConfig, counts: RolloutCounts, *, updates: bool
    ) -> None:
        """
        Args:
            roster: who is ready.
            client: asks them.
            config: time-outs, tries, and sequences that a worker decodes at once.
            counts: filled as requests end.
            updates: whether the caller publishes weights anew at NoneReady.
        """
        self.roster = roster
        self.client = client
        self.config = config
        self.counts = counts
        self.updates = updates
        self._results: queue.Queue[Answered | NoneReady | BaseException] = queue.Queue()
        self._loads: dict[int, _Load] = {}
        self._changed = asyncio.Condition()
        self._turn = asyncio.Lock()  # of the request that is next: thousands would all wake up for each that ends
        self._is_cut_short = self._has_ended = False
        self._is_waiting = False  # for weights; looked at by the client's thread
        self._has_asked = False  # for weights, of the caller; looked at by the caller's thread

    def next_result(self, while_waiting: Callable[[], None] = lambda: None) -> Answered | NoneReady:
        """Wait for the next request to finish: its place, and its completions or None.

        NoneReady where no worker is ready: with the next call the requests go on.

        Args:
            while_waiting: called once at least, and again and again while nothing comes.

        Raises:
            WorkerGone: no worker is left.
            RunFailed: the thread that asks the workers hangs, or has ended without an answer.
        """
        if self._has_asked:
            self._has_asked = False
            self.client.wait_for(self._go_on(), timeout_s=0.0, doing="going on with the rollout")
        result = self._next(while_waiting)
        if isinstance(result, BaseException):
            raise result
        self._has_asked = isinstance(result, NoneReady)
        return result

    def _next(self, while_waiting: Callable[[], None]) -> Answered | NoneReady | BaseException:
        """What comes next. That something comes is bounded by the requests' own time-outs, in the client's thread.

        How soon is not: each of thousands may wait for its turn. So it is the thread that is looked after.
        """
        last_look = time.monotonic()
        while True:
            while_waiting()
            try:
                return self._results.get(timeout=min(WAIT_S, LOOK_S))
            except queue.Empty:
                if time.monotonic() - last_look < LOOK_S:
                    continue
                last_look = time.monotonic()
                has_ended = self.client.wait_for(self._is_over(), timeout_s=0.0, doing="waiting for answers")
                if has_ended and self._results.empty():
                    raise RunFailed("the rollout has ended without an answer to each of its requests") from None

    async def _is_over(self) -> bool:
        return self._has_ended

    async def run(self, requests: Sequence[GenerateRequest]) -> None:
        """Answer them all; cancelled, it aborts those that are running."""
        self.counts.sent += len(requests)
        tasks = [asyncio.create_task(self._generate(place, request)) for place, request in enumerate(requests)]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._results.put(error)
        finally:
            self._has_ended = True
            for task in tasks:
                task.cancel()

    async def cut_short(self) -> None:
        """Start no more requests, and end those that run: all come back as they are, some without an answer."""
        if self._is_cut_short:
            return
        self._is_cut_short = True
        async with self._changed:
            self._changed.notify_all()
        while not self._has_ended:  # again, for those that were on their way to a worker
            await asyncio.gather(*(self._abort(worker, None) for worker in self.roster.ready()))
            await asyncio.sleep(ABORT_AGAIN_S)

    async def _generate(self, place: int, request: GenerateRequest) -> None:
        avoid: int | None = None
        why = ""
        for attempt in range(self.config.rollout_max_retries + 1):
            self.counts.retried += attempt > 0
            worker = await self._take_worker(request, avoid)
            if worker is None:
                self.counts.unfinished += 1
                self._results.put((place, []))
                return
            generation, name = self.roster.generation(worker), name_of(worker)
            # A name of its own for each try: the engine may not be rid of the last one yet.
            this_try = dataclasses.replace(request, id=f"{request.id}.{attempt}") if attempt else request
            try:
                completions = await self._ask(worker, this_try)
                if all(completion.is_whole for completion in completions):
                    self.counts.finished += 1
                elif self._is_cut_short:
                    self.counts.unfinished += 1
                else:  # the worker was told to end, say
                    reasons = ", ".join(sorted({completion.finish_reason for completion in completions}))
                    raise WorkerRefused(name, f"the answer was cut off, and not by us (finish_reason: {reasons})")
                self._results.put((place, completions))
                return
            except WorkerFault as error:
                why = str(error)
                self.roster.mark_faulty(worker, error, generation=generation)
            except WorkerGone as error:
                why = f"{name}: {error}"
                if not await asyncio.to_thread(_is_alive, worker):
                    self.roster.lose(worker, str(error), generation=generation)
            except TimeoutError as error:
                why = f"{name}: {error}"
                if await self.client.is_well(worker):
                    await self._abort(worker, this_try.id)
                else:  # left in, it would be idle, and get the next requests
                    self.roster.lose(worker, str(error), generation=generation)
            except WorkerRefused as error:
                why = str(error)
            except StaleAnswer as error:
                why = f"{name}: {error}"
            finally:
                await self._give_back(worker, request)
            logger.warning("request %s: %s", request.id, why)
            avoid = worker.number
        self.counts.failed += 1
        self.counts.why_failed = self.counts.why_failed or why
        self._results.put((place, None))

    async def _ask(self, worker: WorkerHandle, request: GenerateRequest) -> list[Completion]:
        try:
            completions = await self.client.completions(
                worker, request, version=self.roster.version, timeout_s=self.config.rollout_timeout_s
            )
        except StaleAnswer as error:
            self.counts.stale += 1
            self.roster.mark_stale(worker, error.versions)
            raise
        self.roster.mark_well(worker)
        return completions

    async def _abort(self, worker: WorkerHandle, request_id: str | None) -> None:
        """Of a request that nobody waits for any more, or all; hanging up should do, but not every engine notices."""
        body: dict[str, object] = {"abort_all": True} if request_id is None else {"request_id": request_id}
        with contextlib.suppress(RuntimeError, TimeoutError):
            await self.client.post(worker, protocol.ABORT, body, timeout_s=ABORT_TIMEOUT_S)

    async def _take_worker(self, request: GenerateRequest, avoid: int | None) -> WorkerHandle | None:
        """The least loaded worker with room; another than the one that just failed, where there is one.

        None when the rollout was cut short.
        """
        async with self._turn, self._changed:
            while not self._is_cut_short:
                ready = self.roster.ready()
                if not ready and self.updates and self.roster.can_recover:
                    if not self._is_waiting:
                        self._is_waiting = True
                        self._results.put(NoneReady())
                    await self._changed.wait()  # Unbounded: an update has time-outs; it ends the run, or this.
                    continue
                alive = ready or self.roster.alive
                candidates = [worker for worker in alive if worker.number != avoid] or alive
                by_load = sorted(candidates, key=lambda candidate: self._load(candidate).tokens)
                worker = next((worker for worker in by_load if self._has_room(worker, request)), None)
                if worker is not None:
                    load = self._load(worker)
                    load.requests += 1
                    load.sequences += request.num_samples
                    load.tokens += _tokens(request)
                    return worker
                # Unbounded: every worker without room has a request that ends within --rollout-timeout-s.
                await self._changed.wait()
        return None

    def _load(self, worker: WorkerHandle) -> _Load:
        return self._loads.setdefault(worker.number, _Load())

    def _has_room(self, worker: WorkerHandle, request: GenerateRequest) -> bool:
        load = self._load(worker)
        if load.sequences == 0:
            return True
        if load.sequences + request.num_samples > self.config.rollout_max_batch_size * QUEUE_AHEAD:
            return False
        if load.requests < self.client.max_requests(worker):
            return True
        self.client.say_bound(worker)
        return False

    async def _go_on(self) -> None:
        """Workers are ready again."""
        async with self._changed:
            self._is_waiting = False
            self._changed.notify_all()

    async def _give_back(self, worker: WorkerHandle, request: GenerateRequest) -> None:
        async with self._changed:
            load = self._loads[worker.number]
            load.requests -= 1
            load.sequences -= request.num_samples
            load.tokens -= _tokens(request)
            self._changed.notify_all()


def _is_alive(worker: WorkerHandle) -> bool:
    return worker.is_alive


def _tokens(request: GenerateRequest) -> int:
    """Most tokens a request can come to."""
    return request.num_samples * (len(request.token_ids) + request.sampling.max_new_tokens)
