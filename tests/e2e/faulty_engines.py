"""The embedded engine with something wrong: `--engine tests.e2e.faulty_engines:DyingEngine` say."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from xrl.rollout.embedded.engine import EmbeddedEngine
from xrl.types import Completion, GenerateRequest, WeightBucket

# Weights that are sampled with, or arrive, when it happens.
DIES_SAMPLING, DIES_LOADING = 2, 4


class DyingEngine(EmbeddedEngine):
    """Two of a run's workers are killed, each once: in the middle of a rollout and in the middle of an update.

    The first to create the file of a death dies it.
    """

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        future = super().submit(request)
        if self.weights_version == DIES_SAMPLING and not request.id.startswith("canary") and _is_first("sampling"):
            threading.Timer(0.01, _die).start()
            return Future()  # whoever asked gets no answer, however fast the engine has one
        return future

    def load_part(self, bucket: WeightBucket) -> None:
        if (bucket.version, bucket.part) == (DIES_LOADING, "layers.2") and _is_first("loading"):
            _die()
        super().load_part(bucket)


class TwiceDyingEngine(EmbeddedEngine):
    """Dies in an update, is started again, and dies in the same one, at the next layer."""

    def load_part(self, bucket: WeightBucket) -> None:
        if (bucket.version, bucket.part) in ((2, "layers.1"), (2, "layers.2")) and _is_first(bucket.part):
            _die()
        super().load_part(bucket)


class MisstatingEngine(EmbeddedEngine):
    """Says of all answers but the canary's that they are less likely than they are."""

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        future = super().submit(request)
        if request.id.startswith("canary"):
            return future
        misstated: Future[list[Completion]] = Future()
        future.add_done_callback(lambda done: misstated.set_result([_less_likely(c) for c in done.result()]))
        return misstated


def _less_likely(completion: Completion) -> Completion:
    return dataclasses.replace(completion, logprobs=completion.logprobs - np.float32(0.5))


def _is_first(death: str) -> bool:
    try:
        (Path(os.environ["XRL_TEST_DEATHS"]) / death).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SwappingEngine(EmbeddedEngine):
    """Takes each of a layer's two norms for the other."""

    def load_part(self, bucket: WeightBucket) -> None:
        swapped = {_other_norm(name): tensor for name, tensor in bucket.tensors.items()}
        super().load_part(dataclasses.replace(bucket, tensors=swapped))


def _other_norm(name: str) -> str:
    first, second = "input_layernorm", "post_attention_layernorm"
    return name.replace(first, second) if first in name else name.replace(second, first)


class MendingEngine(EmbeddedEngine):
    """Samples with 0 where a weight is not a number."""

    def load_part(self, bucket: WeightBucket) -> None:
        mended = {name: tensor.nan_to_num() for name, tensor in bucket.tensors.items()}
        super().load_part(dataclasses.replace(bucket, tensors=mended))


class NotingEngine(EmbeddedEngine):
    """Notes in the file XRL_TEST_NOTES what was asked of it."""

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        self._note("submit")
        return super().submit(request)

    def load_part(self, bucket: WeightBucket) -> None:
        self._note("load")
        super().load_part(bucket)

    def sleep(self, *, keep_weights: bool = True) -> None:
        self._note("sleep with weights" if keep_weights else "sleep")
        super().sleep(keep_weights=keep_weights)

    def wake(self) -> None:
        super().wake()
        self._note("wake")

    def _note(self, what: str) -> None:
        with open(os.environ["XRL_TEST_NOTES"], "a") as file:
            file.write(what + "\n")
