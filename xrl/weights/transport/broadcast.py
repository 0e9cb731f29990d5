"""Weight buckets over the network: a process group of the publisher and one worker, for each worker.

The groups have nothing to do with the trainer's: they meet at a store that the publisher keeps, and rank 0 of each is
the publisher. One group a worker, not one for all: with one for all, a worker that dies in the middle of a part breaks
the collective for everybody, and everybody has to meet again. Here it breaks its own pair and nobody else notices. The
price is that the publisher sends each part once for each worker, at the same time, instead of into a tree of them.

A pair begins with a handshake over its own connection (handshake.py): with a secret that only the invited worker was
told, over HTTP. What it exchanges to find each other is under a name that nobody else was told either.

gloo where the weights or the engine are on the CPU, NCCL (unproven) where both are on CUDA.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from xrl.types import WeightBucket
from xrl.weights.transport import Manifest, TransportError, aligned
from xrl.weights.transport.handshake import answer_and_ask, ask_and_answer

PUBLISHER, WORKER = 0, 1
BACKENDS = ("gloo", "nccl")
SECRET_BYTES = 32


class Sender:
    """Rank 0 of a group with each worker. See `xrl.weights.transport.Sender`."""

    keeps_copy = False
    pushes = True

    def __init__(self, *, timeout_s: float, device: torch.device) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._device = device
        self._stores: dict[str, TCPStore] = {}  # by the address of this host that they listen on
        self._number = 0  # of connections so far: each has keys of its own in the store
        self._invited: dict[int, dict[str, Any]] = {}
        self._groups: dict[int, Any] = {}
        self._lock = threading.Lock()

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        self.disconnect(worker)
        address = address_towards(host)
        with self._lock:
            self._number += 1
            invitation = {
                "host": address,
                "port": self._store_at(address).port,
                "prefix": f"weights/{self._number}/{secrets.token_hex(SECRET_BYTES)}",
                "backend": "nccl" if self._device.type == "cuda" else "gloo",
                "secret": secrets.token_hex(SECRET_BYTES),
            }
            self._invited[worker] = invitation
        return invitation

    def accept(self, worker: int) -> None:
        invitation = self._invited.pop(worker)
        deadline = time.monotonic() + self._timeout.total_seconds()
        store = self._stores[invitation["host"]]
        group = _meet(store, PUBLISHER, invitation, address=invitation["host"], timeout=self._timeout)
        _shake_hands(group, PUBLISHER, invitation, deadline, device=self._device)
        with self._lock:
            self._groups[worker] = group

    def _store_at(self, address: str) -> TCPStore:
        """Listens on this address alone, at a free port."""
        if address not in self._stores:
            with socket.create_server((address, 0)) as listening:
                self._stores[address] = TCPStore(
                    address,
                    listening.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    timeout=self._timeout,
                    master_listen_fd=listening.detach(),
                    use_libuv=True,
                )
        return self._stores[address]

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        return {}

    def send(self, worker: int, bucket: WeightBucket) -> None:
        group = self._groups.get(worker)
        if group is None:
            raise TransportError("it is not connected")
        # One after the other, as the receiver takes them: a copy to the host, where one is needed, is of one tensor.
        deadline = time.monotonic() + self._timeout.total_seconds()
        for name, tensor in bucket.tensors.items():
            flat = _bytes_of(tensor, group)
            if flat.numel():
                _wait(lambda flat=flat: group.send([flat], WORKER, 0), deadline, f"sending {name}")

    def disconnect(self, worker: int) -> None:
        with self._lock:
            self._groups.pop(worker, None)

    def close(self) -> None:
        with self._lock:
            self._groups.clear()
            self._stores.clear()


class Receiver:
    """Rank 1 of a group with the publisher. See `xrl.weights.transport.Receiver`.

    Buckets lie in one buffer, which grows to the largest of them.
    """

    def __init__(self, invitation: Mapping[str, Any], *, timeout_s: float, device: torch.device) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        deadline = time.monotonic() + timeout_s
        host, port, backend = _checked(invitation)
        if backend == "nccl" and device.type != "cuda":
            raise TransportError(f"the weights come over NCCL, and this engine is on {device}: start it on CUDA")
        self._device = device if backend == "nccl" else torch.device("cpu")
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        try:
            store = TCPStore(host, port, is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise TransportError(f"the publisher cannot be reached at {host}:{port}: {_first_line(error)}") from error
        self._group = _meet(store, WORKER, invitation, address=address_towards(host), timeout=self._timeout)
        _shake_hands(self._group, WORKER, invitation, deadline, device=self._device)

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        size = sum(aligned(entry.num_bytes) for entry in manifest.tensors)
        if size > self._buffer.numel():
            try:
                self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            except RuntimeError as error:  # torch's way of saying that memory is short
                raise ValueError(f"{manifest.part} of {size} bytes is more than fits here") from error
        deadline = time.monotonic() + self._timeout.total_seconds()
        tensors, start = {}, 0
        for entry in manifest.tensors:
            flat = self._buffer[start : start + entry.num_bytes]
            start += aligned(entry.num_bytes)
            if flat.numel():
                _wait(lambda flat=flat: self._group.recv([flat], PUBLISHER, 0), deadline, f"receiving {entry.name}")
            tensors[entry.name] = flat.view(entry.torch_dtype).view(entry.shape)
        return tensors

    def close(self) -> None:
        self._group = None


def address_towards(host: str) -> str:
    """This host's address on the network that leads to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError as error:
            raise TransportError(f"there is no way to {host}: {error}") from error
        address: str = probe.getsockname()[0]
    return address


