"""Whose a worker is that somebody started: asked of real workers, and of what is none."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.served import Served, served
from xrl.config import SettingsError
from xrl.rollout import claims
from xrl.rollout.access import Access
from xrl.rollout.claims import ask, check_answer, trainers_key

ACCESS = Access(key="k" * 40, run_id="a-run")


@pytest.fixture
def worker() -> Iterator[Served]:
    with served(ScriptedEngine()) as found:
        yield found


@contextlib.contextmanager
def answering(
    body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The address of what answers every call so, and the methods of the calls that came."""
    calls: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            calls.append(self.command)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):  # of an answer that is too long nobody reads the end
                self.wfile.write(body)

        do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
        server.shutdown()
        thread.join(60)


def test_the_trainer_s_key_is_that_of_its_file_and_errors_name_its_flag(tmp_path: Path) -> None:
    file = tmp_path / "worker.key"
    file.touch(mode=0o600)
    file.write_text("k" * 40)
    assert trainers_key(file) == "k" * 40
    file.chmod(0o644)
    with pytest.raises(SettingsError, match=f"--rollout-worker-key-file {file} has mode 0644"):
        trainers_key(file)


def test_a_free_worker_may_be_asked_for_taken_and_given_back(worker: Served) -> None:
    url, mine = f"http://127.0.0.1:{worker.port}", worker.access
    other = Access(key=mine.key, run_id="another")
    status, answer = ask(url, "GET", mine)
    assert status == 200 and check_answer(0, url, status, answer)
    assert ask(url, "GET", other)[0] == 200  # nobody has taken it by that
    assert ask(url, "POST", mine) == (200, answer)
    assert ask(url, "GET", mine)[0] == 200
    for method in ("GET", "POST"):
        status, refused = ask(url, method, other)
        assert (status, refused["type"]) == (409, "WorkerInUse")
        with pytest.raises(
            SettingsError,
            match=rf"rollout worker 4 of --rollout-worker-urls, 127\.0\.0\.1:{worker.port}, is in use by run "
            rf"{mine.run_id} since ",
        ):
            check_answer(4, url, status, refused)
    ask(url, "DELETE", mine)
    assert ask(url, "POST", other)[0] == 200


def test_a_worker_with_another_key_is_refused_with_what_to_do(worker: Served) -> None:
    url = f"http://127.0.0.1:{worker.port}"
    status, refused = ask(url, "POST", ACCESS)
    with pytest.raises(SettingsError, match="has another key: start it with `xrl worker --key-file FILE`, and train "):
        check_answer(0, url, status, refused)


def test_where_nobody_listens_or_nobody_answers_there_is_no_worker_yet() -> None:
    assert ask("http://127.0.0.1:9", "GET", ACCESS) == (0, {})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert ask(f"http://127.0.0.1:{silent.getsockname()[1]}", "POST", ACCESS, timeout_s=0.1) == (0, {})
    assert not check_answer(0, "http://127.0.0.1:9", 0, {})


def test_what_speaks_no_http_is_no_worker() -> None:
    def hang_up() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=hang_up)
        thread.start()
        assert ask(f"http://127.0.0.1:{listening.getsockname()[1]}", "GET", ACCESS) == (0, {})
        thread.join(60)


def test_the_key_is_shown_to_nobody_whom_an_answer_points_to() -> None:
    with (
        answering(b"{}") as (elsewhere, calls),
        answering(b"", status=307, headers={"Location": elsewhere}) as (url, _),
    ):
        status, answer = ask(url, "POST", ACCESS)
        assert (status, answer, calls) == (307, {}, [])
        with pytest.raises(SettingsError, match="answers with status 307: it is no worker of this version of xrl"):
            check_answer(0, url, status, answer)


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 50_000], ids=range(6))
def test_an_answer_that_is_no_object_says_nothing(body: bytes) -> None:
    with answering(body) as (url, _):
        assert ask(url, "GET", ACCESS) == (200, {})


def test_of_an_answer_no_more_is_read_than_a_sentence_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    long = json.dumps({"error": "x" * 2**22}).encode()
    with answering(long) as (url, _):
        assert ask(url, "GET", ACCESS) == (200, {})
    monkeypatch.setattr(claims, "MAX_ANSWER_BYTES", 2 * len(long))
    with answering(long) as (url, _):
        assert ask(url, "GET", ACCESS) == (200, json.loads(long))


def test_a_packed_answer_is_not_unpacked() -> None:
    with answering(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}) as (url, _):
        assert ask(url, "GET", ACCESS) == (200, {})


def test_what_a_worker_says_of_its_use_is_shown_short_and_as_text() -> None:
    answer: dict[str, object] = {"type": "WorkerInUse", "error": "in use by \x1b[2J" + "x" * 1000}
    with pytest.raises(SettingsError) as caught:
        check_answer(0, "http://a:1", 409, answer)
    assert r"is in use by \x1b[2J" in str(caught.value) and len(str(caught.value)) < 600
