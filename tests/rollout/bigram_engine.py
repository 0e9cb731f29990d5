"""An engine small enough to be seen through, which breaks any rule of the contract on demand.

Its model is one matrix: the next token's logits are the row of the last token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from xrl.rollout.engine import EngineError, EngineNotReady
from xrl.types import Completion, GenerateRequest, WeightBucket

VOCAB_SIZE = 12
MAX_MODEL_LEN = 256
# Part of the model -> its tensors.
PARTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "embeddings": {"even": (VOCAB_SIZE // 2, VOCAB_SIZE)},
    "final": {"odd": (VOCAB_SIZE // 2, VOCAB_SIZE)},
}
ALL = {name: size for tensors in PARTS.values() for name, size in tensors.items()}
STEP_S = 0.0005

# What it can be told to do wrong.
FAULTS = (
    "answers without weights",
    "greedy answers vary",
    "log-probs of another temperature",
    "log-probs are of 64 bits",
    "the second update is lost",
    "the last tensor alone is updated",
    "completions carry an old version",
    "the stop token is left out",
    "all samples are one",
    "seeds are ignored",
    "all groups start at their first sample",
    "sleep frees nothing",
    "answers while asleep",
    "wake brings other weights",
    "an update while asleep is lost",
    "abort is ignored",
    "abort ends all",
    "the engine takes weights while it generates",
    "an unknown tensor is an error of Python",
    "an incomplete update is accepted",
    "tensors are used after load_part",
    "a request that cannot run is cut short",
    "answers after close",
)


class BigramEngine:
    """See `xrl.rollout.engine.Engine`."""

    def __init__(self, fault: str | None = None) -> None:
        assert fault is None or fault in FAULTS
        self.fault = fault
        self.weights_version = -1
        self.weights: dict[str, Tensor] = {}
        self.arriving: dict[str, Tensor] = {}
        self.updating: int | None = None
        self.in_flight: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.is_asleep = self.is_closed = False
        self.num_answers = 0
        self.cache_bytes = 0

    def has(self, fault: str) -> bool:
        return self.fault == fault

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        sampling, future = request.sampling, Future[list[Completion]]()
        if not request.token_ids or max(request.token_ids) >= VOCAB_SIZE or request.num_samples < 1:
            raise ValueError("the request cannot run")
        if not 0 <= request.num_drawn < len(request.token_ids) or request.first_sample < 0:
            raise ValueError("no such place in a group")
        too_long = len(request.token_ids) + sampling.max_new_tokens > MAX_MODEL_LEN
        if too_long and not self.has("a request that cannot run is cut short"):
            raise ValueError("the request exceeds max_model_len")
        with self.lock:
            if self.is_closed and not self.has("answers after close"):
                raise EngineError("closed")
            if self.is_asleep and not self.has("answers while asleep"):
                raise EngineNotReady("asleep")
            if (self.updating is not None or not self.weights) and not self.has("answers without weights"):
                raise EngineNotReady("no complete weights")
            if request.id in self.in_flight:
                raise ValueError("already in flight")
            stop = self.in_flight[request.id] = threading.Event()
        thread = threading.Thread(target=self._answer, args=(request, stop, future), daemon=True)
        self.threads.append(thread)
        thread.start()
        return future

    def _answer(self, request: GenerateRequest, stop: threading.Event, future: Future[list[Completion]]) -> None:
        if not self.has("sleep frees nothing") or not self.is_asleep:
            self.cache_bytes = 1000
        completions = [self._sample(request, place, stop) for place in range(request.num_samples)]
        with self.lock:
            del self.in_flight[request.id]
        future.set_result(completions)

    def _sample(self, request: GenerateRequest, place: int, stop: threading.Event) -> Completion:
        sampling, generator = request.sampling, torch.Generator()
        seed = 0 if self.has("seeds are ignored") else sampling.seed
        if not self.has("all groups start at their first sample"):
            place += request.first_sample
        generator.manual_seed(1000 * seed + (0 if self.has("all samples are one") else place))
        ids, logprobs, reason = list(request.token_ids), [], "length"
        while len(ids) < min(len(request.token_ids) + sampling.max_new_tokens, MAX_MODEL_LEN):
            time.sleep(STEP_S)
            if stop.is_set():
                reason = "abort"
                break
            last = ids[-1]
            half = self.weights.get("odd" if last % 2 else "even")
            row = torch.zeros(VOCAB_SIZE) if half is None else half[last // 2]
            greedy = sampling.temperature == 0
            temperature = 1.0 if greedy or self.has("log-probs of another temperature") else sampling.temperature
            logp = (row / temperature).log_softmax(-1)
            self.num_answers += 1
            if greedy:
                token = int(row.argmax()) if not self.has("greedy answers vary") else self.num_answers % VOCAB_SIZE
            else:
                token = int(torch.multinomial((row / sampling.temperature).softmax(-1), 1, generator=generator))
            if token in sampling.stop_token_ids:
                reason = "stop"
                if self.has("the stop token is left out"):
                    break
            ids.append(token)
            logprobs.append(float(logp[token]))
            if reason == "stop":
                break
        version = self.weights_version - self.has("completions carry an old version")
        return Completion(
            token_ids=np.array(ids[len(request.token_ids) :], np.int32),
            logprobs=np.array(logprobs, np.float64 if self.has("log-probs are of 64 bits") else np.float32),
            finish_reason=reason,  # type: ignore[arg-type]
            weights_version=version,
        )

    def abort(self, request_id: str | None = None) -> None:
        if self.has("abort is ignored"):
            return
        with self.lock:
            for name, stop in self.in_flight.items():
                if request_id in (None, name) or self.has("abort ends all"):
                    stop.set()

    def sleep(self, *, keep_weights: bool = True) -> None:
        self._check_idle()
        self.is_asleep = True
        if not self.has("sleep frees nothing"):
            self.cache_bytes = 0
        if not keep_weights:
            self.weights = {}

    def wake(self) -> None:
        if self.has("wake brings other weights"):
            self.weights = {name: -tensor for name, tensor in self.weights.items()}
        self.is_asleep = False

    def load_part(self, bucket: WeightBucket) -> None:
        self._check_idle()
        if bucket.version != self.updating:
            self.updating, self.arriving = bucket.version, {}
        for name, tensor in bucket.tensors.items():
            expected = PARTS[bucket.part].get(name)
            if expected is None and self.has("an unknown tensor is an error of Python"):
                raise KeyError(name)
            if expected != tuple(tensor.shape):
                raise EngineError(f"{bucket.part}: {name} is unknown or of the wrong shape")
            self.arriving[name] = tensor if self.has("tensors are used after load_part") else tensor.clone()

    def finish_update(self, version: int) -> None:
        missing = [name for names in PARTS.values() for name in names if name not in self.arriving]
        if missing and not self.has("an incomplete update is accepted"):
            raise EngineError(f"missing {', '.join(missing)}")
        lost = self.has("the second update is lost") and self.weights_version >= 0
        if lost or (self.has("an update while asleep is lost") and self.is_asleep):
            self.arriving = {name: self.weights.get(name, torch.ones(size)) for name, size in ALL.items()}
        if self.has("the last tensor alone is updated"):
            self.arriving["even"] = self.weights.get("even", self.arriving["even"])
        self.weights, self.arriving, self.updating, self.weights_version = self.arriving, {}, None, version

    def close(self) -> None:
        self.is_closed = True
        with self.lock:
            for stop in self.in_flight.values():  # not by `abort`, which may be at fault
                stop.set()
        for thread in self.threads:  # one that computes at the interpreter's end would abort the process
            thread.join()

    def _check_idle(self) -> None:
        if self.in_flight and not self.has("the engine takes weights while it generates"):
            raise EngineError("requests in flight")