def _meet(store: Store, rank: int, invitation: Mapping[str, Any], *, address: str, timeout: timedelta) -> Any:
    """The group of two, once both are there."""
    # What the pair exchanges to find each other is short-lived; the prefix keeps it apart from other pairs'.
    own = PrefixStore(str(invitation["prefix"]), store)
    try:
        if invitation["backend"] == "nccl":
            from torch.distributed import ProcessGroupNCCL  # a build for the CPU has none

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            return ProcessGroupNCCL(own, rank, 2, options)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        return ProcessGroupGloo(own, rank, 2, options)
    except RuntimeError as error:
        raise TransportError(f"publisher and worker did not meet: {_first_line(error)}") from error


def _checked(invitation: Mapping[str, Any]) -> tuple[str, int, str]:
    """Host, port and backend of an invitation. Raises ValueError where it cannot be a sender's."""
    match invitation:
        case {
            "host": str(host),
            "port": int(port),
            "backend": str(backend),
            "prefix": str(prefix),
            "secret": str(secret),
        }:
            fits = 0 < len(host) < 256 and 0 < len(prefix) < 256 and len(secret) == 2 * SECRET_BYTES
            if fits and (host + prefix + secret).isprintable() and 0 < port < 65536 and backend in BACKENDS:
                return host, port, backend
    raise ValueError(
        f"an invitation needs a host, a port, a prefix, a backend of {' and '.join(BACKENDS)}, and a secret of "
        f"{SECRET_BYTES} bytes in hexadecimal digits"
    )


def _shake_hands(
    group: Any, rank: int, invitation: Mapping[str, Any], deadline: float, *, device: torch.device
) -> None:
    """Before any weights: each side proves that it knows the invitation's secret."""
    other = WORKER if rank == PUBLISHER else PUBLISHER

    def send(content: bytes) -> None:
        message = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        _wait(lambda: group.send([message], other, 0), deadline, "the handshake")

    def receive(num_bytes: int) -> bytes:
        message = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _wait(lambda: group.recv([message], other, 0), deadline, "the handshake")
        return bytes(message.tolist())

    shake = ask_and_answer if rank == PUBLISHER else answer_and_ask
    shake(str(invitation["secret"]).encode(), send=send, receive=receive)


def _wait(begin: Any, deadline: float, doing: str) -> None:
    """Begin an operation and wait for it, but not beyond the deadline."""
    left = max(deadline - time.monotonic(), 0.001)
    try:
        begin().wait(timedelta(seconds=left))
    except RuntimeError as error:
        raise TransportError(f"{doing}: {_first_line(error)}") from error


def _bytes_of(tensor: Tensor, group: Any) -> Tensor:
    """A tensor's bytes [num_bytes], where the group can take them."""
    device = tensor.device if group.name() == "nccl" else torch.device("cpu")
    return tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
