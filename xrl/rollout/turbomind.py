"""The TurboMind engine: the engine contract over LMDeploy's TurboMind in this process.

States of the weights; requests need COMPLETE ones, a cache, and an engine that is not asleep:

    NONE --wake(weights)--> PARTIAL --the last tensor--> COMPLETE --wake(kv_cache)--> COMPLETE, with a cache
    COMPLETE, with a cache --sleep(2)--> NONE
    COMPLETE, with a cache --sleep(1)--> OFFLOADED --wake(weights, kv_cache)--> COMPLETE, with a cache

An update takes the weights to NONE first, but for one that was left half-way: it begins anew from PARTIAL. While the
trainer has the engine asleep, an update leaves out the cache; the engine's `wake` builds it.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xrl.config import SettingsError
from xrl.config.numbers import whole_number
from xrl.rollout.engine import EngineBusy, EngineError, EngineNotReady, WrongWeights, check_request
from xrl.rollout.turbomind_driver import (
    KV_CACHE,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    WEIGHTS,
    TurboMindDriver,
    check_experts,
    check_version,
)
from xrl.rollout.turbomind_tensors import FINAL_NORM, check_part, expected_parts, supported_shape
from xrl.types import Completion, FinishReason, GenerateRequest, WeightBucket
from xrl.weights.plan import FINAL

DTYPES = ("bfloat16", "float16")
CLOSE_TIMEOUT_S = 30.0


class _Weights(enum.Enum):
    NONE = enum.auto()  # no room for them either
    PARTIAL = enum.auto()  # room, and what an update has brought so far
    OFFLOADED = enum.auto()  # on the host
    COMPLETE = enum.auto()  # in the form that the kernels read


@dataclass(eq=False, kw_only=True)
class _Job:
    """A request in flight."""

    request: GenerateRequest
    future: Future[list[Completion]]
    aborted: bool = False
    running: dict[int, Any] = field(default_factory=dict)  # session id -> LMDeploy's handle


class TurboMindEngine:
    """See `xrl.rollout.engine.Engine` for the contract and `xrl.rollout.create_engine` for the arguments.

    More than config.json is read from `model_dir`: the weights (dropped at once) and the tokenizer. While the engine
    has no weights it holds no device memory, from its start to the first update too.
    """

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
        del num_threads  # TurboMind computes on its device only
        if dtype not in DTYPES:
            raise SettingsError(f"engine turbomind computes in {' or '.join(DTYPES)}, got {dtype}: set --rollout-dtype")
        self._shape = supported_shape(model_dir, max_model_len=max_model_len)
        self._parts = expected_parts(self._shape)
        self._max_model_len = max_model_len
        device_index = _device_index(device)
        check_version()
        if self._shape.experts is not None:
            check_experts(self._shape.experts.num_experts)
        self._driver = TurboMindDriver(
            model_dir,
            dtype=dtype,
            device_index=device_index,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
        )
        self.weights_version = -1

        # Held over a whole change of state, so that two do not mix; taken before self._changed. Guards the driver, the
        # state of weights and cache, and the update under way.
        self._one_at_a_time = threading.Lock()
        self._weights, self._has_cache = _Weights.COMPLETE, True
        self._update_version: int | None = None
        self._arrived: set[str] = set()  # parts of the model in the update under way
        self._final_norm: Tensor | None = None  # a copy that waits for the other parts: the last tensor ends the update
        # Guards what follows.
        self._changed = threading.Lock()
        self._in_flight: dict[str, _Job] = {}
        self._not_ready: str | None = "it has no weights yet"
        self._is_asleep = False
        self._is_closed = False
        self._broken: str | None = None  # why nothing but `close` is of use any more

        self._release()
        self._session_ids = itertools.count(1)
        # A request's buffers for log-probs are as long as its answer may be: no more of them than run at once.
        self._slots = asyncio.Semaphore(max_batch_size)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turbomind-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        self._check_request(request)
        job = _Job(request=request, future=Future())
        job.future.set_running_or_notify_cancel()  # from here on only `abort` ends it
        with self._changed:
            self._check_ready()
            if request.id in self._in_flight:
                raise ValueError(f"request id {request.id!r} is already in flight")
            self._in_flight[request.id] = job
        asyncio.run_coroutine_threadsafe(self._answer(job), self._loop)
        return job.future

    def abort(self, request_id: str | None = None) -> None:
        with self._changed:
            jobs = [job for job in self._in_flight.values() if request_id in (None, job.request.id)]
            for job in jobs:
                job.aborted = True
        if jobs:
            asyncio.run_coroutine_threadsafe(_cancel(jobs), self._loop)

    def sleep(self, *, keep_weights: bool = True) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("sleep")
                if keep_weights and self._shape.experts is not None:
                    raise EngineError(
                        "the TurboMind engine cannot keep the weights of a mixture of experts while it sleeps: sleep "
                        "with keep_weights=False, and update the weights before the next request"
                    )
                self._is_asleep = True
            if not self._has_cache:
                return
            if keep_weights:
                self._drive("sleep", lambda: self._driver.sleep(1))
                self._weights, self._has_cache = _Weights.OFFLOADED, False
            else:
                self._release()
                with self._changed:
                    self._not_ready = "its weights were dropped for sleep, an update must come first"

    def wake(self) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_open()
            self._build_cache()
            with self._changed:
                self._is_asleep = False

    def load_part(self, bucket: WeightBucket) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
                check_part(bucket.part, bucket.tensors, self._parts)  # what is refused changes nothing
                self._not_ready = f"the update to weights version {bucket.version} is not finished"
            if bucket.version != self._update_version:
                self._begin_update(bucket.version)
            tensors = dict(bucket.tensors)
            if bucket.part == FINAL:
                self._final_norm = tensors.pop(FINAL_NORM).detach().clone()
            if tensors:  # the head, where it is tied, came with the embeddings
                self._take(bucket.part, tensors)
            self._arrived.add(bucket.part)

    def finish_update(self, version: int) -> None:
        with self._one_at_a_time:
            with self._changed:
                self._check_idle("take weights")
            missing = [name for part in self._parts.keys() - self._arrived for name in self._parts[part]]
            if missing:
                raise WrongWeights(f"weight update: missing {', '.join(sorted(missing))}")
            assert self._final_norm is not None
            left = self._driver.missing()
            if left != [self._driver.final_norm]:
                raise EngineError(f"weight update: TurboMind has not taken {', '.join(left) or 'anything'}")
            self._take("final norm", {FINAL_NORM: self._final_norm}, finished=True)
            self._weights = _Weights.COMPLETE
            self._update_version = self._final_norm = None
            self._arrived.clear()
            if not self._is_asleep:
                self._build_cache()
            with self._changed:
                self.weights_version = version
                self._not_ready = None

    def close(self) -> None:
        with self._changed:  # whatever is submitted from here on is refused, so that nothing is missed below
            was_closed, self._is_closed = self._is_closed, True
            futures = [job.future for job in self._in_flight.values()]
        if was_closed:
            return
        self.abort()
        for future in wait(futures, timeout=CLOSE_TIMEOUT_S).not_done:
            future.set_exception(EngineError("the TurboMind engine was closed, and did not end the request"))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        with self._one_at_a_time:
            self._driver.close()

    # Weights and cache, with self._one_at_a_time held.

    def _begin_update(self, version: int) -> None:
        self._update_version, self._final_norm = version, None
        self._arrived.clear()
        if self._weights in (_Weights.COMPLETE, _Weights.OFFLOADED):
            self._release()
        if self._weights is _Weights.NONE:
            self._drive("make room for weights", lambda: self._driver.wake(WEIGHTS))
            self._weights = _Weights.PARTIAL
        self._driver.begin_update()

    def _take(self, part: str, tensors: dict[str, Tensor], *, finished: bool = False) -> None:
        try:
            self._driver.take(part, tensors, finished=finished)
        except EngineError as error:
            self._update_version = None  # its reader of tensors has ended: whatever comes next begins anew
            self._arrived.clear()
            if finished:  # weights may be packed in part, where others must not be written
                self._broken = f"the end of an update failed ({error}): the worker must be started again"
            raise

    def _drive(self, doing: str, action: Callable[[], None]) -> None:
        """Raises EngineError for whatever LMDeploy raises."""
        try:
            action()
        except Exception as error:
            raise EngineError(f"TurboMind could not {doing}: {type(error).__name__}: {error}") from error

    def _release(self) -> None:
        """Drop the weights and the cache. TurboMind can do so only with a cache: without, one is built first."""
        self._build_cache()
        self._drive("drop its weights", lambda: self._driver.sleep(2))
        self._weights, self._has_cache = _Weights.NONE, False

    def _build_cache(self) -> None:
        """If there are weights for it."""
        if self._has_cache or self._weights in (_Weights.NONE, _Weights.PARTIAL):
            return
        tags = (WEIGHTS, KV_CACHE) if self._weights is _Weights.OFFLOADED else (KV_CACHE,)
        self._drive("build its cache", lambda: self._driver.wake(*tags))
        self._weights, self._has_cache = _Weights.COMPLETE, True

    # Requests, on the loop thread.

    async def _answer(self, job: _Job) -> None:
        samples = [asyncio.ensure_future(self._sample(job, index)) for index in range(job.request.num_samples)]
        try:
            completions = await asyncio.gather(*samples)
        except Exception as error:
            job.aborted = True
            await _cancel([job])
            await asyncio.gather(*samples, return_exceptions=True)  # their sessions end before the request does
            failure = EngineError(f"the TurboMind engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._forget(job)
            if not job.future.done():  # by `close`, which does not wait for ever
                job.future.set_exception(failure)
        else:
            self._forget(job)
            if not job.future.done():
                job.future.set_result(completions)

    def _forget(self, job: _Job) -> None:
        with self._changed:
            del self._in_flight[job.request.id]

    async def _sample(self, job: _Job, index: int) -> Completion:
        """One answer, in a session of its own. A cancelled session ends with what it has."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        status = "CANCEL"
        async with self._slots:
            # No await between this look at `aborted` and the start of the session: an abort finds one or the other.
            if not job.aborted:
                sampling, session_id = job.request.sampling, next(self._session_ids)
                handle = job.running[session_id] = self._driver.new_request()
                answer = handle.async_stream_infer(
                    session_id,
                    input_ids=list(job.request.token_ids),
                    gen_config=self._driver.generation_config(sampling, seed=_sample_seed(job.request, index)),
                    sequence_start=True,
                    sequence_end=True,
                    step=0,
                    stream_output=False,
                )
                try:
                    async for output in answer:
                        status = output.status.name
                        token_ids += output.token_ids
                        pairs = zip(output.token_ids, output.logprobs or (), strict=True)
                        logprobs += [candidates[token] for token, candidates in pairs]
                finally:
                    del job.running[session_id]
        return Completion(
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish_reason=_finish_reason(status, token_ids, job.request),
            weights_version=self.weights_version,
        )

    # What is refused.

    def _check_request(self, request: GenerateRequest) -> None:
        check_request(request, vocab_size=self._shape.vocab_size, max_model_len=self._max_model_len)
        where, sampling = f"request {request.id!r}", request.sampling
        if sampling.temperature > MAX_TEMPERATURE or sampling.top_k > MAX_TOP_K:
            raise ValueError(
                f"{where}: TurboMind needs a temperature in [0, {MAX_TEMPERATURE:g}] and top_k in [0, {MAX_TOP_K}], "
                f"got {sampling.temperature:g} and {sampling.top_k}"
            )
        if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f"{where}: TurboMind heeds {MAX_STOP_TOKENS} stop tokens at most, got {len(sampling.stop_token_ids)}"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the TurboMind engine is closed")
        if self._broken is not None:
            raise EngineError(f"the TurboMind engine is of no more use: {self._broken}")

    def _check_ready(self) -> None:
        self._check_open()
        if self._is_asleep:
            raise EngineNotReady("the TurboMind engine cannot generate: it is asleep")
        if self._not_ready is not None:
            raise EngineNotReady(f"the TurboMind engine cannot generate: {self._not_ready}")

    def _check_idle(self, action: str) -> None:
        self._check_open()
        if self._in_flight:
            raise EngineBusy(f"the TurboMind engine cannot {action} with {len(self._in_flight)} requests in flight")


