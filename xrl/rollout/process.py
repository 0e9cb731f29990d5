"""One rollout worker as its trainer sees it: a process that is started, awaited and ended, or one on another host."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from xrl.files.disk import NotWritten
from xrl.launch.children import child_environment, module_command
from xrl.launch.exit import RunFailed
from xrl.launch.memory import set_large_pages
from xrl.launch.threads import set_thread_waiting
from xrl.rollout.access import KEY_VARIABLE, Access
from xrl.rollout.answers import WorkerFault, checked_max_requests, checked_port, name_of, parse_json
from xrl.rollout.claims import ask, check_answer

logger = logging.getLogger("xrl")

LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 1 << 16
# The one line that a worker prints.
ANNOUNCEMENT_BYTES = 1 << 16
# A process that was killed is gone at once, unless it hangs in the kernel: in a driver, or over a file system.
KILL_TIMEOUT_S = 10.0
# For one that is about to end to do so by itself, so that what is said about its end is true.
END_TIMEOUT_S = 1.0


class WorkerGone(RunFailed):
    """A worker died or cannot be reached."""


class WorkerHandle(Protocol):
    """A worker, wherever it runs."""

    number: int
    host: str  # where it listens
    url: str  # empty as long as it does not listen
    max_requests: int | None  # at once, by its own word; None as long as it has not said
    is_ours: bool  # whether its process is: it is started here, started again and ended

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended. Does not wait."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it may still answer; may take a moment to find out."""
        ...

    def poll(self) -> bool:
        """Whether it listens by now. Does not wait for it.

        Raises:
            WorkerGone: it ended before it did.
            WorkerFault: what it says is not what a worker says.
        """
        ...

    def claim(self) -> bool:
        """Claim the worker for this run; False if it does not listen yet. A worker that we started is ours anyway.

        Raises:
            SettingsError: it is not for us.
            WorkerFault: what answers there is no worker.
        """
        ...

    def wait_until_listening(self, timeout_s: float) -> None:
        """Raises WorkerGone when it ended, or said nothing in time; the message says where to look."""
        ...

    def restart(self) -> None:
        """End it and start it anew, where that is ours to do. May take KILL_TIMEOUT_S.

        Raises:
            WorkerGone: its process does not end.
            OSError: no other can be started.
        """
        ...

    @property
    def log_place(self) -> str:
        """Where its log is."""
        ...

    def log_tail(self) -> str:
        """Where its log is, and its last lines."""
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
    is_ours = True

    def __init__(
        self,
        number: int,
        arguments: Sequence[str],
        *,
        key: str,
        num_threads: int,
        log: Path,
        python: Path | None = None,
    ) -> None:
        """
        Args:
            arguments: of `python -m xrl.rollout.worker`.
            key: that its calls must show. It gets it in its environment, which nobody else can read.
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
        self._environment[KEY_VARIABLE] = key
        self._environment["OMP_NUM_THREADS"] = str(num_threads)
        set_thread_waiting(self._environment)
        set_large_pages(self._environment)
        with contextlib.suppress(OSError):  # said when the log is opened
            log.parent.mkdir(parents=True, exist_ok=True)
        self._said = b""  # of its announcement, so far
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._said = b""
        with self._opened_log() as file:
            process = subprocess.Popen(
                [*self._command, "--parent-pid", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=self._environment,
            )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)  # half a line is no reason to wait for the other half
        return process

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

    def claim(self) -> bool:
        return bool(self.url)

    def wait_until_listening(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.url:
            self._read_address(0.2)
            if not self.url and time.monotonic() > deadline:
                raise WorkerGone(
                    f"rollout worker {self.number} did not start within {timeout_s:g} s: {self.log_tail()}"
                )

    def _read_address(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:  # `select.select` knows descriptors below 1024 only
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return
        chunk = os.read(self._process.stdout.fileno(), ANNOUNCEMENT_BYTES)
        if not chunk:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its stdout, and lives on
                self._process.wait(END_TIMEOUT_S)
            raise WorkerGone(
                f"rollout worker {self.number} ended at its start with exit code {self._process.returncode}: "
                f"{self.log_tail()}"
            )
        self._said += chunk
        line, newline, _ = self._said.partition(b"\n")
        if len(line) > ANNOUNCEMENT_BYTES:
            raise WorkerFault(name_of(self), f"its first line is longer than {ANNOUNCEMENT_BYTES:,} bytes")
        if newline:
            said = parse_json(line, worker=name_of(self), where="its first line")
            self.max_requests = checked_max_requests(said, worker=name_of(self))
            self.url = f"http://{self.host}:{checked_port(said, worker=name_of(self))}"

    def restart(self) -> None:
        self._kill()
        self.join(0.0)
        self.url = ""
        self._process = self._start()

    def _kill(self) -> None:
        """Raises WorkerGone where it does not end."""
        self._process.kill()
        try:
            self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise WorkerGone(
                f"process {self._process.pid} of rollout worker {self.number} was killed and does not end: it hangs in "
                f"a driver, or over a file system"
            ) from error

    @property
    def log_place(self) -> str:
        return f"its log is {self.log}"

    def log_tail(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError as error:  # somebody has removed it
            return f"{self.log_place}, which cannot be read: {error.strerror}"
        return "\n  ".join([f"the end of {self.log}:", *lines])

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def join(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, and ends when that lets it
                self._process.wait(END_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


class RemoteWorker:
    """A worker that somebody started, on another host as a rule; it is used, never started nor ended."""

    has_ended = False  # nobody tells
    is_ours = False

    def __init__(self, number: int, host: str, port: int, *, access: Access) -> None:
        self.number = number
        self.access = access
        self.host = host
        self.url = f"http://{host}:{port}"
        self.max_requests: int | None = None

    @property
    def is_alive(self) -> bool:
        try:
            return self.poll()
        except WorkerFault:
            return False

    def poll(self) -> bool:
        """Whether it listens, and is ours or could be.

        Raises:
            WorkerFault: what answers there is no worker.
        """
        status, answer = ask(self.url, "GET", self.access)
        return status == 200 and self._hear(answer)

    def claim(self) -> bool:
        """Whether it is ours from now on; False where none answers there yet.

        Raises:
            SettingsError: it is not for us.
            WorkerFault: what answers there is no worker.
        """
        status, answer = ask(self.url, "POST", self.access)
        return check_answer(self.number, self.url, status, answer) and self._hear(answer)

    def _hear(self, answer: dict[str, object]) -> bool:
        self.max_requests = checked_max_requests(answer, worker=name_of(self))
        return True

    def wait_until_listening(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.claim():
            if time.monotonic() > deadline:
                raise WorkerGone(
                    f"rollout worker {self.number} of --rollout-worker-urls did not answer at {self.url} within "
                    f"{timeout_s:g} s: start it there with `xrl worker --host {self.host} ...`"
                )
            time.sleep(0.2)

    def restart(self) -> None:
        raise WorkerGone("it was started elsewhere, and can only be started again there")

    @property
    def log_place(self) -> str:
        return f"its log is where it was started, at {self.url}"

    def log_tail(self) -> str:
        return self.log_place

    def terminate(self) -> None:
        """Do nothing: the worker goes on, for other runs."""
        ask(self.url, "DELETE", self.access, timeout_s=1.0)

    def join(self, timeout_s: float) -> None:
        pass
