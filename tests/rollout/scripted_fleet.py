"""What stands in for roster and client under a dispatch: workers without processes, whose answers a test writes."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.samples import answer
from xrl.config import RolloutConfig
from xrl.rollout.dispatch import Answered, Dispatch, NoneReady, RolloutCounts
from xrl.rollout.process import WorkerGone
from xrl.types import Completion, GenerateRequest, SamplingParams

T = TypeVar("T")
# (number of the worker, request) -> its answers; what it raises is what became of the call.
Answer = Callable[[int, GenerateRequest], Awaitable[list[Completion]]]


def ask(place: int, *, tokens: int = 10, num_samples: int = 1) -> GenerateRequest:
    """Request r0, r1, ... whose answers come to `tokens` each at most, the prompt's one token included."""
    return GenerateRequest(
        id=f"r{place}",
        token_ids=[place],
        num_samples=num_samples,
        sampling=SamplingParams(max_new_tokens=tokens - 1, stop_token_ids=(2,)),
    )


def whole(request: GenerateRequest) -> list[Completion]:
    """The prompt's token, and the one that stops."""
    return [answer(request.token_ids[0], 2)] * request.num_samples


async def answer_well(_: int, request: GenerateRequest) -> list[Completion]:
    return whole(request)


@dataclass
class Worker:
    number: int
    is_alive: bool = True

    @property
    def url(self) -> str:
        return f"http://10.0.0.{self.number}:80"


class ScriptedFleet:
    """Who is ready, what each answers, and what dispatch says of them. Its loop runs in a thread, as the client's."""

    def __init__(self, num_workers: int = 1, answer: Answer = answer_well, **settings: Any) -> None:
        self.config = RolloutConfig(**settings)
        self.workers = [Worker(number) for number in range(num_workers)]
        self.answer = answer
        self.ready_ones = set(range(num_workers))
        self.generations: dict[int, int] = dict.fromkeys(range(num_workers), 0)
        self.most_requests: dict[int, int] = defaultdict(lambda: 1000)
        # What whoever waits for answers does where no worker is ready; None: it can do nothing.
        self.recover: Callable[[], None] | None = None
        self.can_recover = True  # whether weights could make a worker ready
        self.version: int | None = 5
        self.says_well = True  # by its own word, when asked for its health
        self.stops_when_one_is_lost = False
        self.asked: list[tuple[int, str]] = []  # (worker, request), in order
        self.told: list[tuple[Any, ...]] = []  # (what of, worker, ...), in order
        self.aborts: list[tuple[int, dict[str, Any]]] = []
        self.timeouts: set[float] = set()
        self.on_abort: Callable[[], None] = lambda: None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._end_of_tasks())
        self._loop.close()

    async def _end_of_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What a test does.

    def begin(self, *requests: GenerateRequest) -> tuple[Dispatch, RolloutCounts, Future[None]]:
        """A rollout whose requests have all come as far as they come by themselves."""
        counts = RolloutCounts()
        updates = self.recover is not None
        dispatch = Dispatch(self, self, self.config, counts, updates=updates)  # type: ignore[arg-type]
        running = self.start(dispatch.run(requests))
        self.settle()
        return dispatch, counts, running

    def generate(self, *requests: GenerateRequest) -> tuple[dict[int, list[Completion] | None], RolloutCounts]:
        """What becomes of each request, by its place."""
        dispatch, counts, _ = self.begin(*requests)
        return dict(self.next_answer(dispatch) for _ in requests), counts

    def next_answer(self, dispatch: Dispatch) -> Answered:
        """The next result, with weights given anew wherever they are asked for."""
        while isinstance(result := dispatch.next_result(), NoneReady):
            assert self.recover is not None
            self.recover()
        return result

    def settle(self) -> None:
        """Until every task in the loop waits for somebody outside."""

        async def let_others_run() -> None:
            for _ in range(100):
                await asyncio.sleep(0)

        self.start(let_others_run()).result()

    # What dispatch asks of the client and of the roster.

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait_for(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float, doing: str) -> T:
        return self.start(coroutine).result()

    def ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.number in self.ready_ones]

    @property
    def alive(self) -> list[Worker]:
        if not self.ready_ones:
            raise WorkerGone("no rollout worker is left")
        return self.ready()

    def generation(self, worker: Worker) -> int:
        return self.generations[worker.number]

    async def completions(
        self, worker: Worker, request: GenerateRequest, *, version: int | None, timeout_s: float
    ) -> list[Completion]:
        assert version == self.version
        self.asked.append((worker.number, request.id))
        self.timeouts.add(timeout_s)
        return await self.answer(worker.number, request)

    async def is_well(self, worker: Worker) -> bool:
        return self.says_well

    async def post(self, worker: Worker, path: str, body: dict[str, Any], *, timeout_s: float) -> object:
        assert path == "/abort_request"
        self.aborts.append((worker.number, body))
        self.on_abort()
        return {}

    def mark_well(self, worker: Worker) -> None:
        self.told.append(("well", worker.number))

    def mark_stale(self, worker: Worker, versions: Sequence[int]) -> None:
        self.told.append(("stale", worker.number, list(versions)))
        self.ready_ones.discard(worker.number)

    def mark_faulty(self, worker: Worker, fault: Exception, *, generation: int) -> None:
        self.told.append(("faulty", worker.number, str(fault), generation))

    def lose(self, worker: Worker, reason: str, *, generation: int) -> None:
        self.told.append(("lost", worker.number, reason, generation))
        self.ready_ones.discard(worker.number)
        if self.stops_when_one_is_lost:
            raise WorkerGone(f"rollout worker {worker.number} is lost ({reason}), and --on-lost-worker is stop")

    def max_requests(self, worker: Worker) -> int:
        return self.most_requests[worker.number]

    def say_bound(self, worker: Worker) -> None:
        self.told.append(("bound", worker.number))


class Held:
    """Answers that wait until a test lets them go, by the request's id."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._reasons: dict[str, Any] = {}

    async def __call__(self, _: int, request: GenerateRequest) -> list[Completion]:
        event = asyncio.Event()
        self._waiting[request.id] = asyncio.get_running_loop(), event
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise
        reason = self._reasons.get(request.id, "stop")
        return whole(request) if reason == "stop" else [answer(4, reason=reason)] * request.num_samples

    @property
    def waiting(self) -> list[str]:
        return [name for name, (_, event) in self._waiting.items() if not event.is_set()]

    def let_go(self, *names: str, reason: str = "stop") -> None:
        for name in names:
            self._reasons[name] = reason
            loop, event = self._waiting[name]
            loop.call_soon_threadsafe(event.set)
