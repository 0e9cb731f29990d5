"""The process around an engine: one that a person started, and one that a trainer did; whatever ends them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.rollout.fleets import ENGINE, ROOT, MakeFleet, generate, request
from tests.rollout.scripted_engine import SLOW
from tests.tiny_models import make_checkpoint
from xrl.rollout import protocol
from xrl.rollout.access import Access
from xrl.rollout.fleet import Fleet, RolloutCounts

TIMEOUT_S = 60.0
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


# One that a trainer started.


def test_ctrl_c_of_the_process_group_does_not_end_a_worker(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    os.kill(fleet.workers[0]._process.pid, signal.SIGINT)
    results, _ = generate(fleet, [request(0)])
    assert results[0]


def call(fleet: Fleet, path: str) -> int:
    """The status of a call of the first worker, by hand."""
    port = int(fleet.workers[0].url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", path, b"{}", dict(fleet.headers))
    return connection.getresponse().status


@pytest.mark.parametrize("how", ["a call", "a signal"])
def test_a_worker_that_is_told_to_end_does_so_even_while_it_generates(make_fleet: MakeFleet, how: str) -> None:
    fleet = make_fleet(1, rollout_max_restarts=0)
    stream = fleet.generate([request(0), request(1, SLOW)], RolloutCounts())
    next(stream)
    process = fleet.workers[0]._process
    if how == "a call":
        assert call(fleet, protocol.SHUTDOWN) == 200
    else:
        process.terminate()
    assert process.wait(TIMEOUT_S) == 0


def test_a_worker_says_nothing_but_where_it_listens_on_its_standard_output(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, engine="tests.rollout.talkative_engine:make")
    worker = fleet.workers[0]
    assert generate(fleet, [request(0)])[0][0]
    fleet.close()
    assert worker.log.read_text().split() == ["born", "written", "asked"]


@pytest.mark.slow
def test_workers_end_when_their_trainer_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from xrl.config import RolloutConfig
from xrl.rollout.fleet import Fleet
fleet = Fleet(RolloutConfig(engine={ENGINE!r}), model_dir=Path("."), dtype="float32", devices=["cpu"] * 2,
                  num_threads=1, max_model_len=8, vocab_size=9, log_dir=Path({str(tmp_path)!r}))
fleet.wait_until_ready()
print("ready", flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
    workers = psutil.Process(trainer.pid).children()
    assert len(workers) == 2
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive


def test_workers_and_what_asks_them_import_no_transformers_and_no_megatron() -> None:
    """Each rank of a run imports what asks them; rank 0 alone needs a tokenizer."""
    code = (
        "import sys, xrl.rollout.worker, xrl.rollout.embedded.engine, xrl.experience.collect, xrl.experience.evaluate; "
        "print({m.split('.')[0] for m in sys.modules} & {'transformers', 'megatron', 'datasets'})"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
