"""Start one worker process, wait until it listens, and end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xrl.launch.threads import set_thread_waiting
from xrl.launch.variables import RANK_VARIABLES

LOG_TAIL_LINES = 15


class WorkerProcess:
    """A rollout worker that this process started and will end."""

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
        environment = {
            name: value
            for name, value in os.environ.items()
            # A worker is not part of the trainer's world.
            if name not in RANK_VARIABLES and not name.startswith(("TORCHELASTIC_", "TORCH_NCCL_"))
        }
        environment["OMP_NUM_THREADS"] = str(num_threads)
        set_thread_waiting(environment)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-m", "xrl.rollout.worker", *arguments, f"--parent-pid={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_listening(self, timeout_s: float) -> None:
        """Learn the worker's address.

        Raises:
            RuntimeError: it ended, or said nothing in time; the message ends with the last lines of its log.
        """
        if self.url:
            return
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([self._process.stdout], [], [], 0.2)
            if ready:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rollout worker {self.number} did not start within {timeout_s:g} s: {self.log_tail()}"
                )
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(
                f"rollout worker {self.number} ended at its start with exit code {self._process.returncode}: "
                f"{self.log_tail()}"
            )
        self.url = f"http://127.0.0.1:{json.loads(line)['port']}"

    def log_tail(self) -> str:
        """Where the log is, and its last lines."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n  ".join([f"the end of {self.log}:", *lines])

    def terminate(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Wait for its end; kill it when the time is up."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
