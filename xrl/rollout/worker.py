"""The process that hosts one rollout engine behind HTTP.

    python -m xrl.rollout.worker --engine embedded --model DIR --dtype float32

It prints one line of JSON, {"port": ..., "pid": ..., "max_requests": ...}, when it listens, and ends when its parent
does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from aiohttp import web

from xrl.config import SettingsError
from xrl.launch.descriptors import spare_connections
from xrl.launch.exit import EXIT_BAD_SETTINGS
from xrl.launch.start import prepare_process
from xrl.launch.terminal import printable, say
from xrl.rollout import create_engine, protocol
from xrl.rollout.engine import Engine, EngineError, EngineNotReady, HasRoom
from xrl.rollout.worker_flags import parse_worker_flags
from xrl.types import Completion, WeightBucket
from xrl.weights.checksum import take_layer
from xrl.weights.transport import Manifest, Receiver, TransportError, create_receiver

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# HTTP status of each kind of error; whatever else an engine raises is 500. No error ends the worker.
STATUS = ((EngineNotReady, 503), (EngineError, 500), (ValueError, 400), (KeyError, 400), (TypeError, 400))
# An engine ends an aborted request after the step it is in.
ABORT_TIMEOUT_S = 30.0
# A bucket's manifest is small; prompts of a million tokens are not.
MAX_BODY_BYTES = 256 * 2**20


class Worker:
    """HTTP handlers around an engine."""

    def __init__(self, engine: Engine, *, device: torch.device) -> None:
        self.engine = engine
        self.device = device
        self.receiver: Receiver | None = None  # of the trainer that connected last
        self.max_requests = spare_connections()  # at once: each is a connection, and keeps an open file
        self.stopping = asyncio.Event()
        self._numbers = itertools.count()
        self._num_running = 0
        self._one_layer = asyncio.Lock()  # the trainer tells of the next one while this one is taken
        self._abandoned: set[asyncio.Future[list[Completion]]] = set()

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[_errors_as_json],  # type: ignore[list-item]
            client_max_size=MAX_BODY_BYTES,
        )
        application.router.add_get(protocol.HEALTH, self.health)
        for path, handler in (
            (protocol.GENERATE, self.generate),
            (protocol.ABORT, self.abort),
            (protocol.SLEEP, self.sleep),
            (protocol.WAKE, self.wake),
            (protocol.CONNECT, self.connect),
            (protocol.LOAD_LAYER, self.load_layer),
            (protocol.FINISH_UPDATE, self.finish_update),
            (protocol.SHUTDOWN, self.shutdown),
        ):
            application.router.add_post(path, handler)
        return application

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "weights_version": self.engine.weights_version,
                "num_running": self._num_running,
                "max_requests": self.max_requests,
            }
        )

    async def generate(self, http: web.Request) -> web.Response:
        body = await http.json()
        request = protocol.request_from_json(body, default_id=f"request-{next(self._numbers)}")
        running = asyncio.wrap_future(self.engine.submit(request))
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
        answers = [
            protocol.completion_to_json(completion, num_prompt_tokens=len(request.token_ids))
            for completion in completions
        ]
        return web.json_response(answers if "n" in body else answers[0])

    async def abort(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.engine.abort(None if body.get("abort_all") else str(body["request_id"]))
        return web.json_response({})

    async def sleep(self, http: web.Request) -> web.Response:
        keep_weights = http.query.get("level", "1") == "1"
        await self._end_of_abandoned()
        await asyncio.to_thread(self.engine.sleep, keep_weights=keep_weights)
        return web.json_response({})

    async def wake(self, _: web.Request) -> web.Response:
        await asyncio.to_thread(self.engine.wake)
        return web.json_response({})

    async def connect(self, http: web.Request) -> web.Response:
        await asyncio.to_thread(self._connect, await http.json())
        return web.json_response({})

    async def load_layer(self, http: web.Request) -> web.Response:
        manifest = Manifest.from_json(await http.json())
        async with self._one_layer:
            await self._end_of_abandoned()
            checksum = await asyncio.to_thread(self._load, manifest)
        return web.json_response({"checksum": checksum})

    async def finish_update(self, http: web.Request) -> web.Response:
        version = int((await http.json())["version"])
        await asyncio.to_thread(self.engine.finish_update, version)
        return web.json_response({"weights_version": self.engine.weights_version})

    async def shutdown(self, _: web.Request) -> web.Response:
        self.stopping.set()
        return web.json_response({})

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

    def _connect(self, body: Mapping[str, Any]) -> None:
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None
        self.receiver = create_receiver(
            str(body["transport"]), body["invitation"], timeout_s=float(body["timeout_s"]), device=self.device
        )

    def _load(self, manifest: Manifest) -> str:
        """The checksum of what arrived; loaded if it is the sender's. An engine's room is written to in any case."""
        if self.receiver is None:
            raise TransportError(f"no trainer has connected before it sent {manifest.layer}")
        tensors = self.receiver.receive(manifest)
        room = self.engine.room(manifest.layer) if isinstance(self.engine, HasRoom) else {}
        checksum, tensors = take_layer(tensors, room)
        if checksum == manifest.checksum:
            self.engine.load_layer(WeightBucket(version=manifest.version, layer=manifest.layer, tensors=tensors))
        return checksum


@web.middleware
async def _errors_as_json(http: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(http)
    except web.HTTPException:
        raise
    except Exception as error:
        status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
        print(printable(f"{http.path}: {type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        return web.json_response({"error": str(error), "type": type(error).__name__}, status=status)


async def serve(
    engine: Engine,
    *,
    host: str,
    port: int,
    device: torch.device,
    announce: Callable[..., None],
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> None:
    """Answer until told to stop, by `/xrl/v1/shutdown` or a signal.

    Args:
        announce: called with `port` and `max_requests` once requests are taken.
    """
    worker = Worker(engine, device=device)
    runner = web.AppRunner(worker.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    for number in stop_signals:
        asyncio.get_running_loop().add_signal_handler(number, worker.stopping.set)
    announce(port=runner.addresses[0][1], max_requests=worker.max_requests)
    await worker.stopping.wait()  # Unbounded: this is the worker's life.
    engine.abort()
    await runner.cleanup()


def _take_stdout() -> Callable[..., None]:
    """What announces the worker: the one line on stdout. What else is printed there, by engines too, goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)

    def announce(*, port: int, max_requests: int) -> None:
        line = json.dumps({"port": port, "pid": os.getpid(), "max_requests": max_requests})
        # Whoever started it may know the port already, and not read.
        with contextlib.suppress(BrokenPipeError), os.fdopen(stdout, "w") as file:
            file.write(line + "\n")

    return announce


