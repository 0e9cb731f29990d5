"""The process that hosts one rollout engine behind HTTP.

    python -m xrl.rollout.worker --engine embedded --model DIR --dtype float32

It prints one line of JSON, {"port": ..., "pid": ..., "max_requests": ...}, when it listens, and ends when its parent
does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from xrl.launch.hearing import REQUEST_SIGNALS, block_signals, hearing, unblock_signals
from xrl.launch.start import prepare_process, without_collections

if __name__ == "__main__":  # libraries start threads, which must not take signals either
    block_signals()

with without_collections():
    import torch
    from aiohttp import web

from xrl.config import SettingsError
from xrl.config.rollout import SAMPLES_PER_PLACE
from xrl.launch.exit import EXIT_BAD_SETTINGS
from xrl.launch.signals import WAKE, Stopped
from xrl.launch.terminal import say
from xrl.rollout import create_engine
from xrl.rollout.access import shared_key, take_key_from
from xrl.rollout.calls import Calls
from xrl.rollout.connections import Connection, Strangers
from xrl.rollout.engine import Engine
from xrl.rollout.gate import Gate
from xrl.rollout.worker_flags import embedded_options, parse_worker_flags
from xrl.rollout.worker_log import set_up_worker_log

# Connections that may wait to show the key: as many as a trainer opens at once, and these.
SPARE_CONNECTIONS = 512


async def serve(
    engine: Engine,
    *,
    key: str,
    host: str,
    port: int,
    device: torch.device,
    max_batch_size: int,
    max_model_len: int,
    announce: Callable[..., None],
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> None:
    """Answer until told to stop, by `/xrl/v1/shutdown` or a signal.

    Args:
        key: that every call must show.
        max_batch_size: sequences that the engine decodes at once.
        max_model_len: longest prompt + response in tokens.
        announce: called with `port` and `max_requests` once requests are taken.
    """
    gate = Gate(key, host=host, taken_over=engine.abort)
    calls = Calls(
        engine, gate, device=device, max_samples=SAMPLES_PER_PLACE * max_batch_size, max_prompt_length=max_model_len
    )
    runner = web.AppRunner(calls.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    server = runner.server
    assert server is not None
    strangers = Strangers(min(SPARE_CONNECTIONS + 2 * max_batch_size, calls.max_requests))
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server, strangers), host, port, backlog=1024)
    for number in stop_signals:
        loop.add_signal_handler(number, calls.stopping.set)
    announce(port=listening.sockets[0].getsockname()[1], max_requests=calls.max_requests)
    try:
        await calls.stopping.wait()  # Unbounded: a worker serves until it is told to stop.
    finally:
        engine.abort()
        listening.close()
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
        key = "" if flags.key_file is None else f" --rollout-worker-key-file {flags.key_file}"
        # Of IPv6, trainers take a name.
        host = socket.gethostname() if ":" in flags.host else flags.host
        say(
            f"worker: {flags.engine} engine on {flags.device} listens on {flags.host}:{port}; train with "
            f"--rollout-worker-urls {host}:{port}{key}, end it with Ctrl-C or `kill {os.getpid()}`"
        )

    return announce_twice


def _end_with_parent(parent_pid: int) -> None:
    """However the parent ended, SIGKILL too: an orphan would keep its memory and cores."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    prepare_process()
    try:
        arguments = parse_worker_flags()
        key = take_key_from(os.environ)
        if key is None or arguments.key_file is not None:
            key = shared_key(arguments.key_file, flag="--key-file")
    except SettingsError as error:
        _refuse(error)
    set_up_worker_log()
    announce = _take_stdout()
    stop_signals = [signal.SIGTERM]
    if arguments.parent_pid is None:
        # Started by hand, so Ctrl-C ends it; behind a shell's & too, where it starts with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        unblock_signals()
        stop_signals.append(signal.SIGINT)
        announce = _and_in_words(announce, arguments)
        host(arguments, key, announce, stop_signals)
        return
    with hearing(REQUEST_SIGNALS, lambda heard: TrainersSignals(heard.end, arguments.parent_pid).hear):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        threading.Thread(target=_end_with_parent, args=(arguments.parent_pid,), daemon=True).start()
        host(arguments, key, announce, [WAKE])


class TrainersSignals:
    """What signals mean to a worker that a trainer has started: only the trainer ends it.

    A scheduler sends SIGTERM to all processes of a job, a terminal its Ctrl-C. The trainer then stops where nothing is
    lost, and needs its workers until then.
    """

    def __init__(self, end: Callable[[SystemExit], None], trainer: int) -> None:
        """
        Args:
            end: wakes the main thread; as long as nobody there waits for that, it raises.
            trainer: its process id.
        """
        self._end, self._trainer = end, trainer

    def hear(self, number: signal.Signals, sender: int) -> None:
        """React to one signal, in the thread that hears them."""
        if number == signal.SIGTERM and sender == self._trainer:
            self._end(Stopped(number))


def host(
    arguments: argparse.Namespace, key: str, announce: Callable[..., None], stop_signals: Sequence[signal.Signals]
) -> None:
    """Make the engine, and serve it until a signal or `/xrl/v1/shutdown`."""
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
            **embedded_options(arguments),
        )
    except SettingsError as error:
        _refuse(error)
    device = torch.device(arguments.device)
    try:
        asyncio.run(
            serve(
                engine,
                key=key,
                host=arguments.host,
                port=arguments.port,
                device=device,
                max_batch_size=arguments.max_batch_size,
                max_model_len=arguments.max_model_len,
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
