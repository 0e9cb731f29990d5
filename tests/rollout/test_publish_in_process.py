"""Updates of a worker in this process, over real connections: in which order, what is reported, what is told twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.fleets import VOCAB_SIZE, bucket, generate, request
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.served import served
from xrl.config import RolloutConfig
from xrl.rollout import protocol
from xrl.rollout.fleet import Fleet
from xrl.rollout.publish import CorruptedWeights, PublishReport, WeightStream
from xrl.types import WeightBucket
from xrl.weights.checksum import bucket_checksum
from xrl.weights.shared_export import ProvenBucket

NAMES = ("embeddings", "layers.0", "final")


class Loading(ScriptedEngine):
    """Keeps the layers it was given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[tuple[str, int]] = []

    def load_part(self, bucket: WeightBucket) -> None:
        super().load_part(bucket)
        self.loaded.append((bucket.part, bucket.version))


@pytest.fixture
def engine() -> Loading:
    return Loading()


@pytest.fixture
def fleet(engine: Loading, tmp_path: Path) -> Iterator[Fleet]:
    with served(engine) as worker:
        config = RolloutConfig(rollout_worker_urls=f"127.0.0.1:{worker.port}")
        with Fleet(
            config,
            model_dir=tmp_path,
            dtype="float32",
            devices=[],
            num_threads=1,
            max_model_len=64,
            vocab_size=VOCAB_SIZE,
            log_dir=tmp_path,
            access=worker.access,
        ) as fleet:
            yield fleet


@pytest.fixture
def publisher(fleet: Fleet) -> Iterator[WeightStream]:
    publisher = WeightStream(fleet)
    yield publisher
    publisher.close()


@pytest.fixture
def told(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls of the worker, and of each layer's its name."""
    calls: list[tuple[str, Any]] = []
    post = fleet.client.post

    async def noting(worker: Any, path: str, body: Any, **options: Any) -> object:
        calls.append((path, body.get("part") or body.get("version")))
        return await post(worker, path, body, **options)

    monkeypatch.setattr(fleet.client, "post", noting)
    return calls


def layers(version: int, *, value: float = 1.0) -> list[WeightBucket]:
    return [bucket(name, value, version=version) for name in NAMES]


def test_a_worker_is_told_of_each_layer_in_order_and_then_that_it_has_them_all(
    publisher: WeightStream, fleet: Fleet, engine: Loading, told: list[tuple[str, Any]]
) -> None:
    publisher.publish(layers(4), version=4)
    assert [path for path, _ in told] == [protocol.CONNECT, *[protocol.LOAD_PART] * 3, protocol.FINISH_UPDATE]
    assert told[1:] == [*((protocol.LOAD_PART, name) for name in NAMES), (protocol.FINISH_UPDATE, 4)]
    assert engine.loaded == [(name, 4) for name in NAMES]
    assert fleet.version == 4 and [worker.number for worker in fleet.ready()] == [0]
    results, _ = generate(fleet, [request(0)])
    assert [answer.weights_version for answer in results[0] or []] == [4, 4]


def test_an_update_is_reported_with_what_went_out_and_what_it_was(publisher: WeightStream) -> None:
    one = [
        WeightBucket(version=1, part="layers.0", tensors={"w": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)}),
        WeightBucket(version=1, part="final", tensors={"w": torch.ones(5, dtype=torch.bfloat16)}),
    ]
    report = publisher.publish(one, version=1)
    assert report == PublishReport(
        seconds=report.seconds,
        num_bytes=3 * 4 + 2 + 5 * 2,
        num_tensors=3,
        num_workers=1,
        num_parts=2,
        num_resent=0,
        checksums=tuple(bucket_checksum(each.tensors) for each in one),
    )


def test_checksums_are_equal_where_no_weight_has_changed(publisher: WeightStream) -> None:
    first, same = (publisher.publish(layers(version), version=version).checksums for version in (1, 2))
    assert first == same and len(first) == 3
    changed = publisher.publish([*layers(3)[:2], bucket("final", 1.5, version=3)], version=3).checksums
    assert changed[:2] == first[:2] and changed[2] != first[2]


def test_a_worker_is_connected_once_for_all_updates(publisher: WeightStream, told: list[tuple[str, Any]]) -> None:
    for version in (1, 2, 3):
        publisher.publish(layers(version), version=version)
    assert [path for path, _ in told].count(protocol.CONNECT) == 1
    assert [body for path, body in told if path == protocol.FINISH_UPDATE] == [1, 2, 3]


def test_a_worker_that_was_lost_is_connected_anew(
    publisher: WeightStream, fleet: Fleet, told: list[tuple[str, Any]]
) -> None:
    publisher.publish(layers(1), version=1)
    fleet.roster.lose(fleet.workers[0], "it hung")
    assert fleet.ready() == []
    assert publisher.publish(layers(2), version=2).num_workers == 1
    assert [path for path, _ in told].count(protocol.CONNECT) == 2
    assert [worker.number for worker in fleet.ready()] == [0]


def test_a_layer_is_asked_for_when_the_one_before_has_arrived(publisher: WeightStream, engine: Loading) -> None:
    arrived: list[int] = []

    def one_by_one() -> Iterator[WeightBucket]:
        for each in layers(1):
            arrived.append(len(engine.loaded))
            yield each
        arrived.append(len(engine.loaded))

    publisher.publish(one_by_one(), version=1)
    assert arrived == [0, 1, 2, 3]


def test_an_error_of_the_actor_s_ends_the_update_and_not_the_next_one(publisher: WeightStream, fleet: Fleet) -> None:
    def breaks() -> Iterator[WeightBucket]:
        yield layers(1)[0]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        publisher.publish(breaks(), version=1)
    assert fleet.version is None
    assert publisher.publish(layers(2), version=2).num_parts == 3
    assert fleet.version == 2


def test_a_checksum_that_came_with_a_layer_is_the_one_that_counts(
    publisher: WeightStream, told: list[tuple[str, Any]]
) -> None:
    fields = {field.name: getattr(layers(1)[0], field.name) for field in dataclasses.fields(WeightBucket)}
    with pytest.raises(CorruptedWeights, match="weights version 1, embeddings: .* 2 times in a row"):
        publisher.publish([ProvenBucket(**fields, checksum="0123456789abcdef")], version=1)
    assert told[1:] == [(protocol.LOAD_PART, "embeddings")] * 2
