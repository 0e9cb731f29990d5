"""Run a script on several gloo ranks."""

from __future__ import annotations

import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_ON_CPU = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(script: Path, num_ranks: int, *arguments: object, timeout_s: float = 300.0) -> None:
    """Run `script` on several ranks of the CPU; a failure shows what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        order = {
            "num_ranks": num_ranks,
            "words": [str(script), *map(str, arguments)],
            "environment": _environment(),
            "output": str(output),
            "errors": str(errors),
        }
        code = _forks().run(order, timeout_s=timeout_s)
        said = f"{output.read_text()[-2000:]}\n{errors.read_text()[-6000:]}"
    assert code is not None, f"{script.name} {arguments} did not end within {timeout_s:g} s:\n{said}"
    assert code == 0, f"{script.name} {arguments}:\n{said}"


def _environment() -> dict[str, str]:
    return {**os.environ, **_ON_CPU}


class _Forks:
    """The process that ranks are forked from; it ends with this one."""

    def __init__(self) -> None:
        # What the libraries read of the environment at their import stays.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def run(self, order: Mapping[str, object], *, timeout_s: float) -> int | None:
        """The exit code; None: it did not end in time, and was killed with all its ranks."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        leader = self._answer(None)
        try:
            return self._answer(timeout_s)
        except BaseException as error:
            os.killpg(leader, signal.SIGKILL)  # ranks that hang too
            self._answer(None)
            if isinstance(error, TimeoutError):
                return None
            raise

    def _answer(self, timeout_s: float | None) -> int:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError
        line = self._process.stdout.readline()
        assert line, f"the process that ranks are forked from ended with exit code {self._process.wait()}"
        return int(line)


@functools.cache
def _forks() -> _Forks:
    """One for all tests of a process."""
    return _Forks()
