"""Worker processes that start at once: forks of a process with the libraries imported, children of this one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_S = 0.005


class WarmProcess:
    """What a fleet uses of `subprocess.Popen`, of a child that was forked elsewhere."""

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._lock = threading.Lock()  # an id must not be asked for, nor killed, once it may be another's

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("a warm worker", timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        self.poll()
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Forks:
    """The process that workers are forked from; it ends with this one."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()  # fleets start workers anew in threads
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", str(Path(__file__).with_name("forked_workers.py")), str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
                pass_fds=[theirs.fileno()],
            )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], *, stderr: int) -> WarmProcess:
        order = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        output_end, output = os.pipe()
        try:
            with self._lock, _orphans_are_ours():
                socket.send_fds(self._control, [order], [output, stderr])
                answer = self._control.recv(64)
        finally:
            os.close(output)
        assert answer, f"the process that workers are forked from ended with exit code {self._process.wait(60)}"
        return WarmProcess(int(answer), os.fdopen(output_end, "rb"))


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _forks() -> _Forks:
    """One for all tests of a process."""
    return _Forks()


class WarmStarts:
    """Stands for the module `subprocess` where workers are started."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    @staticmethod
    def Popen(command: Sequence[str], *, stderr: IO[bytes], env: Mapping[str, str], **streams: int) -> WarmProcess:
        assert streams == {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        place = command.index("xrl.rollout.worker")
        return _forks().start(command[place + 1 :], env, stderr=stderr.fileno())
