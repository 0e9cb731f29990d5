"""One rollout worker as its trainer sees it: a process that is started, awaited and ended, or one on another host."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import selectors
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from xrl.files.disk import NotWritten
from xrl.launch.children import child_environment, module_command
from xrl.launch.memory import set_large_pages
from xrl.launch.threads import set_thread_waiting
from xrl.rollout import protocol

logger = logging.getLogger("xrl")

LOG_TAIL_LINES = 15
# Never through a proxy, as requests don't go through one.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class WorkerGone(RuntimeError):
    """A worker died or cannot be reached."""


class WorkerHandle(Protocol):
    """A worker, wherever it runs."""

    number: int
    host: str  # where it listens
    url: str  # empty as long as it does not listen
    max_requests: int | None  # at once, by its own word; None as long as it has not said

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended. Does not wait."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it may still answer; may take a moment to find out."""
        ...

    def poll(self) -> bool:
        """Whether it listens by now. Does not wait."""
        ...

    def wait_until_listening(self, timeout_s: float) -> None:
        """Raises RuntimeError when it ended, or said nothing in time; the message says where to look."""
        ...

    def restart(self) -> bool:
        """End it and start it anew, where that is ours to do: returns whether it is."""
        ...

    def log_tail(self) -> str:
        """Where its log is, and the last lines."""
        ...

    def terminate(self) -> None:
        """Ask it to end, where we started it."""
        ...

    def join(self, timeout_s: float) -> None:
        """Wait for its end; kill it when the time is up."""
        ...


class WorkerProcess:
    """A rollout worker that this process started and will end."""

    host = "127.0.0.1"

    def __init__(
        self, number: int, arguments: Sequence[str], *, num_threads: int, log: Path, python: Path | None = None
    ) -> None:
        """
        Args:
            arguments: of `python -m xrl.rollout.worker`.
            python: interpreter of another environment, where xrl can be imported too; None for this one.
        """
        self.number = number
        self.log = log
        self.url = ""
        self.max_requests: int | None = None
        self._command = [*module_command("xrl.rollout.worker", python=python), *arguments]
        # A worker is not part of the trainer's world.
        self._environment = {
            name: value for name, value in child_environment().items() if not name.startswith("TORCH_NCCL_")
        }
        self._environment["OMP_NUM_THREADS"] = str(num_threads)
        set_thread_waiting(self._environment)
        set_large_pages(self._environment)
        with contextlib.suppress(OSError):  # said when the log is opened
            log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._opened_log() as file:
            return subprocess.Popen(
                [*self._command, "--parent-pid", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=self._environment,
            )

    def _opened_log(self) -> IO[bytes]:
        """The log; where it cannot be written, nothing that keeps what is written: a log is not worth a worker."""
        try:
            return self.log.open("ab")
        except OSError as error:
            logger.warning("%s; rollout worker %d goes without", NotWritten(self.log, error, num_bytes=0), self.number)
            return open(os.devnull, "ab")

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def is_alive(self) -> bool:
        return not self.has_ended

    def poll(self) -> bool:
        if not self.url:
            self._read_address(0.0)
        return bool(self.url)

    def wait_until_listening(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.url:
            self._read_address(0.2)
            if not self.url and time.monotonic() > deadline:
                raise RuntimeError(
                    f"rollout worker {self.number} did not start within {timeout_s:g} s: {self.log_tail()}"
                )

    def _read_address(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:  # `select.select` knows descriptors below 1024 only
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(
                f"rollout worker {self.number} ended at its start with exit code {self._process.returncode}: "
                f"{self.log_tail()}"
            )
        said = json.loads(line)
        self.max_requests = said["max_requests"]
        self.url = f"http://{self.host}:{said['port']}"

    def restart(self) -> bool:
        self._process.kill()
        self.join(0.0)
        self.url = ""
        self._process = self._start()
        return True

    def log_tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError as error:
            return f"its log {self.log} cannot be read: {error.strerror}"
        return "\n  ".join([f"the end of {self.log}:", *lines])

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def join(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class RemoteWorker:
    """A worker that somebody started, on another host as a rule; it is used, never started nor ended."""

    has_ended = False  # nobody tells

    def __init__(self, number: int, host: str, port: int) -> None:
        self.number = number
        self.host = host
        self.url = f"http://{host}:{port}"
        self.max_requests: int | None = None

    @property
    def is_alive(self) -> bool:
        return self.poll()

    def poll(self) -> bool:
        try:
            with _DIRECTLY.open(self.url + protocol.HEALTH, timeout=2.0) as answer:
                self.max_requests = json.load(answer).get("max_requests")
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def wait_until_listening(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rollout worker {self.number} of --rollout-worker-urls did not answer at {self.url} within "
                    f"{timeout_s:g} s: start it there with `xrl worker --host {self.host} ...`"
                )
            time.sleep(0.2)

    def restart(self) -> bool:
        return False

    def log_tail(self) -> str:
        return f"its log is where it was started, at {self.url}"

    def terminate(self) -> None:
        pass

    def join(self, timeout_s: float) -> None:
        pass
