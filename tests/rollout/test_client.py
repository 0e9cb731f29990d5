"""Calls of a worker: what is asked, what comes back, what becomes of a call that fails. Workers are HTTP servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from tests.rollout.answering_worker import RUN, AnsweringWorker, good_answer
from tests.rollout.fleets import VOCAB_SIZE, request
from tests.samples import answer
from xrl.launch.exit import RunFailed
from xrl.rollout import protocol
from xrl.rollout.access import Access, new_key
from xrl.rollout.answers import StaleAnswer, WorkerFault, WorkerRefused
from xrl.rollout.client import Client
from xrl.rollout.process import WorkerGone, WorkerHandle
from xrl.types import Completion, GenerateRequest

ASKED = request(5, 3, num_samples=1)
TIMEOUT_S = 60.0


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(Access(key=new_key(), run_id=RUN), vocab_size=VOCAB_SIZE, num_workers=2)
    yield client
    client.close(TIMEOUT_S)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[AnsweringWorker, WorkerHandle]]]:
    """Starts workers that answer requests by a function; all are closed afterwards."""
    servers: list[AnsweringWorker] = []

    def make(*arguments: Any) -> tuple[AnsweringWorker, WorkerHandle]:
        servers.append(AnsweringWorker(*arguments))
        return servers[-1], worker(servers[-1].port)

    yield make
    for server in servers:
        server.close()


def worker(port: int, *, max_requests: int | None = None) -> WorkerHandle:
    """The second worker, at this port."""
    found = SimpleNamespace(number=1, url=f"http://127.0.0.1:{port}", max_requests=max_requests)
    return cast(WorkerHandle, found)


def ask(
    client: Client, whom: WorkerHandle, *, version: int | None = 0, timeout_s: float = TIMEOUT_S
) -> list[Completion]:
    asking = client.completions(whom, ASKED, version=version, timeout_s=timeout_s)
    return client.wait_for(asking, timeout_s=TIMEOUT_S, doing="answers")


def says(body: bytes, *, status: int = 200) -> Callable[..., Awaitable[web.StreamResponse]]:
    async def answers(*_: object) -> web.StreamResponse:
        return web.Response(body=body, status=status, content_type="application/json")

    return answers


def refuses(kind: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    return says(json.dumps({"type": kind, "error": "no room"}).encode(), status=503)


def test_an_answer_is_that_of_the_weights_that_were_asked_for(client: Client, serve: Any) -> None:
    _, one = serve()
    for found in (ask(client, one), ask(client, one, version=None)):
        assert found == [answer(3, 5, logprobs=[-0.5, -1.5])]
    with pytest.raises(StaleAnswer, match="sampled with weights version 0, not version 3 of this run"):
        ask(client, one, version=3)


def test_every_call_shows_who_we_are_and_wants_nothing_packed(client: Client, serve: Any) -> None:
    seen: list[Any] = []

    async def look(http: web.Request, asked: GenerateRequest) -> web.StreamResponse:
        seen.append(http.headers)
        return web.json_response(good_answer(asked))

    _, one = serve(look)
    ask(client, one)
    assert {name: seen[0][name] for name in client.access.headers} == client.access.headers
    assert seen[0]["Accept-Encoding"] == "identity"


def test_it_can_be_told_which_calls_are_not_answered_yet(client: Client, serve: Any) -> None:
    told: list[str] = []

    async def look(_: web.Request, asked: GenerateRequest) -> web.StreamResponse:
        told.append(client.waits_for())
        return web.json_response(good_answer(asked))

    _, one = serve(look)
    ask(client, one)
    address = one.url.removeprefix("http://")
    assert told == [f"1 answers to /generate of rollout worker 1 ({address}), the longest for 0 s"]
    assert client.waits_for() == ""
    with pytest.raises(WorkerGone):
        ask(client, worker(1))
    assert client.waits_for() == ""


def test_a_worker_that_cannot_is_named_with_what_it_says(client: Client, serve: Any) -> None:
    _, one = serve(refuses("EngineError"))
    with pytest.raises(WorkerRefused, match=r"rollout worker 1 \(127.0.0.1:\d+\): EngineError: no room"):
        ask(client, one)


@pytest.mark.parametrize("kind", ["TransportError", "AccessDenied", "WorkerInUse"])
def test_what_breaks_between_the_two_costs_the_worker(client: Client, serve: Any, kind: str) -> None:
    _, one = serve(refuses(kind))
    with pytest.raises(WorkerGone, match=f"{kind}: no room"):
        ask(client, one)


def test_what_is_no_json_is_the_worker_s_fault(client: Client, serve: Any) -> None:
    _, one = serve(says(b"{"))
    with pytest.raises(WorkerFault, match="is no JSON"):
        ask(client, one)


def test_what_is_no_http_is_the_worker_s_fault(client: Client, serve: Any) -> None:
    async def mumble(http: web.Request, _: GenerateRequest) -> web.StreamResponse:
        assert http.transport is not None
        http.transport.write(b"HTTP/9 hello\r\n\r\n")
        http.transport.close()
        return web.Response()

    _, one = serve(mumble)
    with pytest.raises(WorkerFault, match="/generate: the answer is no HTTP"):
        ask(client, one)


def test_an_answer_longer_than_it_can_be_is_not_read_to_its_end(client: Client, serve: Any) -> None:
    server, one = serve()
    server.says[protocol.WAKE] = {"more": "x" * 1000}
    with pytest.raises(WorkerFault, match="longer than 100 bytes"):
        client.wait_for(
            client.post(one, protocol.WAKE, {}, timeout_s=TIMEOUT_S, limit_bytes=100), timeout_s=TIMEOUT_S, doing="wake"
        )


def test_a_worker_that_does_not_listen_is_gone_and_not_well(client: Client, serve: Any) -> None:
    server, one = serve()
    assert client.wait_for(client.is_well(one), timeout_s=TIMEOUT_S, doing="health")
    server.close()
    nobody = worker(1)
    with pytest.raises(WorkerGone, match="/generate: "):
        ask(client, nobody)
    assert not client.wait_for(client.is_well(nobody), timeout_s=TIMEOUT_S, doing="health")


def test_a_worker_that_is_ill_by_its_own_word_is_not_well(client: Client, serve: Any) -> None:
    server, one = serve()
    server.health = web.json_response({}, status=500)
    assert not client.wait_for(client.is_well(one), timeout_s=TIMEOUT_S, doing="health")


def test_no_answer_in_time_is_a_time_out_that_says_of_what(client: Client, serve: Any) -> None:
    async def hang(*_: object) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    _, one = serve(hang)
    with pytest.raises(TimeoutError, match="no answer to /generate within 0.05 s"):
        ask(client, one, timeout_s=0.05)


def test_a_thread_that_hangs_is_an_error_that_says_at_what(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xrl.rollout.client.SLACK_S", 0.01)
    may_go_on = threading.Event()

    async def hang() -> None:
        may_go_on.wait(TIMEOUT_S)

    with pytest.raises(RunFailed, match=r"a nap: the thread that asks .* has not come to an end within 0.03 s"):
        client.wait_for(hang(), timeout_s=0.01, doing="a nap")
    may_go_on.set()


def test_workers_hear_that_we_are_there_until_we_stop_keeping_them(
    client: Client, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrl.rollout.client.KEEP_ALIVE_S", 0.001)
    heard = threading.Semaphore(0)
    _, one = serve()

    class Session:
        def get(self, url: str, **_: Any) -> Any:
            assert url == one.url + protocol.LEASE
            heard.release()
            raise OSError("it is away for a moment")

        async def close(self) -> None: ...

    monkeypatch.setattr(client, "_http", Session)
    client.keep([])
    assert client._keeping is None
    client.keep([one])
    keeping = client._keeping
    client.keep([one])  # once is enough
    assert client._keeping is keeping
    for _ in range(3):
        assert heard.acquire(timeout=TIMEOUT_S)
    client.stop_keeping()
    assert keeping is not None and keeping.cancelled()


def test_connections_are_shared_out_and_a_worker_s_own_word_bounds_them_too(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("xrl.launch.descriptors.spare_connections", lambda: 101)
    modest = worker(80, max_requests=7)
    assert [client.max_requests(one) for one in (worker(80), modest, worker(80, max_requests=70))] == [50, 7, 50]
    client.say_bound(modest)
    client.say_bound(worker(80))
    assert caplog.text.count("limit of open files") == 1
    assert "at most 7 requests at a time" in caplog.text and "(that of rollout worker 1)" in caplog.text


def test_a_client_may_be_closed_twice(client: Client) -> None:
    client.close(TIMEOUT_S)
    client.close(TIMEOUT_S)