def _and_in_words(announce: Callable[..., None], flags: argparse.Namespace) -> Callable[..., None]:
    """`announce`, and a sentence on stderr for whoever started the worker by hand."""

    def announce_twice(*, port: int, max_requests: int) -> None:
        announce(port=port, max_requests=max_requests)
        say(
            f"worker: {flags.engine} engine on {flags.device} listens on {flags.host}:{port}; train with "
            f"--rollout-worker-urls {flags.host}:{port}, end it with Ctrl-C or `kill {os.getpid()}`"
        )

    return announce_twice


def _end_with_parent(parent_pid: int) -> None:
    """However the parent ended, SIGKILL too: an orphan would hold memory and cores for ever."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    prepare_process()
    try:
        arguments = parse_worker_flags()
    except SettingsError as error:
        _refuse(error)
    announce = _take_stdout()
    stop_signals = [signal.SIGTERM]
    if arguments.parent_pid is None:
        # Started by hand, so Ctrl-C ends it; behind a shell's & too, where it starts with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop_signals.append(signal.SIGINT)
        announce = _and_in_words(announce, arguments)
    else:
        # Ctrl-C reaches the whole process group: the trainer decides when its workers end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, args=(arguments.parent_pid,), daemon=True).start()
    torch.set_num_threads(arguments.num_threads)
    try:
        engine = create_engine(
            arguments.engine,
            model_dir=arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            max_batch_size=arguments.max_batch_size,
            num_threads=arguments.num_threads,
            max_model_len=arguments.max_model_len,
        )
    except SettingsError as error:
        _refuse(error)
    device = torch.device(arguments.device)
    try:
        asyncio.run(
            serve(
                engine,
                host=arguments.host,
                port=arguments.port,
                device=device,
                announce=announce,
                stop_signals=stop_signals,
            )
        )
    except OSError as error:
        _refuse(SettingsError(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror or error}"))
    finally:
        engine.close()


def _refuse(error: SettingsError) -> NoReturn:
    say(f"error: {error}")
    sys.exit(EXIT_BAD_SETTINGS)


if __name__ == "__main__":
    main()
