"""In place of LMDeploy's compiled module, where there is no GPU: its interface, its states, its maths on the CPU.

As in the C++ of 0.12.3 and 0.13.0 (src/turbomind: turbomind.cc, models/llama/LlamaWeight.cc, engine/engine.cc):

- room for weights is uninitialised, here NaN; `process_weight` transforms them in place, joins w1 and w3 under another
  name, and cannot be undone
- `sleep` needs the gateway, which it ends: a second `sleep` crashes, and so does a handle from before
- level 2 drops the weights, level 1 moves them to the host, and refuses experts by ending the process
- the memory pool keeps the cache that `sleep` frees, unless someone waits for the device between the free and the trim
- a wrong size ends the process; a failed check is `abort`, not an exception
- answers are computed from the transformed weights, so they show what was really written

Left out: more than one device, shared experts, quantised weights, interactive sessions.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import stand_in_decoder as decoder
import torch
import yaml

MAX_LOGPROBS = 1024
KV_CACHE_BYTES = 96 << 20  # enough to be seen in the size of the process
FINISH, CANCEL, TOO_LONG, FAIL = 7, 8, 6, 5
_SYNCHRONIZED = threading.Event()


def _pretend_cuda() -> None:
    """LMDeploy's converters move tensors to the device and ask what it can do."""
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign,assignment]
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[misc,assignment]
    torch.cuda.set_device = lambda *_: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: _SYNCHRONIZED.set()
    torch.cuda.get_device_properties = lambda *_: type("Hopper", (), {"major": 9, "minor": 0})()  # type: ignore[assignment,method-assign,misc]
    torch.version.cuda = "12.8"


_pretend_cuda()


def _check(condition: object, message: str) -> None:
    """As TM_CHECK: whoever fails it takes the process down."""
    if not condition:
        print(f"stand-in for _turbomind: check failed: {message}", file=sys.stderr, flush=True)
        os.abort()


class DataType(enum.Enum):
    TYPE_INVALID = 0
    TYPE_UINT32 = 1
    TYPE_INT32 = 2
    TYPE_FP16 = 3
    TYPE_FP32 = 4
    TYPE_BF16 = 5


