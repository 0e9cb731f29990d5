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
from xrl.rollout.embedded.model import Decoder
from xrl.rollout.embedded.scheduler import Scheduler
from xrl.rollout.embedded.weights import DecoderWeights
from xrl.rollout.engine import EngineError, EngineNotReady, check_request
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
    ) -> None:
        if dtype not in _DTYPES:
            raise SettingsError(f"the embedded engine runs in {' or '.join(_DTYPES)}, got {dtype!r}")
        self._shape = _read_supported_shape(model_dir, max_model_len)
        self.weights_version = -1
        self._max_model_len, self._max_batch_size, self._num_threads = max_model_len, max_batch_size, num_threads
        self._weights = DecoderWeights(self._shape, _DTYPES[dtype], torch.device(device))

        # Held over a whole change of state, so that two do not mix; taken before self._changed.
        self._one_at_a_time = threading.Lock()
        # Guards what follows. Scheduler and weights belong to the loop thread: others hand it tasks, and only while
        # no job is in flight. Jobs leave self._in_flight only after the step that ended them.
        self._changed = threading.Condition()
        self._tasks: list[tuple[Callable[[], None], Future[None]]] = []
        self._inbox: list[Job] = []
        self._in_flight: dict[str, Job] = {}
        self._abort_requested = False
        self._not_ready: str | None = "it has no weights yet"
        self._is_asleep = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        with self._changed:
            built = self._on_loop(self._build)  # before the loop's first wait, which takes it for granted
        self._thread.start()
        built.result()  # Unbounded: it computes, and waits for nobody; whoever started the worker has a limit.

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
            done.result()  # Unbounded: the loop thread does it next, and waits for nobody; callers have a limit.

    def wake(self) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_open()
                done = self._on_loop(self._weights.restore)
            done.result()  # Unbounded: as above.
            with self._changed:
                self._is_asleep = False

    def room(self, layer: str) -> dict[str, Tensor]:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                self._not_ready = f"an update is under way, {layer} is being written"
            return self._weights.room(layer)

    def load_layer(self, bucket: WeightBucket) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                self._not_ready = f"the update to weights version {bucket.version} is not finished"
                done = self._on_loop(
                    lambda: self._weights.load(bucket.tensors, version=bucket.version, source=bucket.layer)
                )
            done.result()  # Unbounded: as above.

    def finish_update(self, version: int) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                done = self._on_loop(self._weights.finish)
            done.result()  # Unbounded: as above.
            with self._changed:
                self.weights_version = version
                self._not_ready = None

    def close(self) -> None:
        self.abort()
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()  # Unbounded: it ends after the step that it is in.
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
                        self._scheduler = self._new_scheduler()  # with an empty cache
                        return_freed_memory()
                        self._changed.wait_for(self._has_work)  # Unbounded: an idle engine; `close` is work too.
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
                    logger.exception("the embedded engine failed; its requests are lost")
                    self._fail_all(error)
                else:
                    self._resolve(done)

    def _has_work(self) -> bool:
        return bool(self._in_flight or self._tasks) or self._is_closed

    def _step(self, inbox: list[Job], aborting: bool) -> list[Job]:
        for job in inbox:
            self._scheduler.add(job)
        done = self._scheduler.drop_aborted(self.weights_version) if aborting else []
        return done + self._scheduler.step(self.weights_version)

    def _resolve(self, done: list[Job]) -> None:
        with self._changed:
            for job in done:
                del self._in_flight[job.request.id]
        for job in done:
            job.future.set_result([job.completions[sample] for sample in range(job.request.num_samples)])

    def _fail_all(self, error: Exception) -> None:
        """Fail every request in flight and start afresh: what is left of the cache cannot be trusted."""
        with self._changed:
            failed = list(self._in_flight.values())
            self._in_flight.clear()
            self._inbox.clear()
            self._scheduler = self._new_scheduler()
        for job in failed:
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
        self._scheduler = self._new_scheduler()  # with an empty cache
        self._weights.offload()

    def _new_scheduler(self) -> Scheduler:
        cache = KVCache(self._shape, self._weights.dtype, self._weights.device)
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
            raise EngineError(f"the embedded engine cannot {action} with {len(self._in_flight)} requests in flight")


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
