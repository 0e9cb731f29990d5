"""Start a command, wait for what it writes, and see that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
# What the project promises: from a signal or a crash to the end of the last process.
SHUTDOWN_LIMIT_S = 15.0
_START_LIMIT_S = 240.0


class Run:
    """A command in a session of its own, its output in files, and every process below it that was seen."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def children(self) -> list[psutil.Process]:
        """Every process below the command, now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until the run has come to some point."""
        deadline = time.monotonic() + _START_LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.stderr[-4000:]}"
            assert time.monotonic() < deadline, f"nothing came of it:\n{self.stderr[-4000:]}"
            time.sleep(0.1)

    def end(self, victim: int, number: signal.Signals) -> int:
        """Send a signal to one process and return the command's exit code once every process of the run has ended."""
        processes = [psutil.Process(self.process.pid), *self.children()]
        os.kill(victim, number)
        deadline = time.monotonic() + SHUTDOWN_LIMIT_S
        code = self.process.wait(SHUTDOWN_LIMIT_S)
        _, left = psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
        assert not left, f"{left} are left:\n{self.stderr[-4000:]}"
        return code


def _as_in_background() -> None:
    """As a shell starts commands in the background, whatever these tests were started by."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _as_by_nohup() -> None:
    _as_in_background()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def started(folder: Path, *command: str, nohup: bool = False, **variables: str) -> Iterator[Run]:
    """Run Python with `command` while the block runs, as `nohup` does or not; whatever is left after it is killed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    folder.mkdir(exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=_as_by_nohup if nohup else _as_in_background,
        )
    processes: list[psutil.Process] = []
    try:
        yield Run(process, folder)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