_TYPES = {
    torch.int32: DataType.TYPE_INT32,
    torch.float16: DataType.TYPE_FP16,
    torch.float32: DataType.TYPE_FP32,
    torch.bfloat16: DataType.TYPE_BF16,
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Tensor:
    """Memory of TurboMind's."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def type(self) -> DataType:
        return _TYPES[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def copy_from(self, source: torch.Tensor) -> None:
        _check(self.data.nbytes == source.nbytes, f"{self.shape} {list(source.shape)}: byte_size")
        self.data.view(torch.uint8).view(-1).copy_(source.contiguous().view(torch.uint8).view(-1))

    def __dlpack__(self, *_: object, **__: object) -> Any:
        return self.data.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()


TensorMap = dict


def from_dlpack(array: Any) -> Tensor:
    return Tensor(torch.from_dlpack(array))


class GenerationConfig:
    def __init__(self) -> None:
        self.max_new_tokens = self.min_new_tokens = 0
        self.eos_ids: list[int] = []
        self.stop_ids: list[list[int]] = [[], []]
        self.bad_ids: list[list[int]] = [[], []]
        self.top_k, self.top_p, self.min_p = 1, 0.0, 0.0
        self.temperature = self.repetition_penalty = 1.0
        self.random_seed = self.output_logprobs = self.output_last_hidden_state = self.output_logits = 0


class SessionParam:
    def __init__(self, *, id: int, step: int, start: bool, end: bool) -> None:
        self.id, self.step, self.start, self.end = id, step, start, end


class RequestState:
    def __init__(self, status: int, seq_len: int) -> None:
        self.status, self.seq_len = status, seq_len


class AtomicRequestState:
    def __init__(self) -> None:
        self._state: RequestState | None = None
        self._lock = threading.Lock()

    def exchange(self, state: RequestState | None) -> RequestState | None:
        with self._lock:
            old, self._state = self._state, state
        return old

    def consume(self) -> RequestState | None:
        return self.exchange(None)


class Request:
    """One session: what goes in, what has come out."""

    def __init__(
        self, input_ids: list[int], session: SessionParam, config: GenerationConfig, streams: bool, session_len: int
    ) -> None:
        self.session, self.config, self.streams = session, config, streams
        self.cancelled = False
        self.state = AtomicRequestState()
        self.callback: Callable[[], None] = lambda: None
        self.prompt_len = self.seq_len = len(input_ids)
        self.max_len = min(self.prompt_len + config.max_new_tokens, session_len)
        self.generator = torch.Generator().manual_seed(config.random_seed % 2**63)
        rows = min(config.max_new_tokens, session_len) + 1
        self.outputs = {"output_ids": torch.zeros(session_len + 1, dtype=torch.int32)}
        self.outputs["output_ids"][: self.prompt_len] = torch.tensor(input_ids, dtype=torch.int32)
        if config.output_logprobs:
            self.outputs["logprob_vals"] = torch.zeros(rows, MAX_LOGPROBS)
            self.outputs["logprob_indexes"] = torch.zeros(rows, MAX_LOGPROBS, dtype=torch.int32)
            self.outputs["logprob_nums"] = torch.zeros(rows, dtype=torch.int32)

    @property
    def token_ids(self) -> torch.Tensor:
        return self.outputs["output_ids"][: self.seq_len].long()

    def append(self, probabilities: torch.Tensor, indices: torch.Tensor) -> bool:
        """Draw from the sorted candidates; whether that was the last token."""
        drawn = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self.config.output_logprobs:
            row, count = self.seq_len - self.prompt_len, min(len(indices), MAX_LOGPROBS)
            kept = torch.arange(count)
            if drawn >= MAX_LOGPROBS:
                kept[-1] = drawn
            self.outputs["logprob_vals"][row, :count] = probabilities[kept].log()
            self.outputs["logprob_indexes"][row, :count] = indices[kept].int()
            self.outputs["logprob_nums"][row] = count
        token = int(indices[drawn])
        self.outputs["output_ids"][self.seq_len] = token
        self.seq_len += 1
        return token in self.config.stop_ids[0] or self.seq_len == self.max_len

    def update(self, status: int, seq_len: int) -> None:
        if self.state.exchange(RequestState(status, seq_len)) is None:
            self.callback()


class Engine:
    """The gateway and the thread behind it: every running session gets a token a turn."""

    def __init__(self, weights: decoder.Weights, session_len: int, max_batch_size: int) -> None:
        self.weights, self.session_len, self.max_batch_size = weights, session_len, max_batch_size
        self.cache = torch.full((KV_CACHE_BYTES,), 1, dtype=torch.uint8)
        self.queue: deque[Request] = deque()
        self.running: list[Request] = []
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def push(self, request: Request) -> None:
        with self.changed:
            self.queue.append(request)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()
        del self.cache

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.running or self.closing)
                if self.closing:
                    return
                while self.queue and len(self.running) < self.max_batch_size:
                    self.accept(self.queue.popleft())
            for request in list(self.running):
                self.turn(request)

    def accept(self, request: Request) -> None:
        same = [other for other in self.running if other.session.id == request.session.id]
        if request.cancelled:
            request.update(CANCEL, 0)
        elif request.prompt_len > self.session_len or same:
            request.update(TOO_LONG if not same else 2, 0)
        else:
            self.running.append(request)

    def turn(self, request: Request) -> None:
        if request.cancelled:
            self.running.remove(request)
            request.update(CANCEL, request.seq_len)
            return
        config = request.config
        logits = decoder.last_logits(self.weights, request.token_ids)
        if logits.isnan().any():  # from uninitialised weights: a kernel makes some token of it
            logits = torch.zeros_like(logits)
        try:
            drawn = decoder.candidates(logits, config.temperature, config.top_k, config.top_p, config.min_p)
        except MemoryError:
            self.running.remove(request)
            request.update(FAIL, 0)
            return
        finished = request.append(*drawn)
        if finished:
            self.running.remove(request)
        if finished or request.streams:
            request.update(FINISH if finished else 0, request.seq_len)


class ModelRequest:
    """A handle for requests, one at a time."""

    def __init__(self, engine: Engine | None) -> None:
        _check(engine is not None, "create_request without a gateway")
        self.engine = engine
        self.request: Request | None = None

    def forward(
        self,
        inputs: dict[str, Tensor],
        session: SessionParam,
        config: GenerationConfig,
        streams: bool,
        enable_metrics: bool,
        callback: Callable[[], None],
    ) -> tuple[dict[str, Tensor], AtomicRequestState, None]:
        assert self.engine is not None
        _check(not self.engine.closing, "a request handle from before sleep: its gateway is gone")
        _check(not enable_metrics, "the stand-in keeps no metrics")
        ids = inputs["input_ids"].data.tolist()
        self.request = Request(ids, session, config, streams, self.engine.session_len)
        self.request.callback = callback
        self.engine.push(self.request)
        return {name: Tensor(data) for name, data in self.request.outputs.items()}, self.request.state, None

    def cancel(self) -> None:
        if self.request is not None:
            self.request.cancelled = True


class TurboMind:
    """One model on one device."""

    @staticmethod
    def create(model_dir: str, config: str, weight_type: str) -> TurboMind:
        return TurboMind(yaml.safe_load(config))

    def __init__(self, config: dict[str, Any]) -> None:
        self.model, self.attention, self.options = (
            config[f"{section}_config"] for section in ("model", "attention", "engine")
        )
        _check(self.model["data_type"] in _DTYPES, "data_type")
        _check(len(self.options["devices"]) == 1, "the stand-in has one device")
        self.weights: decoder.Weights | None = None
        self.host: dict[str, torch.Tensor] = {}
        self.engine: Engine | None = None

    def create_weights(self, index: int) -> None:
        self.weights = decoder.Weights(self.model, self.attention, _DTYPES[self.model["data_type"]])

    def get_weights(self, index: int) -> dict[str, Tensor]:
        assert self.weights is not None
        return {name: Tensor(data) for name, data in self.weights.tensors.items()}

    def process_weight(self, index: int) -> None:
        assert self.weights is not None
        self.weights.prepare()

    def create_engine(self, index: int) -> None:
        assert self.weights is not None
        self.engine = Engine(self.weights, self.model["session_len"], self.options["max_batch_size"])

    def sleep(self, index: int, level: int) -> None:
        assert self.weights is not None
        if level == 2:
            self.weights.tensors.clear()
        else:
            _check(not self.model["experts_per_token"], "level 1 sleep not supported for MoE model")
            self.host = dict(self.weights.tensors)
            self.weights.tensors.clear()
        _check(self.engine is not None, "sleep without a gateway")
        assert self.engine is not None
        self.engine.close()
        _SYNCHRONIZED.clear()
        self.pool_holds_cache = not _SYNCHRONIZED.wait(0.05)
        self.engine = None

    def wakeup(self, index: int, tags: list[str]) -> None:
        assert self.weights is not None
        if "weights" in tags:
            if self.host:
                self.weights.tensors, self.host = self.host, {}
            else:
                _check(not self.weights.tensors, "wakeup of weights that are awake")
                self.weights.allocate()
        if "kv_cache" in tags:
            self.create_engine(index)

    def create_request(self) -> ModelRequest:
        return ModelRequest(self.engine)

    def is_dummy_node(self) -> bool:
        return False

    def __del__(self) -> None:
        if self.engine is not None:
            self.engine.close()
