"""Buckets through every transport that runs without a GPU: whole, in place, and again and again."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from xrl.types import WeightBucket
from xrl.weights.checksum import bucket_checksum
from xrl.weights.transport import (
    Manifest,
    Receiver,
    Sender,
    TensorEntry,
    TransportError,
    create_receiver,
    create_sender,
)
from xrl.weights.transport.broadcast import address_towards
from xrl.weights.transport.shared_memory import Receiver as SharedMemoryReceiver
from xrl.weights.transport.shared_memory import Sender as SharedMemorySender

CPU = torch.device("cpu")
ON_CPU = ["in_process", "shared_memory", "broadcast"]


def bucket(part: str, *, rows: int = 3, seed: int = 0) -> WeightBucket:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(rows, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.randn(4, rows, generator=generator).T,
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 3),
    }
    return WeightBucket(version=seed, part=part, tensors=tensors)


def connect(name: str, *, timeout_s: float = 20.0, worker: int = 0) -> tuple[Sender, Receiver]:
    sender = create_sender(name, timeout_s=timeout_s, device=CPU)
    return sender, meet(sender, name, timeout_s=timeout_s, worker=worker)


def meet(sender: Sender, name: str, *, timeout_s: float = 20.0, worker: int = 0) -> Receiver:
    invitation = json.loads(json.dumps(sender.invite(worker, "127.0.0.1")))
    accepting = threading.Thread(target=sender.accept, args=(worker,))
    accepting.start()
    receiver = create_receiver(name, invitation, timeout_s=timeout_s, device=CPU)
    accepting.join()
    return receiver


def deliver(sender: Sender, receiver: Receiver, sent: WeightBucket, *, worker: int = 0) -> dict[str, torch.Tensor]:
    manifest = Manifest.of(sent, checksum=bucket_checksum(sent.tensors), where=sender.put(sent))
    sending = threading.Thread(target=sender.send, args=(worker, sent))
    sending.start()
    read = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    tensors = receiver.receive(read)
    sending.join()
    assert bucket_checksum(tensors) == read.checksum
    return tensors


@pytest.fixture(params=ON_CPU)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Sender, Receiver]]:
    sender, receiver = connect(request.param)
    yield sender, receiver
    receiver.close()
    sender.close()


def test_buckets_of_any_size_arrive_bit_by_bit(pair: tuple[Sender, Receiver]) -> None:
    for seed, rows in enumerate((3, 400, 1, 400, 2000)):
        sent = bucket(f"layers.{seed}", rows=rows, seed=seed)
        found = deliver(*pair, sent)
        assert list(found) == list(sent.tensors)
        for name, tensor in sent.tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_shared_memory_holds_a_bucket_while_the_next_one_is_put() -> None:
    sender, receiver = connect("shared_memory")
    buckets = [bucket(f"layers.{seed}", rows=rows, seed=seed) for seed, rows in enumerate((900, 50, 60, 70, 80, 900))]
    manifests = []
    for sent in buckets:
        manifests.append(Manifest.of(sent, checksum=bucket_checksum(sent.tensors), where=sender.put(sent)))
        for manifest in manifests[-2:]:
            assert bucket_checksum(receiver.receive(manifest)) == manifest.checksum
    sender.close()


def test_shared_memory_grows_to_the_largest_bucket_and_two_others() -> None:
    sender = SharedMemorySender()
    large, small = bucket("embeddings", rows=100_000), bucket("layers.0", rows=1_000)
    sizes = []
    for _ in range(20):
        for sent in (large, small, small, small, large):
            sender.put(sent)
        sizes.append(sender.num_bytes)
    one = sum(tensor.nbytes for tensor in small.tensors.values())
    assert len(set(sizes[1:])) == 1
    assert sizes[-1] <= 2 * sum(tensor.nbytes for tensor in large.tensors.values()) + 2 * one + 4096
    sender.close()


def test_segments_of_shared_memory_lie_alike_in_every_update() -> None:
    sender, receiver = SharedMemorySender(), SharedMemoryReceiver()
    buckets = [bucket("embeddings", rows=5_000)] + [bucket(f"layers.{index}", rows=900) for index in range(4)]
    entries = [[TensorEntry.of(name, tensor) for name, tensor in each.tensors.items()] for each in buckets]
    places = []
    for version in range(3):
        sender.restart()
        reserved = [sender.reserve(each) for each in entries]  # all of them ahead
        for sent, (tensors, _) in zip(buckets, reserved, strict=True):  # each holds while the next one is filled
            for name, tensor in tensors.items():
                tensor.copy_(sent.tensors[name] + version)
            filled = WeightBucket(version=version, part=sent.part, tensors=tensors)
            manifest = Manifest.of(filled, checksum="", where=sender.put(filled))
            for name, tensor in receiver.receive(manifest).items():
                assert torch.equal(tensor, sent.tensors[name] + version)
        places.append([where["offsets"] for _, where in reserved])
    assert places[0] == places[1] == places[2]
    sender.close()


def test_shared_memory_that_takes_the_number_of_another_is_not_taken_for_it() -> None:
    receiver = SharedMemoryReceiver()
    for seed in range(2):
        sender = SharedMemorySender()
        sent = bucket("layers.0", seed=seed)
        where = dict(sender.put(sent))
        manifest = Manifest.of(sent, checksum="", where=where)
        assert torch.equal(receiver.receive(manifest)["a"], sent.tensors["a"])
        sender.close()  # the next one gets its descriptor


def test_broadcast_to_one_worker_goes_on_when_another_is_gone() -> None:
    sender, first = connect("broadcast")
    second = meet(sender, "broadcast", worker=1)
    first.close()
    sent = bucket("layers.0", rows=200_000)
    sender.put(sent)
    with pytest.raises(TransportError, match="sending a"):
        sender.send(0, sent)
    assert torch.equal(deliver(sender, second, bucket("layers.1"), worker=1)["a"], bucket("layers.1").tensors["a"])
    sender.disconnect(0)
    again = meet(sender, "broadcast", worker=0)  # the pair is rebuilt alone
    assert torch.equal(deliver(sender, again, bucket("layers.2"))["b"], bucket("layers.2").tensors["b"])


def test_broadcast_does_not_wait_for_ever_for_a_worker_that_takes_nothing() -> None:
    sender, receiver = connect("broadcast", timeout_s=0.5)
    sent = bucket("layers.0", rows=2_000_000)
    with pytest.raises(TransportError, match="sending a"):
        sender.send(0, sent)
    receiver.close()


def test_broadcast_names_a_publisher_that_is_not_there() -> None:
    invitation = {"host": "127.0.0.1", "port": 9, "prefix": "weights/1", "backend": "gloo", "secret": "0" * 64}
    with pytest.raises(TransportError, match="cannot be reached at 127.0.0.1:9"):
        create_receiver("broadcast", invitation, timeout_s=0.3, device=CPU)


def test_broadcast_gives_no_weights_to_one_who_was_not_invited() -> None:
    sender = create_sender("broadcast", timeout_s=5.0, device=CPU)
    invitation = sender.invite(0, "127.0.0.1")
    with ThreadPoolExecutor(1) as threads:
        accepting = threads.submit(sender.accept, 0)
        with pytest.raises(TransportError, match="handshake"):  # it waits for the last word
            create_receiver("broadcast", invitation | {"secret": "0" * 64}, timeout_s=5.0, device=CPU)
        with pytest.raises(TransportError, match="not who was invited"):
            accepting.result(timeout=20)
    with pytest.raises(TransportError, match="not connected"):
        sender.send(0, bucket("layers.0"))
    sender.close()


def test_broadcast_listens_on_the_address_that_it_tells_and_on_no_other() -> None:
    sender = create_sender("broadcast", timeout_s=5.0, device=CPU)
    port = sender.invite(0, "127.0.0.1")["port"]
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    sender.close()


@pytest.mark.parametrize(
    "change", [{"host": ""}, {"host": "a\x1b"}, {"port": 0}, {"port": "9"}, {"backend": "mpi"}, {"secret": "short"}]
)
def test_invitation_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    invitation = {"host": "127.0.0.1", "port": 9, "prefix": "weights/1", "backend": "gloo", "secret": "0" * 64}
    with pytest.raises(ValueError, match="an invitation needs"):
        create_receiver("broadcast", invitation | change, timeout_s=0.3, device=CPU)


def test_own_address_is_the_one_on_the_way_to_the_other() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    "change",
    [
        *({"dtype": name} for name in ("float99", "load", "Tensor", "qint8", 5)),
        *({"shape": shape} for shape in ([10**9], [2**62, 2**62], [-1], [1.5], [True], "3", [[1]], [1] * 9)),
        *({"name": name} for name in ("b", "x\x1b", "x" * 513, None)),
    ],
    ids=str,
)
def test_manifest_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    sender, receiver = connect("shared_memory")
    sent = bucket("layers.0")
    data = Manifest.of(sent, checksum="", where=sender.put(sent)).to_json()
    data["tensors"] = [dict(data["tensors"][0], **change), *data["tensors"][1:]]
    with pytest.raises(ValueError):
        receiver.receive(Manifest.from_json(data))
    sender.close()


def test_cuda_ipc_is_refused_where_there_is_no_cuda() -> None:
    with pytest.raises(TransportError, match="needs weights on CUDA"):
        create_sender("cuda_ipc", timeout_s=1.0, device=CPU)


@pytest.mark.parametrize(
    "change",
    [
        *({"version": version} for version in (-1, 2**64, True, "1", None)),
        *({"part": part} for part in (5, "x" * 513, "a\n")),
        *({"tensors": tensors} for tensors in ({}, [5], None, [{}])),
        *({"where": where} for where in ([], None, "x")),
        {"checksum": 1},
    ],
    ids=str,
)
def test_manifest_with_a_field_that_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    data = Manifest.of(bucket("layers.0"), checksum="", where={}).to_json()
    data["tensors"] = list(data["tensors"])
    assert Manifest.from_json(json.loads(json.dumps(data)))
    with pytest.raises(ValueError, match="manifest|where"):
        Manifest.from_json(data | change)


@pytest.mark.parametrize(
    "change",
    [
        *({"num_bytes": size} for size in (0, 2**60, -1, "9")),
        *({"offsets": offsets} for offsets in ([], [0], [2**60] * 5, [-64] * 5, [1] * 5, None)),
        *({"inode": inode} for inode in (0, None)),
        *({"pid": pid} for pid in ("1/..", True)),
        {"descriptor": 0},
    ],
    ids=str,
)
def test_memory_that_is_not_as_described_is_not_looked_into(change: dict[str, object]) -> None:
    sender = SharedMemorySender()
    sent = bucket("layers.0")
    where = {**sender.put(sent)} | change
    with pytest.raises((ValueError, TransportError)):
        SharedMemoryReceiver().receive(Manifest.of(sent, checksum="", where=where))
    sender.close()


@pytest.mark.gpu
def test_cuda_ipc_shares_memory_with_another_process() -> None:
    import multiprocessing

    sender = create_sender("cuda_ipc", timeout_s=20.0, device=torch.device("cuda"))
    tensors = {"a": torch.randn(300, 5, device="cuda"), "b": torch.arange(7.0, device="cuda").bfloat16()}
    sent = WeightBucket(version=0, part="layers.0", tensors=tensors)
    manifest = Manifest.of(sent, checksum=bucket_checksum(tensors), where=sender.put(sent)).to_json()
    with multiprocessing.get_context("spawn").Pool(1) as other:
        assert other.apply(_received_checksum, (json.dumps(manifest),)) == manifest["checksum"]


def _received_checksum(text: str) -> str:
    manifest = Manifest.from_json(json.loads(text))
    receiver = create_receiver("cuda_ipc", {}, timeout_s=20.0, device=torch.device("cuda"))
    return bucket_checksum(receiver.receive(manifest))