async def _cancel(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        for session_id, handle in list(job.running.items()):
            await handle.async_cancel(session_id)


def _finish_reason(status: str, token_ids: Sequence[int], request: GenerateRequest) -> FinishReason:
    """TurboMind says only that a session has ended, or what went wrong."""
    if status == "CANCEL":
        return "abort"
    if status != "FINISH":
        raise EngineError(f"TurboMind ended the request with {status}")
    if token_ids and token_ids[-1] in request.sampling.stop_token_ids:
        return "stop"
    if len(token_ids) < request.sampling.max_new_tokens:
        raise EngineError(
            f"TurboMind ended the request after {len(token_ids)} of {request.sampling.max_new_tokens} tokens without a "
            f"stop token: its cache is too small for prompt and answer"
        )
    return "length"


def _sample_seed(request: GenerateRequest, index: int) -> int:
    """64 bits for each sample of a group, unrelated for neighbours.

    TurboMind's draws depend on a session's seed and its steps so far: a continuation is drawn with a seed of its own,
    as with the same one it would draw again what the beginning was drawn with.
    """
    key = f"{request.sampling.seed}/{request.first_sample + index}"
    if request.num_drawn:
        key += f"/{request.num_drawn}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _device_index(device: str) -> int:
    kind, _, index = device.partition(":")
    number = whole_number(index or "0")
    if kind != "cuda" or number is None or number < 0:
        raise SettingsError(f"engine turbomind runs on CUDA devices only, got {device}")
    return number
