"""The embedded engine, but two of a run's workers are killed by it, each once: `--engine tests.e2e.dying_engine:make`.

One in the middle of a rollout, one in the middle of an update. The first to create the file of a death dies it.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from xrl.rollout.embedded.engine import EmbeddedEngine
from xrl.types import Completion, GenerateRequest, WeightBucket

# Weights that are sampled with, or arrive, when it happens.
DIES_SAMPLING, DIES_LOADING = 2, 4


class DyingEngine(EmbeddedEngine):
    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        future = super().submit(request)
        if self.weights_version == DIES_SAMPLING and not request.id.startswith("canary") and _is_first("sampling"):
            threading.Timer(0.01, _die).start()
        return future

    def load_layer(self, bucket: WeightBucket) -> None:
        if (bucket.version, bucket.layer) == (DIES_LOADING, "layers.2") and _is_first("loading"):
            _die()
        super().load_layer(bucket)


def _is_first(death: str) -> bool:
    try:
        (Path(os.environ["XRL_TEST_DEATHS"]) / death).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make(**settings: Any) -> DyingEngine:
    return DyingEngine(**settings)
