"""Workers that somebody started: another run's, another key's, or not there yet."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.served import Served, served
from tests.small_runs import Refusal
from xrl.config import RolloutConfig
from xrl.preflight.workers import check_workers
from xrl.rollout import protocol


@pytest.fixture
def worker() -> Iterator[Served]:
    with served(ScriptedEngine()) as found:
        yield found


@pytest.fixture
def key_file(worker: Served, tmp_path: Path) -> Path:
    file = tmp_path / "worker.key"
    file.touch(mode=0o600)
    file.write_text(worker.access.key)
    return file


def config(worker: Served, key_file: Path) -> RolloutConfig:
    return RolloutConfig(rollout_worker_urls=f"127.0.0.1:{worker.port}", rollout_worker_key_file=key_file)


def test_worker_of_another_run_is_refused_before_anything_is_read(
    worker: Served, key_file: Path, refusal: Refusal
) -> None:
    assert worker.call(protocol.LEASE)[0] == 200
    sentence = refusal(
        *("--rollout-worker-urls", f"127.0.0.1:{worker.port}", "--rollout-worker-key-file", str(key_file))
    )
    start = f"rollout worker 0 of --rollout-worker-urls, 127.0.0.1:{worker.port}, is in use by run "
    assert sentence.startswith(f"{start}{worker.access.run_id} since ")
    assert worker.call(protocol.WAKE)[0] == 200  # it is that run's still


def test_worker_with_another_key_is_refused_with_what_to_do(worker: Served, key_file: Path, refusal: Refusal) -> None:
    key_file.write_text("0" * 64)
    sentence = refusal(
        *("--rollout-worker-urls", f"127.0.0.1:{worker.port}", "--rollout-worker-key-file", str(key_file))
    )
    assert "has another key: start it with `xrl worker --key-file FILE`" in sentence


def test_free_worker_stays_free_and_one_that_is_starting_is_waited_for_later(worker: Served, key_file: Path) -> None:
    check_workers(config(worker, key_file))
    assert worker.call(protocol.LEASE, run_id="another")[0] == 200
    check_workers(RolloutConfig(rollout_worker_urls="127.0.0.1:9", rollout_worker_key_file=key_file))
    check_workers(RolloutConfig())  # no key is looked for where none is needed


def test_what_answers_there_and_is_no_worker_is_refused(key_file: Path, refusal: Refusal) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(418)
            self.end_headers()
            self.wfile.write(json.dumps(["\x1b[2J"]).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = f"127.0.0.1:{server.server_address[1]}"
        sentence = refusal("--rollout-worker-urls", urls, "--rollout-worker-key-file", str(key_file))
        server.shutdown()
    assert sentence.endswith("answers with status 418: it is no worker of this version of xrl")
