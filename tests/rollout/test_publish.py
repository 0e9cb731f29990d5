"""Updates of real worker processes, and what can go wrong with one: bytes, workers, versions."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.fleets import ENGINE, MakeFleet, bucket, generate, request
from xrl.config import SettingsError
from xrl.rollout import protocol
from xrl.rollout.access import new_key
from xrl.rollout.fleet import Fleet, WorkerGone
from xrl.rollout.process import WorkerHandle, WorkerProcess
from xrl.rollout.publish import CorruptedWeights, NoneUpdated, WeightStream
from xrl.types import WeightBucket
from xrl.weights.transport import broadcast, shared_memory

TRANSPORTS = ["shared_memory", "broadcast"]


class FaultyNetwork(broadcast.Sender):
    """Flips a bit of one part's bytes on their way, so many times."""

    def __init__(self, part: str, *, times: int) -> None:
        super().__init__(timeout_s=20.0, device=torch.device("cpu"))
        self.part, self.times = part, times

    def send(self, worker: int, bucket: WeightBucket) -> None:
        if bucket.part == self.part and self.times:
            self.times -= 1
            changed = {name: tensor.clone() for name, tensor in bucket.tensors.items()}
            changed["w"].view(torch.uint8)[1] ^= 4
            bucket = dataclasses.replace(bucket, tensors=changed)
        super().send(worker, bucket)


class FaultyMemory(shared_memory.Sender):
    """A byte of one layer changes after it was written."""

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        where = super().put(bucket)
        if bucket.part == "layers.2":
            assert self._memory is not None
            self._memory[where["offsets"][0] + 1] ^= 4
        return where


def layers(version: int, *, number: int = 4) -> Iterator[WeightBucket]:
    for index in range(number):
        yield bucket(f"layers.{index}", float(version + index), version=version, size=5)


def total(version: int, *, number: int = 4) -> float:
    return 5.0 * sum(version + index for index in range(number))


def interrupt(buckets: Iterator[WeightBucket], fleet: Fleet, number: signal.Signals) -> Iterator[WeightBucket]:
    """The same buckets, but worker 0 gets a signal after the first."""
    yield next(buckets)
    fleet.workers[0]._process.send_signal(number)
    yield from buckets


