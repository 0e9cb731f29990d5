"""An engine that misbehaves on demand, hosted by real worker processes: `--engine tests.rollout.scripted_engine:make`.

The first token of a prompt says what becomes of it; the answers need no model.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np

from xrl.rollout.engine import EngineError, EngineNotReady
from xrl.types import Completion, FinishReason, GenerateRequest, WeightBucket

# No place of a request is among them: an answer holds the stop token, which is the place, once.
ANSWER, FAIL, FAIL_ONCE, HANG, DIE, LINGER, SLOW = range(9000, 9007)
LINGER_S = 0.7
SLOW_S = 2.0


class ScriptedEngine:
    """Answers with the prompt's tokens and the sum of the weights as log-prob."""

    def __init__(self, **_: Any) -> None:
        self.weights_version = -1
        self.total = 0.0
        self.pending = 0.0
        self.failed: set[tuple[int, ...]] = set()
        self.in_flight: dict[str, Future[list[Completion]]] = {}
        self.slow: dict[str, tuple[GenerateRequest, Future[list[Completion]]]] = {}

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        if self.weights_version < 0:
            raise EngineNotReady("no weights yet")
        if request.id in self.in_flight:
            raise ValueError(f"request id {request.id!r} is already in flight")
        future: Future[list[Completion]] = Future()
        action = request.token_ids[0]
        if action == DIE:
            threading.Timer(0.1, os._exit, args=(9,)).start()
        elif action == FAIL or (action == FAIL_ONCE and tuple(request.token_ids) not in self.failed):
            self.failed.add(tuple(request.token_ids))
            future.set_exception(EngineError("scripted failure"))
        elif action == LINGER:
            self.in_flight[request.id] = future
        elif action == SLOW:
            self.slow[request.id] = request, future
            threading.Timer(SLOW_S, self._end_slow, args=(request.id, "stop")).start()
        elif action != HANG:
            future.set_result(self._answers(request, "stop"))
        return future

    def _answers(self, request: GenerateRequest, reason: FinishReason) -> list[Completion]:
        token_ids = list(request.token_ids)
        if reason == "abort":  # not whole yet
            token_ids.pop()
        completion = Completion(
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.full(len(token_ids), -self.total, np.float32),
            finish_reason=reason,
            weights_version=self.weights_version,
        )
        return [completion] * request.num_samples

    def _end_slow(self, name: str, reason: FinishReason) -> None:
        request, future = self.slow.pop(name, (None, None))
        if request is not None and future is not None:
            future.set_result(self._answers(request, reason))

    def abort(self, request_id: str | None = None) -> None:
        """Not at once: as an engine in the middle of a step."""
        for name in list(self.slow) if request_id is None else [request_id]:
            self._end_slow(name, "abort")
        for name in list(self.in_flight) if request_id is None else [request_id]:
            threading.Timer(LINGER_S, self._end, args=(name,)).start()

    def _end(self, name: str) -> None:
        future = self.in_flight.pop(name, None)
        if future is not None:
            future.set_result([])

    def sleep(self, *, keep_weights: bool = True) -> None:
        pass

    def wake(self) -> None:
        pass

    def load_part(self, bucket: WeightBucket) -> None:
        if self.in_flight:
            raise EngineError(f"cannot take weights with {len(self.in_flight)} requests in flight")
        if bucket.part == "bad":
            raise EngineError("tensor w has the wrong shape")
        self.pending += float(sum(tensor.sum() for tensor in bucket.tensors.values()))

    def finish_update(self, version: int) -> None:
        self.weights_version = version
        self.total, self.pending = self.pending, 0.0

    def close(self) -> None:
        pass


def make(**settings: Any) -> ScriptedEngine:
    return ScriptedEngine(**settings)
