"""The embedded engine: the engine contract over a decoder in this process, stepped by one background thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.kernels.threads import use_threads
from xrl.metrics.memory import return_freed_memory
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape
from xrl.rollout.embedded import missing_part
from xrl.rollout.embedded.batch import Job
from xrl.rollout.embedded.cache import KVCache
from xrl.rollout.embedded.cache_size import max_blocks
from xrl.rollout.embedded.model import Decoder
from xrl.rollout.embedded.scheduler import Scheduler
from xrl.rollout.embedded.weights import DecoderWeights
from xrl.rollout.engine import EngineBusy, EngineError, EngineNotReady, check_request
from xrl.types import Completion, GenerateRequest, WeightBucket
from xrl.weights.plan import num_parameters

logger = logging.getLogger(__name__)

# An engine without requests for so long gives its cache back; it grows anew with the next ones.
IDLE_S = 0.05

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EmbeddedEngine:
    """See `xrl.rollout.engine.Engine` for the contract and `xrl.rollout.create_engine` for the arguments."""

    def __init__(
        self,
        *,
        model_dir: Path,
        dtype: str,
        device: str,
        max_batch_size: int,
        num_threads: int,
        max_model_len: int,
        kv_cache_bytes: int | None = None,
        num_workers_on_host: int = 1,
    ) -> None:
        """
        Args:
            kv_cache_bytes: most that keys and values take; default: a share of the memory that is free now.
            num_workers_on_host: that divide the CPU's memory among them by default.
        """
        if dtype not in _DTYPES:
            raise SettingsError(f"the embedded engine runs in {' or '.join(_DTYPES)}, got {dtype!r}")
        self._shape = _read_supported_shape(model_dir, max_model_len)
        self.weights_version = -1
        self.num_preemptions = 0  # since the start; counted where the cache is given back
        self._max_model_len, self._max_batch_size, self._num_threads = max_model_len, max_batch_size, num_threads
        self._weights = DecoderWeights(self._shape, _DTYPES[dtype], torch.device(device))
        self._max_blocks = max_blocks(
            self._shape,
            _DTYPES[dtype],
            torch.device(device),
            max_model_len=max_model_len,
            num_bytes=kv_cache_bytes,
            num_workers_on_host=num_workers_on_host,
        )

        # Held over a whole change of state, so that two do not mix; taken before self._changed.
        self._one_at_a_time = threading.Lock()
        # Guards what follows. Scheduler and weights belong to the loop thread: others hand it tasks, and only while
        # no job is in flight. Jobs leave self._in_flight only after the step that ended them.
        self._changed = threading.Condition()
        self._tasks: list[tuple[Callable[[], None], Future[None]]] = []
        self._inbox: list[Job] = []
        self._in_flight: dict[str, Job] = {}
        # The loop thread's own. After a step that failed, the requests that were in it run again in halves, one half
        # after the other, and those in halves, until it is known which of them fails: the others must not.
        self._at_work: dict[str, Job] = {}  # given to the scheduler
        self._suspects: list[list[Job]] = []  # halves that wait; the last one is next
        self._queued: list[Job] = []  # new ones, which wait for that
        self._abort_requested = False
        self._not_ready: str | None = "it has no weights yet"
        self._is_asleep = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        with self._changed:
            built = self._on_loop(self._build)  # before the loop's first wait, which takes it for granted
        self._thread.start()
        built.result()  # Unbounded: whoever starts a worker bounds its start.

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        check_request(request, vocab_size=self._shape.vocab_size, max_model_len=self._max_model_len)
        job = Job(request=request, future=Future())
        job.future.set_running_or_notify_cancel()  # from here on only `abort` ends it
        with self._changed:
            self._check_ready()
            if request.id in self._in_flight:
                raise ValueError(f"request id {request.id!r} is already in flight")
            self._in_flight[request.id] = job
            self._inbox.append(job)
            self._changed.notify()
        return job.future

    def abort(self, request_id: str | None = None) -> None:
        with self._changed:
            for job in self._in_flight.values():
                if request_id in (None, job.request.id):
                    job.aborted = self._abort_requested = True

    def sleep(self, *, keep_weights: bool = True) -> None:
        del keep_weights  # always on the host
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("sleep")
                self._is_asleep = True
                done = self._on_loop(self._offload)
            done.result()  # Unbounded: the trainer bounds its call.

    def wake(self) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_open()
                done = self._on_loop(self._weights.restore)
            done.result()  # Unbounded: the trainer bounds its call.
            with self._changed:
                self._is_asleep = False

    def destinations(self, part: str) -> dict[str, Tensor]:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                self._not_ready = f"an update is under way, {part} is being written"
            return self._weights.destinations(part)

    def load_part(self, bucket: WeightBucket) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                self._weights.check(bucket.tensors, source=bucket.part)  # what is refused changes nothing
                self._not_ready = f"the update to weights version {bucket.version} is not finished"
                done = self._on_loop(lambda: self._weights.load(bucket.tensors, version=bucket.version))
            done.result()  # Unbounded: the trainer bounds its call.

    def finish_update(self, version: int) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                done = self._on_loop(self._weights.finish)
            done.result()  # Unbounded: the trainer bounds its call.
            with self._changed:
                self.weights_version = version
                self._not_ready = None

    def close(self) -> None:
        self.abort()
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()  # Unbounded: the loop ends with the step that it is in.
        self._scheduler = self._new_scheduler()
        self._weights.clear()

    def _on_loop(self, task: Callable[[], None]) -> Future[None]:
        """Let the loop thread do it, soon. Call with the lock held, wait for the result without.

        Whatever thread computes with PyTorch gets OpenMP threads of its own, and where those of all threads together
        are more than the cores, they no longer spin while they wait: every step of the loop would pay for waking them.
        """
        done: Future[None] = Future()
        self._tasks.append((task, done))
        self._changed.notify()
        return done

    def _run(self) -> None:
        """The loop thread: step while there is work."""
        # Here: OpenMP counts threads for each thread that starts them.
        use_threads(self._num_threads, num_parameters=num_parameters(self._shape))
        with torch.inference_mode():
            while True:
                with self._changed:
                    if not self._changed.wait_for(self._has_work, timeout=IDLE_S):
                        # Between rollouts the trainer needs the memory.
                        self._renew_scheduler()
                        return_freed_memory()
                        self._changed.wait_for(self._has_work)  # Unbounded: `close` ends it, if nothing else does.
                    tasks, self._tasks = self._tasks, []
                    inbox, self._inbox = self._inbox, []
                    aborting, self._abort_requested = self._abort_requested, False
                    is_busy = bool(self._in_flight)
                    if not tasks and not is_busy:
                        return
                _run_tasks(tasks)
                tasks.clear()  # and what they hold, before the next wait
                if not is_busy:
                    continue
                try:
                    done = self._step(inbox, aborting)
                except Exception as error:
                    self._find_culprit(error)
                else:
                    self._resolve(done)

    def _has_work(self) -> bool:
        return bool(self._in_flight or self._tasks) or self._is_closed

    def _step(self, inbox: list[Job], aborting: bool) -> list[Job]:
        self._queued += inbox
        joining = self._joining()
        for job in joining:
            self._at_work[job.request.id] = job
            self._scheduler.add(job)
        aborting = aborting or any(job.aborted for job in joining)
        done = self._scheduler.drop_aborted(self.weights_version) if aborting else []
        return done + self._scheduler.step(self.weights_version)

    def _joining(self) -> list[Job]:
        """What joins the batch: all that is new, or, while a culprit is looked for, the next half on its own."""
        if self._suspects:
            return [] if self._at_work else self._suspects.pop()
        joining, self._queued = self._queued, []
        return joining

    def _resolve(self, done: list[Job]) -> None:
        for job in done:
            del self._at_work[job.request.id]
        with self._changed:
            for job in done:
                del self._in_flight[job.request.id]
        for job in done:
            job.future.set_result([job.completions[sample] for sample in range(job.request.num_samples)])

    def _find_culprit(self, error: Exception) -> None:
        """After a step that failed: start afresh, as what is left of the cache cannot be trusted."""
        jobs = list(self._at_work.values())
        if not self._suspects:
            logger.error("the embedded engine failed with %d requests", len(jobs), exc_info=error)
        self._at_work.clear()
        self._scheduler = self._new_scheduler()
        if len(jobs) > 1:
            for job in jobs:
                job.restart()
            half = len(jobs) // 2
            self._suspects += [jobs[half:], jobs[:half]]
            return
        with self._changed:
            for job in jobs:
                del self._in_flight[job.request.id]
        for job in jobs:
            failure = EngineError(f"the embedded engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            job.future.set_exception(failure)

    def _build(self) -> None:
        try:
            self._decoder = Decoder(self._shape, self._weights, self._max_model_len)
            self._scheduler = self._new_scheduler()
        except BaseException:
            with self._changed:
                self._is_closed = True  # ends the loop
            raise

    def _offload(self) -> None:
        self._renew_scheduler()
        self._weights.offload()

    def _renew_scheduler(self) -> None:
        """Start with an empty cache; say how often the one before was too small."""
        number = self._scheduler.num_preemptions
        if number:
            self.num_preemptions += number
            logger.info("the KV cache was full: %d times a sample gave its place up, to be computed again", number)
        self._scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        cache = KVCache(self._shape, self._weights.dtype, self._weights.device, max_blocks=self._max_blocks)
        return Scheduler(self._decoder, cache, self._max_batch_size)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the embedded engine is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if self._is_asleep:
            raise EngineNotReady("the embedded engine cannot generate: it is asleep")
        if self._not_ready is not None:
            raise EngineNotReady(f"the embedded engine cannot generate: {self._not_ready}")

    def _check_idle(self, action: str) -> None:
        self._check_open()
        if self._in_flight:
            raise EngineBusy(f"the embedded engine cannot {action} with {len(self._in_flight)} requests in flight")


def _run_tasks(tasks: Sequence[tuple[Callable[[], None], Future[None]]]) -> None:
    for task, done in tasks:
        try:
            task()
        except Exception as error:  # of the one who asked for it
            done.set_exception(error)
        else:
            done.set_result(None)


def _read_supported_shape(model_dir: Path, max_model_len: int) -> ModelShape:
    """The model's shape, if this decoder computes what config.json says; whole runs are checked before they start."""
    file = model_dir / "config.json"
    config = read_json_object(file)
    shape = checked_shape(config, file)
    missing = missing_part(shape)
    if missing is not None:
        raise SettingsError(f"{file}: the embedded engine does not run {missing}: use another --engine")
    if max_model_len > shape.max_positions:
        raise SettingsError(
            f"{file}: prompt + response of up to {max_model_len} tokens exceed the {shape.max_positions} positions "
            f"of the model (max_position_embeddings or sliding_window)"
        )
    return shape