def wait_until_back(fleet: Fleet, number: int) -> None:
    """Until a worker that was lost, and is started again, listens."""
    deadline = time.monotonic() + 60
    while not any(worker.number == number for worker in fleet.reachable()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def call(
    fleet: Fleet, number: int, path: str, body: object = None, *, method: str = "POST", run_id: str | None = None
) -> None:
    """One call of a worker by hand: this run's, or that of another one that has the same key."""
    headers = {**fleet.headers, "Content-Type": "application/json"} | ({"X-XRL-Run": run_id} if run_id else {})
    content = json.dumps(body).encode()
    asked = urllib.request.Request(fleet.workers[number].url + path, content, headers, method=method)
    urllib.request.urlopen(asked, timeout=10).close()


def check_answers(fleet: Fleet, version: int) -> None:
    """Every answer is of this version, and every layer of it took effect."""
    results, _ = generate(fleet, [request(place) for place in range(12)])
    for completions in results.values():
        assert completions is not None
        assert {completion.weights_version for completion in completions} == {version}
        assert completions[0].logprobs[0] == -total(version)


def test_flipped_bit_is_noticed_and_the_layer_sent_again(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(1, weight_transport="broadcast", update=False)
    publisher = WeightStream(fleet)
    publisher._sender = FaultyNetwork("layers.2", times=1)
    report = publisher.publish(layers(1), version=1)
    assert (report.num_resent, report.num_parts) == (1, 4)
    assert "weights version 1, layers.2: rollout worker 0 got bytes with checksum" in caplog.text
    check_answers(fleet, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bytes_that_arrive_changed_twice_end_the_run_and_are_not_loaded(make_fleet: MakeFleet, transport: str) -> None:
    fleet = make_fleet(1, weight_transport=transport, update=False)
    publisher = WeightStream(fleet)
    publisher._sender = FaultyMemory() if transport == "shared_memory" else FaultyNetwork("layers.2", times=2)
    with pytest.raises(CorruptedWeights, match="version 1, layers.2: rollout worker 0 got other bytes .* 2 times"):
        publisher.publish(layers(1), version=1)
    results, _ = generate(fleet, [request(0)])
    assert results == {0: None}  # it has no weights


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_worker_killed_in_an_update_is_left_out_and_taken_back_by_the_next(
    make_fleet: MakeFleet, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(2, weight_transport=transport, weight_sync_timeout_s=20.0, update=False)
    publisher = WeightStream(fleet)
    report = publisher.publish(interrupt(layers(1), fleet, signal.SIGKILL), version=1)
    assert report.num_workers == 1
    assert fleet.num_lost == 1
    assert "rollout worker 0 is lost (weights version 1, layers." in caplog.text
    check_answers(fleet, 1)
    assert [worker.number for worker in fleet.ready()] == [1]
    wait_until_back(fleet, 0)
    assert publisher.publish(layers(2), version=2).num_workers == 2
    assert len(fleet.ready()) == 2
    check_answers(fleet, 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_stuck_worker_is_named_with_its_layer(
    make_fleet: MakeFleet, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(2, weight_transport=transport, update=False)
    publisher = WeightStream(fleet, timeout_s=2.0)
    publisher.publish(layers(1), version=1)
    publisher.publish(interrupt(layers(2), fleet, signal.SIGSTOP), version=2)
    assert "rollout worker 0 is lost (weights version 2, layers." in caplog.text
    check_answers(fleet, 2)


def test_worker_that_dies_with_two_layers_under_way_is_named_with_the_one_it_was_at(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(2, weight_transport="shared_memory", update=False)
    publisher = WeightStream(fleet)
    post = fleet.client.post
    fails_after_s = {"layers.2": 1.0, "layers.3": 0.0}  # the later one's call fails first

    async def dying_post(worker: WorkerHandle, path: str, body: dict[str, Any], *, timeout_s: float) -> object:
        if worker.number == 0 and path == protocol.LOAD_PART and body["part"] in fails_after_s:
            await asyncio.sleep(fails_after_s[body["part"]])
            raise WorkerGone("it died")
        return await post(worker, path, body, timeout_s=timeout_s)

    monkeypatch.setattr(fleet.client, "post", dying_post)
    assert publisher.publish(layers(1), version=1).num_workers == 1
    assert "rollout worker 0 is lost (weights version 1, layers.2: it died)" in caplog.text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_that_breaks_costs_its_worker_alone(
    make_fleet: MakeFleet, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(2, weight_transport=transport, update=False)
    publisher = WeightStream(fleet, timeout_s=5.0)
    publisher.publish(layers(1), version=1)
    fleet.workers[0].restart()  # behind the fleet's back
    fleet.workers[0].wait_until_listening(60)
    assert publisher.publish(layers(2), version=2).num_workers == 1
    assert "worker 0 is lost (weights version 2, layers.0: TransportError: no trainer of this run has c" in caplog.text
    check_answers(fleet, 2)
    wait_until_back(fleet, 0)
    assert publisher.publish(layers(3), version=3).num_workers == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_only_worker_killed_in_an_update_takes_it_anew(make_fleet: MakeFleet, transport: str) -> None:
    fleet = make_fleet(1, weight_transport=transport, weight_sync_timeout_s=20.0, update=False)
    publisher = WeightStream(fleet)
    publisher.publish(layers(1), version=1)
    buckets = interrupt(layers(2), fleet, signal.SIGKILL)
    with pytest.raises(NoneUpdated, match="weights version 2"):
        publisher.publish(buckets, version=2)
    assert fleet.ready() == []
    # As often as it takes: here it is killed while it starts, too.
    fleet.workers[0]._process.kill()
    assert publisher.publish(layers(2), version=2).num_workers == 1
    check_answers(fleet, 2)


def test_the_only_worker_that_cannot_be_started_again_is_the_end(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, rollout_max_restarts=0, update=False)
    publisher = WeightStream(fleet)
    with pytest.raises(NoneUpdated):
        publisher.publish(interrupt(layers(1), fleet, signal.SIGKILL), version=1)
    with pytest.raises(WorkerGone, match=r"no rollout worker is left \(rollout worker 0 .*: weights version 1, layers"):
        publisher.publish(layers(1), version=1)


@pytest.mark.parametrize(("path", "odd"), [(protocol.LOAD_PART, {}), (protocol.FINISH_UPDATE, {"weights_version": 2})])
def test_a_worker_that_answers_an_update_wrongly_is_lost_and_named(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str, odd: object
) -> None:
    fleet = make_fleet(2, update=False)
    post = fleet.client.post

    async def lying_post(worker: WorkerHandle, called: str, body: object, **options: Any) -> object:
        answer = await post(worker, called, body, **options)
        return odd if (worker.number, called) == (0, path) else answer

    monkeypatch.setattr(fleet.client, "post", lying_post)
    assert WeightStream(fleet).publish(layers(1), version=1).num_workers == 1
    assert "rollout worker 0 is lost (weights version 1" in caplog.text
    assert [worker.number for worker in fleet.ready()] == [1]


def test_a_worker_that_was_started_again_before_the_update_was_over_does_not_have_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, update=False)
    generations = {worker.number: fleet.roster.generation(worker) for worker in fleet.reachable()}
    fleet.roster.lose(fleet.workers[0], "it died")
    fleet.roster.updated(generations, 1)
    assert [worker.number for worker in fleet.ready()] == [1]


def test_a_lost_worker_stops_the_run_where_that_is_asked_for(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, on_lost_worker="stop", update=False)
    with pytest.raises(WorkerGone, match=r"worker 0 is lost \(weights version 1, layers\.\d.*on-lost-worker is stop"):
        WeightStream(fleet).publish(interrupt(layers(1), fleet, signal.SIGKILL), version=1)


def test_worker_is_started_again_only_so_often(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, rollout_max_restarts=1, update=False)
    publisher = WeightStream(fleet)
    for version in (1, 2):
        wait_until_back(fleet, 0)
        publisher.publish(layers(version), version=version)
        fleet.workers[0]._process.kill()
        fleet.workers[0]._process.wait()
        check_answers(fleet, version)
    assert publisher.publish(layers(3), version=3).num_workers == 1
    assert (fleet.num_lost, fleet.num_restarted) == (2, 1)


def test_stale_worker_is_found_by_the_version_and_asked_no_more(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(2, update=False, rollout_max_batch_size=4)
    publisher = WeightStream(fleet)
    publisher.publish(layers(5), version=5)
    # The worker has other weights than this trainer believes.
    call(fleet, 1, protocol.FINISH_UPDATE, {"version": 4})
    results, counts = generate(fleet, [request(place) for place in range(12)])
    assert {c.weights_version for completions in results.values() for c in completions or []} == {5}
    assert counts.finished == 12
    assert counts.retried == counts.stale >= 1
    assert "rollout worker 1 sampled with weights version 4 instead of version 5" in caplog.text
    assert [worker.number for worker in fleet.ready()] == [0]
    publisher.publish(layers(6), version=6)
    assert len(fleet.ready()) == 2


def test_weights_of_another_run_are_not_taken_for_ours_under_the_same_version(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(2, update=False, rollout_max_batch_size=4)
    WeightStream(fleet).publish(layers(5), version=5)
    call(fleet, 1, protocol.LEASE, method="DELETE")
    call(fleet, 1, protocol.FINISH_UPDATE, {"version": 5}, run_id="another")
    call(fleet, 1, protocol.LEASE, method="DELETE", run_id="another")
    _, counts = generate(fleet, [request(place) for place in range(12)])
    assert counts.finished == 12 and counts.retried == counts.stale >= 1
    assert [worker.number for worker in fleet.ready()] == [0]


def test_workers_of_other_hosts_are_used_taken_back_and_left_running(
    make_fleet: MakeFleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[WorkerProcess] = []
    key = new_key()
    key_file = tmp_path / "worker.key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)

    def start(number: int, port: int = 0) -> WorkerProcess:
        # Another loopback address stands for another host; the flag ends it with this test in any case.
        worker = WorkerProcess(
            number,
            [f"--engine={ENGINE}", f"--model={tmp_path}", "--max-model-len=64", "--host=127.0.0.3", f"--port={port}"],
            key=key,
            num_threads=1,
            log=tmp_path / f"other_{number}.log",
        )
        started.append(worker)
        worker.wait_until_listening(60)
        return worker

    try:
        ports = [int(start(number).url.rpartition(":")[2]) for number in range(2)]
        urls = ",".join(f"127.0.0.3:{port}" for port in ports)
        shared = {"rollout_worker_urls": urls, "rollout_worker_key_file": key_file, "update": False}
        fleet = make_fleet(0, **shared)
        publisher = WeightStream(fleet, timeout_s=20.0)
        assert publisher.transport == "broadcast"
        publisher.publish(layers(1), version=1)
        check_answers(fleet, 1)
        with pytest.raises(SettingsError, match=f"rollout worker 0 .* is in use by run {fleet.access.run_id} since"):
            make_fleet(0, **shared).claim()
        check_answers(fleet, 1)
        started[1].restart()  # somebody's doing, at another port
        check_answers(fleet, 1)
        assert publisher.publish(layers(2), version=2).num_workers == 1
        start(1, ports[1])
        assert publisher.publish(layers(3), version=3).num_workers == 2
        assert "rollout worker 1 answers again and is taken back" in caplog.text
        check_answers(fleet, 3)
        fleet.close()
        assert started[0].is_alive and started[2].is_alive
        another = make_fleet(0, **shared)  # one run after the other
        WeightStream(another, timeout_s=20.0).publish(layers(4), version=4)
        check_answers(another, 4)
    finally:
        for worker in started:
            worker.terminate()
            worker.join(3)


def test_bf16_arrives_bit_by_bit(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, weight_transport="broadcast", update=False)
    tensors = {"w": torch.arange(-3, 4).bfloat16(), "b": torch.tensor(0.5), "none": torch.empty(0, 3)}
    WeightStream(fleet).publish([WeightBucket(version=0, part="layers.0", tensors=tensors)], version=0)
    results, _ = generate(fleet, [request(0)])
    assert results[0] is not None and results[0][0].logprobs[0] == -0.5
