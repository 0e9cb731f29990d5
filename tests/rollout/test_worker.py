"""A worker that a person started: it says in words where it listens, and Ctrl-C ends it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_models import make_checkpoint
from xrl.rollout import protocol
from xrl.rollout.access import Access

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
            [sys.executable, "-c", PROGRAM, *needed],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
        )
        started.append(process)
        return process

    yield start_worker
    for process in started:
        process.kill()
        process.communicate()


def lease_status(port: int, key: str) -> int:
    headers = Access(key=key, run_id="by-hand").headers
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", protocol.LEASE, headers=dict(headers))
    return connection.getresponse().status


def test_worker_whose_key_others_can_read_does_not_start(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 40)
    file.chmod(0o644)
    refused = start("--key-file", str(file))
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert errors.startswith(f"xrl: error: --key-file {file} has mode 0644") and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_worker_says_where_it_listens_and_ends_with_ctrl_c(start: Start, tmp_path: Path) -> None:
    worker = start()
    assert worker.stdout is not None and worker.stderr is not None
    port = json.loads(worker.stdout.readline())["port"]
    sentence = worker.stderr.readline()
    assert f"listens on 127.0.0.1:{port}; train with --rollout-worker-urls 127.0.0.1:{port}" in sentence

    key = (tmp_path / "xrl" / "worker.key").read_text().strip()  # made at its first use
    assert lease_status(port, key) == 200
    assert lease_status(port, key.swapcase()) == 403

    second = start("--port", str(port))
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert errors.startswith(f"xrl: error: cannot listen on 127.0.0.1:{port}: ") and len(errors.splitlines()) == 1

    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=60) == 0
