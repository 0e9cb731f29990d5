"""What a worker does for those whom its gate lets in: HTTP handlers around an engine.

A caller's fault is answered with 4xx and costs nobody else anything; 5xx is the engine's. No error ends the worker.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from aiohttp import web

from xrl.config.rollout import MAX_SYNC_TIMEOUT_S
from xrl.launch.descriptors import spare_connections
from xrl.rollout import protocol
from xrl.rollout.access import RUN_HEADER, AccessDenied, WorkerInUse
from xrl.rollout.connections import Connection, refusal, short_line
from xrl.rollout.engine import (
    Engine,
    EngineBusy,
    EngineError,
    EngineNotReady,
    HasDestinations,
    WrongWeights,
    check_completion,
)
from xrl.rollout.fields import float_of, int_of, object_from_json, object_of, text_of
from xrl.rollout.gate import Gate, UnknownContent
from xrl.rollout.receivers import Receivers
from xrl.types import Completion, WeightBucket
from xrl.weights.checksum import take_bucket
from xrl.weights.transport import Manifest, Receiver, TransportError

logger = logging.getLogger("xrl")
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# An engine ends an aborted request after the step it is in.
ABORT_TIMEOUT_S = 30.0
# A manifest of thousands of tensors, with handles, has a few megabytes.
MAX_BODY_BYTES = 16 * 2**20
# Of a call to /generate: beside the prompt, and of it for each token.
MAX_GENERATE_BYTES, MAX_TOKEN_BYTES = 64 * 2**10, 24
# Bodies are sent at once.
BODY_TIMEOUT_S = 60.0

# Calls of strangers that the log tells of: it has better uses for its room.
MAX_DENIALS_TOLD = 20


class TooLarge(Exception):
    """A body of more bytes than its call can need."""


class TooSlow(Exception):
    """A body that did not arrive in time."""


# HTTP status of each kind of error; whatever else an engine raises is 500.
STATUS = (
    (AccessDenied, 403),
    (WorkerInUse, 409),
    (UnknownContent, 415),
    (TooLarge, 413),
    (TooSlow, 408),
    (TransportError, 424),  # what this call depended on did not come
    (EngineNotReady, 503),
    (EngineBusy, 409),
    (WrongWeights, 400),
    (EngineError, 500),
    (ValueError, 400),
)


class Calls:
    """The HTTP handlers of one worker, which serves one run at a time."""

    def __init__(
        self, engine: Engine, gate: Gate, *, device: torch.device, max_samples: int, max_prompt_length: int
    ) -> None:
        self.engine = engine
        self.gate = gate
        self.max_samples, self.max_prompt_length = max_samples, max_prompt_length
        self.max_requests = spare_connections()  # at once: each is a connection, and keeps an open file
        self.stopping = asyncio.Event()
        self._receivers = Receivers(device)
        self._weights_run: str | None = None  # whose weights the engine has
        self._numbers = itertools.count()
        self._num_running = self._num_denied = 0
        self._one_layer = asyncio.Lock()  # the trainer tells of the next one while this one is taken
        self._abandoned: set[asyncio.Future[list[Completion]]] = set()
        self._engine_threads = ThreadPoolExecutor(4, thread_name_prefix="engine-calls")

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._serve])  # type: ignore[list-item]
        application.router.add_get(protocol.HEALTH, self.health)
        application.router.add_get(protocol.LEASE, self.keep_lease)
        application.router.add_delete(protocol.LEASE, self.give_lease_back)
        for path, handler in (
            (protocol.LEASE, self.take_lease),
            (protocol.GENERATE, self.generate),
            (protocol.ABORT, self.abort),
            (protocol.SLEEP, self.sleep),
            (protocol.WAKE, self.wake),
            (protocol.CONNECT, self.connect),
            (protocol.LOAD_PART, self.load_part),
            (protocol.FINISH_UPDATE, self.finish_update),
            (protocol.SHUTDOWN, self.shutdown),
        ):
            application.router.add_post(path, handler)
        return application

    @web.middleware
    async def _serve(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        is_known = False
        try:
            is_known = self.gate.admit(http)
            if is_known and isinstance(http.protocol, Connection):
                http.protocol.welcome()
            return await handler(http)
        except web.HTTPException:
            raise  # an unknown path: the connection puts it in JSON
        except RecursionError:
            return refusal(400, "ValueError", "the body is nested too deeply")
        except Exception as error:
            status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
            self._num_denied += isinstance(error, AccessDenied)
            if not isinstance(error, AccessDenied) or self._num_denied <= MAX_DENIALS_TOLD:
                logger.warning("%s: %s: %s", short_line(http.path), type(error).__name__, short_line(str(error)))
            if status == 500 and not isinstance(error, EngineError):
                logger.error("this is a mistake of xrl's or of the engine's", exc_info=error)
            # A stranger's connection is not kept, and of a body that was not read the rest is not waited for.
            return refusal(status, type(error).__name__, str(error), closes=not is_known)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "weights_version": self.engine.weights_version,
                "num_running": self._num_running,
                "max_requests": self.max_requests,
            }
        )

    async def take_lease(self, http: web.Request) -> web.Response:
        """Give the worker to the caller, as any other call does."""
        if self.gate.lease.take(_run_of(http)):
            self.engine.abort()
        return web.json_response({"max_requests": self.max_requests})

    async def keep_lease(self, http: web.Request) -> web.Response:
        """Say whether the caller could have the worker; the run that has it keeps it."""
        self.gate.lease.check_free_for(_run_of(http))
        return web.json_response({"max_requests": self.max_requests})

    async def give_lease_back(self, http: web.Request) -> web.Response:
        self.gate.lease.give_back(_run_of(http))
        return web.json_response({})

    async def generate(self, http: web.Request) -> web.Response:
        body = await _body(http, MAX_GENERATE_BYTES + MAX_TOKEN_BYTES * self.max_prompt_length)
        request = protocol.request_from_json(
            body,
            default_id=f"request-{next(self._numbers)}",
            max_samples=self.max_samples,
            max_prompt_length=self.max_prompt_length,
        )
        running = asyncio.wrap_future(self.engine.submit(request))
        weights_run = self._weights_run  # no update begins while it runs
        self._num_running += 1
        try:
            # Shielded: a cancelled future would say that the request has ended, while the engine is still at it.
            completions = await asyncio.shield(running)
        except asyncio.CancelledError:
            self.engine.abort(request.id)  # the client is gone
            self._abandoned.add(running)
            running.add_done_callback(self._forget)
            raise
        finally:
            self._num_running -= 1
        for completion in completions:
            check_completion(completion)
        num_prompt_tokens = len(request.token_ids)
        if body.get("as_arrays") is True:
            content = protocol.completions_to_bytes(
                completions, num_prompt_tokens=num_prompt_tokens, run_id=weights_run
            )
            return web.Response(body=content, content_type=protocol.ARRAYS)
        answers = [
            protocol.completion_to_json(completion, num_prompt_tokens=num_prompt_tokens, run_id=weights_run)
            for completion in completions
        ]
        return web.json_response(answers if "n" in body else answers[0])

    async def abort(self, http: web.Request) -> web.Response:
        body = await _body(http)
        is_all = body.get("abort_all") is True
        self.engine.abort(None if is_all else text_of(body, "request_id", longest=protocol.MAX_ID_LENGTH))
        return web.json_response({})

    async def sleep(self, http: web.Request) -> web.Response:
        level = text_of(http.query, "level", longest=1, default="1")
        if level not in "12":
            raise ValueError(f"level must be 1 or 2, found {level!r}")
        await self._end_of_abandoned()
        await self._in_engine_thread(lambda: self.engine.sleep(keep_weights=level == "1"))
        return web.json_response({})

    async def wake(self, _: web.Request) -> web.Response:
        await self._in_engine_thread(self.engine.wake)
        return web.json_response({})

    async def connect(self, http: web.Request) -> web.Response:
        body = await _body(http)
        transport = text_of(body, "transport", longest=64)
        invitation = object_of(body, "invitation")
        timeout_s = float_of(body, "timeout_s", low=1e-6, high=MAX_SYNC_TIMEOUT_S)
        receiver = await self._receivers.new(transport, invitation, timeout_s=timeout_s)
        async with self._one_layer:
            self._receivers.install(receiver, _run_of(http))
        return web.json_response({})

    async def load_part(self, http: web.Request) -> web.Response:
        manifest = Manifest.from_json(await _body(http))
        async with self._one_layer:
            receiver = self._receivers.of(_run_of(http), part=manifest.part)
            await self._end_of_abandoned()
            checksum = await self._in_engine_thread(lambda: self._load(receiver, manifest))
        return web.json_response({"checksum": checksum})

    async def finish_update(self, http: web.Request) -> web.Response:
        version = int_of(await _body(http), "version", within=protocol.VERSIONS)
        await self._in_engine_thread(lambda: self.engine.finish_update(version))
        self._weights_run = _run_of(http)
        return web.json_response({"weights_version": self.engine.weights_version, "weights_run": self._weights_run})

    async def shutdown(self, _: web.Request) -> web.Response:
        self.stopping.set()
        return web.json_response({})

    async def _in_engine_thread(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._engine_threads, action)

    async def _end_of_abandoned(self) -> None:
        """Wait until the engine has ended what nobody waits for any more; what needs it idle comes next."""
        if self._abandoned:
            _, running = await asyncio.wait(set(self._abandoned), timeout=ABORT_TIMEOUT_S)
            if running:
                raise TransportError(f"the engine has not ended {len(running)} aborted requests: it is stuck")

    def _forget(self, request: asyncio.Future[list[Completion]]) -> None:
        self._abandoned.discard(request)
        if not request.cancelled():
            request.exception()  # seen, so that asyncio does not warn of it

    def _load(self, receiver: Receiver, manifest: Manifest) -> str:
        """The checksum of what arrived; loaded if it is the sender's. Destinations are written to in any case."""
        tensors = receiver.receive(manifest)
        destinations = self.engine.destinations(manifest.part) if isinstance(self.engine, HasDestinations) else {}
        checksum, tensors = take_bucket(tensors, destinations)
        if checksum == manifest.checksum:
            self.engine.load_part(WeightBucket(version=manifest.version, part=manifest.part, tensors=tensors))
        return checksum


def _run_of(http: web.Request) -> str:
    return http.headers[RUN_HEADER]  # the gate has looked at it


async def _body(http: web.Request, most: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object that a call brings.

    Raises:
        TooLarge, TooSlow: before all of it is read.
        ValueError: it is none.
    """
    size, pieces = http.content_length or 0, []
    if size <= most:
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in http.content.iter_any():
                    size += len(piece)
                    if size > most:
                        break
                    pieces.append(piece)
        except TimeoutError:
            raise TooSlow(f"the body did not come within {BODY_TIMEOUT_S:g} s") from None
        except web.RequestPayloadError as error:
            raise ValueError(f"the body is broken: {error}") from error
    if size > most:
        raise TooLarge(f"a body of this call has at most {most:,} bytes")
    return object_from_json(b"".join(pieces), "the body")
