"""A worker's receivers: whose the present one is, and waits for trainers that never come."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.rollout.scripted_engine import ANSWER, ScriptedEngine
from tests.rollout.served import Served, served
from xrl.rollout import protocol, receivers
from xrl.rollout.engine import EngineNotReady
from xrl.rollout.receivers import Receivers
from xrl.types import WeightBucket
from xrl.weights.checksum import bucket_checksum
from xrl.weights.transport import Manifest, TransportError
from xrl.weights.transport.shared_memory import Sender

TIMEOUT_S = 60.0
CPU = torch.device("cpu")


class Closed:
    """A receiver that knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Late:
    """A publisher that comes when a test says so: `create_receiver` waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.comes = threading.Event()
        self.receivers: list[Any] = []
        monkeypatch.setattr(receivers, "create_receiver", self._create)
        monkeypatch.setattr(receivers, "CONNECT_GRACE_S", 0.0)

    def _create(self, *_: Any, **__: Any) -> Closed:
        assert self.comes.wait(TIMEOUT_S)
        self.receivers.append(Closed())
        return self.receivers[-1]


def test_layers_are_received_through_what_a_run_has_connected() -> None:
    async def connect() -> Receivers:
        found = Receivers(CPU)
        found.install(await found.new("shared_memory", {}, timeout_s=TIMEOUT_S), "a-run")
        return found

    found, sender = asyncio.run(connect()), Sender()
    bucket = WeightBucket(version=4, part="layers.0", tensors={"w": torch.arange(3.0)})
    manifest = Manifest.of(bucket, where=sender.put(bucket), checksum=bucket_checksum(bucket.tensors))
    tensors = found.of("a-run", part="layers.0").receive(manifest)
    assert tensors["w"].tolist() == [0.0, 1.0, 2.0]
    del tensors
    sender.close()


def test_who_has_not_connected_is_told_so_whoever_else_has() -> None:
    found = Receivers(CPU)
    for run_id in ("a-run", "another"):
        with pytest.raises(TransportError, match=r"no trainer of this run has connected before it sent layers\.0"):
            found.of(run_id, part="layers.0")
        found.install(Closed(), "a-run")  # type: ignore[arg-type]
    assert isinstance(found.of("a-run", part="layers.0"), Closed)


def test_a_new_receiver_takes_the_place_of_the_last_which_is_closed() -> None:
    found, first, second = Receivers(CPU), Closed(), Closed()
    found.install(first, "a-run")  # type: ignore[arg-type]
    assert not first.closed.is_set()
    found.install(second, "another")  # type: ignore[arg-type]
    assert first.closed.is_set() and not second.closed.is_set()
    assert found.of("another", part="final") is second  # type: ignore[comparison-overlap]
    with pytest.raises(TransportError):
        found.of("a-run", part="final")


def test_an_invitation_that_cannot_be_right_is_refused_as_often_as_it_comes() -> None:
    async def refuse() -> None:
        found = Receivers(CPU)
        for _ in range(2 * receivers.MAX_CONNECTING):
            with pytest.raises(ValueError, match="pigeon"):
                await found.new("pigeon", {}, timeout_s=TIMEOUT_S)

    asyncio.run(refuse())


def test_only_so_many_wait_at_once_and_others_are_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch)

    async def connect() -> None:
        found = Receivers(CPU)
        waiting = [
            asyncio.create_task(found.new("any", {}, timeout_s=TIMEOUT_S)) for _ in range(receivers.MAX_CONNECTING)
        ]
        await asyncio.sleep(0)
        with pytest.raises(EngineNotReady, match=f"{receivers.MAX_CONNECTING} other connects are under way"):
            await found.new("any", {}, timeout_s=TIMEOUT_S)
        late.comes.set()
        assert set(await asyncio.gather(*waiting)) == set(late.receivers)
        assert await found.new("any", {}, timeout_s=TIMEOUT_S) is late.receivers[-1]

    asyncio.run(connect())
    assert not any(each.closed.is_set() for each in late.receivers)


def test_who_comes_after_nobody_waits_any_more_is_closed_and_counts_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = Late(monkeypatch)
    monkeypatch.setattr(receivers, "MAX_STUCK", 2)

    async def connect() -> None:
        found = Receivers(CPU)
        with pytest.raises(TransportError, match=r"the publisher has said nothing for 0\.01 s"):
            await found.new("any", {}, timeout_s=0.01)
        hung_up = asyncio.create_task(found.new("any", {}, timeout_s=TIMEOUT_S))
        await asyncio.sleep(0)
        hung_up.cancel()
        await asyncio.wait([hung_up], timeout=TIMEOUT_S)
        assert hung_up.cancelled()
        with pytest.raises(EngineNotReady, match="2 other connects are under way"):
            await found.new("any", {}, timeout_s=TIMEOUT_S)
        late.comes.set()
        while not (len(late.receivers) == 2 and all(each.closed.is_set() for each in late.receivers)):
            await asyncio.sleep(0.001)
        assert await found.new("any", {}, timeout_s=TIMEOUT_S) is late.receivers[-1]

    asyncio.run(connect())
    assert not late.receivers[-1].closed.is_set()


@pytest.fixture
def worker() -> Iterator[Served]:
    engine = ScriptedEngine()
    engine.finish_update(3)
    with served(engine) as found:
        yield found


def test_waits_for_trainers_that_never_come_hold_nothing_else_up(
    worker: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "CONNECT_GRACE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(12) as callers:
        invitation = {"host": "127.0.0.1", "port": silent.getsockname()[1], "backend": "gloo", "prefix": "x"}
        body = {"transport": "broadcast", "invitation": invitation | {"secret": "0" * 64}, "timeout_s": 1}
        found = [callers.submit(worker.call, protocol.CONNECT, body) for _ in range(12)]
        assert worker.call(protocol.WAKE)[0] == 200
        assert worker.call(protocol.GENERATE, {"input_ids": [ANSWER, 5], "n": 2, "max_tokens": 4})[0] == 200
        statuses = [future.result(TIMEOUT_S)[0] for future in found]
    assert set(statuses) <= {424, 503} and statuses.count(424) >= receivers.MAX_CONNECTING
