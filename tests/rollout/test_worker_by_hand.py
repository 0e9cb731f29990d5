"""A worker that a person started: it says in words where it listens, and Ctrl-C ends it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_models import make_checkpoint

# As behind a shell's &, SIGINT is ignored when the worker starts.
PROGRAM = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "os.execv(sys.executable, [sys.executable, '-m', 'xrl.cli', 'worker', *sys.argv[1:]])"
)

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    make_checkpoint(tmp_path / "model")
    started: list[subprocess.Popen[str]] = []

    def start_worker(*flags: str) -> subprocess.Popen[str]:
        needed = ["--model", str(tmp_path / "model"), "--max-model-len", "32", *flags]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *needed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start_worker
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_worker_says_where_it_listens_and_ends_with_ctrl_c(start: Start) -> None:
    worker = start()
    assert worker.stdout is not None and worker.stderr is not None
    port = json.loads(worker.stdout.readline())["port"]
    sentence = worker.stderr.readline()
    assert f"listens on 127.0.0.1:{port}; train with --rollout-worker-urls 127.0.0.1:{port}" in sentence

    second = start("--port", str(port))
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert errors.startswith(f"xrl: error: cannot listen on 127.0.0.1:{port}: ") and len(errors.splitlines()) == 1

    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=60) == 0
