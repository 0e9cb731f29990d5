"""A worker's connections: strangers' are few and short, and whatever HTTP itself refuses is said in JSON."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rollout.scripted_engine import ANSWER, ScriptedEngine
from tests.rollout.served import Served, served
from xrl.rollout import connections, protocol
from xrl.rollout.connections import MAX_ERROR_LENGTH, Strangers, refusal, short_line

TIMEOUT_S = 60.0
GOOD = {"input_ids": [ANSWER, 5], "n": 2, "max_tokens": 4}


@pytest.fixture
def worker() -> Iterator[Served]:
    engine = ScriptedEngine()
    engine.finish_update(3)
    with served(engine) as found:
        yield found


def test_what_http_itself_refuses_is_json(worker: Served) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("PUT", protocol.GENERATE, 405),
        ("POST", "/xrl/v1/../generate", 404),
    ):
        found, answer = worker.call(path, method=method)
        assert found == status and set(answer) == {"error", "type"}
    assert b'"error"' in raw(worker, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert b'"error"' in raw(worker, b"GET / HTTP/9.9\r\n\r\n")


def raw(worker: Served, content: bytes) -> bytes:
    """All that comes until the worker closes the connection."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(content)
        found = b""
        while piece := connection.recv(2**16):
            found += piece
    return found


def test_a_method_that_a_path_does_not_have_is_answered_with_those_that_it_has(worker: Served) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", worker.port, timeout=TIMEOUT_S)) as connection:
        connection.request("PUT", protocol.GENERATE, b"{}", dict(worker.access.headers))
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Allow")) == (405, "POST")
        assert json.loads(answer.read()) == {
            "error": "PUT /generate: Method Not Allowed",
            "type": "HTTPMethodNotAllowed",
        }


def test_malformed_calls_leave_no_traceback_in_the_log(worker: Served, caplog: pytest.LogCaptureFixture) -> None:
    for content in (b"\0" * 50, b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        assert b'"error"' in raw(worker, content + b"\r\n\r\n")
    assert "Traceback" not in caplog.text


def test_half_open_connections_keep_nobody_out(worker: Served) -> None:
    opened = []
    for _ in range(700):  # more than may wait
        connection = socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT_S)
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nX: ")
        opened.append(connection)
    assert worker.call(protocol.GENERATE, GOOD)[0] == 200
    opened[0].settimeout(TIMEOUT_S)
    assert opened[0].recv(1) == b""  # the oldest went
    for connection in opened:
        connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x"])
def test_a_stranger_who_says_nothing_is_let_go(worker: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "FIRST_CALL_S", 0.02)
    monkeypatch.setattr(connections, "LAST_CHANCE_S", 0.02)
    assert raw(worker, sent) == b""


def test_who_has_shown_the_key_stays_between_two_calls(worker: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_CALL_S", 0.5)
    monkeypatch.setattr(connections, "LAST_CHANCE_S", 0.0)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", worker.port, timeout=TIMEOUT_S)) as connection:
        connection.connect()
        before = connection.sock
        for wait_s in (0.6, 0.0):
            connection.request("POST", protocol.WAKE, b"{}", dict(worker.access.headers))
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"{}")
            assert connection.sock is before  # http.client would open another one
            time.sleep(wait_s)


class Closed:
    """A connection that knows whether it was closed."""

    def __init__(self) -> None:
        self.num_closed = 0

    def force_close(self) -> None:
        self.num_closed += 1


def test_of_too_many_strangers_the_oldest_goes() -> None:
    strangers, came = Strangers(2), [Closed() for _ in range(5)]
    for each in came[:3]:
        strangers.add(each)  # type: ignore[arg-type]
    assert [each.num_closed for each in came] == [1, 0, 0, 0, 0]
    strangers.remove(came[1])  # type: ignore[arg-type]
    strangers.remove(came[0])  # type: ignore[arg-type]
    strangers.add(came[3])  # type: ignore[arg-type]
    assert [each.num_closed for each in came] == [1, 0, 0, 0, 0]
    strangers.add(came[4])  # type: ignore[arg-type]
    assert [each.num_closed for each in came] == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("closes", [True, False])
def test_a_refusal_is_one_line_of_json_and_may_end_the_connection(closes: bool) -> None:
    response: Any = refusal(418, "Teapot", "short\nand\tstout \x1b[2J", closes=closes)
    assert response.status == 418
    assert json.loads(response.text) == {"error": r"short and stout \x1b[2J", "type": "Teapot"}
    assert (response.keep_alive is False) == closes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        (" a \n\n b\t", "a b"),
        ("\x07", r"\x07"),
        ("x" * MAX_ERROR_LENGTH, "x" * MAX_ERROR_LENGTH),
        ("x" * (MAX_ERROR_LENGTH + 1), "x" * (MAX_ERROR_LENGTH - 3) + "..."),
        ("\x1b" * MAX_ERROR_LENGTH, (r"\x1b" * MAX_ERROR_LENGTH)[: MAX_ERROR_LENGTH - 3] + "..."),
    ],
)
def test_a_short_line_is_short_printable_and_one(text: str, line: str) -> None:
    assert short_line(text) == line
