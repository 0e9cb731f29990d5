"""An engine that misbehaves on demand, hosted by real worker processes: `--engine tests.rollout.scripted_engine:make`.

The first token of a prompt says what becomes of it; the answers need no model.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Any

from xrl.rollout.engine import EngineError, EngineNotReady
from xrl.types import Completion, GenerateRequest, WeightBucket

ANSWER, FAIL, FAIL_ONCE, HANG, DIE = range(100, 105)


class ScriptedEngine:
    """Answers with the prompt's tokens and the sum of the weights as log-prob."""

    def __init__(self, **_: Any) -> None:
        self.weights_version = -1
        self.total = 0.0
        self.pending = 0.0
        self.failed: set[str] = set()

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        if self.weights_version < 0:
            raise EngineNotReady("no weights yet")
        future: Future[list[Completion]] = Future()
        action = request.token_ids[0]
        if action == DIE:
            threading.Timer(0.1, os._exit, args=(9,)).start()
        elif action == FAIL or (action == FAIL_ONCE and request.id not in self.failed):
            self.failed.add(request.id)
            future.set_exception(EngineError("scripted failure"))
        elif action != HANG:
            completion = Completion(
                token_ids=list(request.token_ids),
                logprobs=[-self.total] * len(request.token_ids),
                finish_reason="stop",
                weights_version=self.weights_version,
            )
            future.set_result([completion] * request.num_samples)
        return future

    def abort(self, request_id: str | None = None) -> None:
        pass

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def load_layer(self, bucket: WeightBucket) -> None:
        if bucket.layer == "bad":
            raise EngineError("tensor w has the wrong shape")
        self.pending += float(sum(tensor.sum() for tensor in bucket.tensors.values()))

    def finish_update(self, version: int) -> None:
        self.weights_version = version
        self.total, self.pending = self.pending, 0.0

    def close(self) -> None:
        pass


def make(**settings: Any) -> ScriptedEngine:
    return ScriptedEngine(**settings)
