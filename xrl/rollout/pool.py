"""Many rollout workers: prompts are spread over them, failures are retried, the dead are left out."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from xrl.config import RolloutConfig
from xrl.rollout import protocol
from xrl.rollout.process import WorkerProcess
from xrl.types import Completion, GenerateRequest

logger = logging.getLogger("xrl")
T = TypeVar("T")

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 3.0
# Sequences sent to a worker beyond what it decodes at once, so that it never waits for the next.
QUEUE_AHEAD = 1.25


class WorkerGone(RuntimeError):
    """A worker died or cannot be reached."""


@dataclass
class RolloutCounts:
    """What became of the requests of one rollout."""

    sent: int = 0  # requests asked for
    finished: int = 0
    failed: int = 0  # given up after the last retry
    retried: int = 0  # tries after the first, all requests together


@dataclass
class _Load:
    """What a worker has been given and not finished."""

    sequences: int = 0
    tokens: int = 0


@dataclass
class _Rollout:
    """One call of `generate`, as its loop sees it."""

    results: queue.Queue[Any]
    counts: RolloutCounts
    loads: dict[int, _Load] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


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
    ) -> None:
        """
        Args:
            devices: torch device of each worker; their number is the number of workers.
            num_threads: CPU threads of each worker.
            max_model_len: longest prompt + response in tokens.
            log_dir: each worker's output goes to a file here.
        """
        self.config = config
        arguments = [
            f"--engine={config.engine}",
            f"--model={model_dir}",
            f"--dtype={dtype}",
            f"--max-batch-size={config.rollout_max_batch_size}",
            f"--num-threads={num_threads}",
            f"--max-model-len={max_model_len}",
        ]
        self.workers = [
            WorkerProcess(
                number,
                [*arguments, f"--device={device}"],
                num_threads=num_threads,
                log=log_dir / f"rollout_worker_{number}.log",
                python=config.rollout_python,
            )
            for number, device in enumerate(devices)
        ]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-pool", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self._lost: set[int] = set()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker, whatever state it is in."""
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
    def alive(self) -> list[WorkerProcess]:
        """Workers that can be sent to.

        Raises:
            WorkerGone: there is none left.
        """
        for worker in self.workers:
            if worker.number not in self._lost and not worker.is_alive:
                self._lose(worker, "the process ended")
        alive = [worker for worker in self.workers if worker.number not in self._lost]
        if not alive:
            raise WorkerGone(f"no rollout worker is left; {self.workers[-1].log_tail()}")
        return alive

    def wait_until_ready(self) -> None:
        """Wait until every worker listens.

        Raises:
            RuntimeError: one ended or did not start in time.
        """
        for worker in self.workers:
            worker.wait_until_listening(START_TIMEOUT_S)

    def generate(
        self, requests: Sequence[GenerateRequest], counts: RolloutCounts
    ) -> Iterator[tuple[int, list[Completion] | None]]:
        """Yield each request's place and completions as they finish; None for one whose tries are spent.

        Raises:
            WorkerGone: the last worker died.
        """
        self.wait_until_ready()
        counts.sent += len(requests)
        results: queue.Queue[Any] = queue.Queue()
        running = asyncio.run_coroutine_threadsafe(
            self._generate_all(requests, _Rollout(results=results, counts=counts)), self._loop
        )
        try:
            for _ in requests:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            running.cancel()

    def post_to_all(self, path: str, body: Any, *, timeout_s: float, doing: str) -> None:
        """Send the same to every worker that is alive and wait for all; a worker that dies of it is left out.

        Raises:
            RuntimeError: a worker refused or ran out of time; `doing` begins the sentence.
            WorkerGone: none is left.
        """
        self.wait_until_ready()
        self._call(self._post_to_all(self.alive, path, body, timeout_s=timeout_s, doing=doing))

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Every request in flight keeps a connection of its own.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session

    async def _post_to_all(
        self, workers: Sequence[WorkerProcess], path: str, body: Any, *, timeout_s: float, doing: str
    ) -> None:
        async def post(worker: WorkerProcess) -> None:
            try:
                await self._post(worker, path, body, timeout_s=timeout_s)
            except WorkerGone as error:
                self._lose(worker, str(error))
            except (RuntimeError, TimeoutError) as error:
                raise RuntimeError(
                    f"{doing}: rollout worker {worker.number}: {error or 'no answer in time'}"
                ) from error

        await asyncio.gather(*(post(worker) for worker in workers))
        _ = self.alive

    async def _post(self, worker: WorkerProcess, path: str, body: Any, *, timeout_s: float) -> Any:
        session = await self._http()
        try:
            async with session.post(
                worker.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                answer = await response.json()
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {path} within {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise WorkerGone(f"{path}: {error or type(error).__name__}") from error
        if response.status != 200:
            raise RuntimeError(f"{answer.get('type')}: {answer.get('error')}")
        return answer

    async def _generate_all(self, requests: Sequence[GenerateRequest], rollout: _Rollout) -> None:
        tasks = [asyncio.create_task(self._generate(place, request, rollout)) for place, request in enumerate(requests)]
        try:
            await asyncio.gather(*tasks)
        except WorkerGone as error:
            rollout.results.put(error)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            rollout.results.put(error)
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(self, place: int, request: GenerateRequest, rollout: _Rollout) -> None:
        avoid: int | None = None
        for attempt in range(self.config.rollout_max_retries + 1):
            rollout.counts.retried += attempt > 0
            worker = await self._take_worker(request, rollout, avoid)
            # A name of its own for each try: the engine may not be rid of the last one yet.
            this_try = dataclasses.replace(request, id=f"{request.id}.{attempt}") if attempt else request
            try:
                answers = await self._post(
                    worker,
                    protocol.GENERATE,
                    protocol.request_to_json(this_try),
                    timeout_s=self.config.rollout_timeout_s,
                )
                rollout.counts.finished += 1
                rollout.results.put((place, protocol.completions_from_json(answers)))
                return
            except WorkerGone as error:
                if not worker.is_alive:
                    self._lose(worker, str(error))
                logger.warning("request %s: %s", request.id, error)
            except (RuntimeError, TimeoutError) as error:
                logger.warning("request %s on rollout worker %d: %s", request.id, worker.number, error)
            finally:
                await self._give_back(worker, request, rollout)
            avoid = worker.number
        rollout.counts.failed += 1
        rollout.results.put((place, None))

    async def _take_worker(self, request: GenerateRequest, rollout: _Rollout, avoid: int | None) -> WorkerProcess:
        """The least loaded worker with room; another than the one that just failed, where there is one."""
        limit = self.config.rollout_max_batch_size * QUEUE_AHEAD
        async with rollout.changed:
            while True:
                candidates = [worker for worker in self.alive if worker.number != avoid] or self.alive
                loads = {worker.number: rollout.loads.setdefault(worker.number, _Load()) for worker in candidates}
                worker = min(candidates, key=lambda candidate: loads[candidate.number].tokens)
                load = loads[worker.number]
                if load.sequences == 0 or load.sequences + request.num_samples <= limit:
                    load.sequences += request.num_samples
                    load.tokens += _tokens(request)
                    return worker
                await rollout.changed.wait()

    async def _give_back(self, worker: WorkerProcess, request: GenerateRequest, rollout: _Rollout) -> None:
        async with rollout.changed:
            load = rollout.loads[worker.number]
            load.sequences -= request.num_samples
            load.tokens -= _tokens(request)
            rollout.changed.notify_all()

    def _lose(self, worker: WorkerProcess, reason: str) -> None:
        if worker.number not in self._lost:
            self._lost.add(worker.number)
            logger.error("rollout worker %d is lost (%s); %s", worker.number, reason, worker.log_tail())


def _tokens(request: GenerateRequest) -> int:
    """Most tokens a request can come to."""
    return request.num_samples * (len(request.token_ids) + request.sampling.max_new_tokens)
