"""How weight buckets reach the rollout workers: one file a transport, all behind the contract below.

A bucket goes two ways at once. Its manifest (names, dtypes, shapes, checksum) is JSON and goes over the control
connection. Its bytes go through the transport, whose part of the manifest, `where`, says how to get them. Nothing is
pickled.

    in_process.py      an engine in the trainer's own process: the tensors themselves
    shared_memory.py   processes of one host: host memory that both see
    cuda_ipc.py        processes of one host: handles of the trainer's CUDA memory
    broadcast.py       any hosts: a process group of its own with each worker, on gloo or NCCL

A transport is one row of the table below: a module with a `Sender` and a `Receiver`, imported when it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from xrl.config.rollout import WEIGHT_TRANSPORTS
from xrl.types import WeightBucket

TRANSPORTS: Mapping[str, str] = MappingProxyType(
    {
        "in_process": "xrl.weights.transport.in_process",
        "shared_memory": "xrl.weights.transport.shared_memory",
        "cuda_ipc": "xrl.weights.transport.cuda_ipc",
        "broadcast": "xrl.weights.transport.broadcast",
    }
)
assert set(WEIGHT_TRANSPORTS) - {"auto"} <= set(TRANSPORTS)

# What a tensor of a manifest may be. Nothing that weights come in is left out.
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
# Bounds of a manifest, far above any bucket's: (most tensors, longest name, most dimensions, most bytes).
MAX_TENSORS, MAX_NAME_LENGTH, MAX_DIMENSIONS, MAX_PART_BYTES = 2**16, 512, 8, 2**44

# Tensors that lie in one piece of memory start on borders of a cache line.
ALIGNMENT = 64


class TransportError(RuntimeError):
    """The other side is gone, stuck, or sent what cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a bucket, without its bytes."""

    name: str
    dtype: str  # as torch names it, "bfloat16"
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ValueError for a name that weights do not come in."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name} has dtype {self.dtype[:32]!r}, known are: {', '.join(DTYPES)}")
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_bytes(self) -> int:
        count = self.torch_dtype.itemsize
        for length in self.shape:
            count *= length
        return count

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorEntry:
        return cls(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": self.shape}

    @classmethod
    def from_json(cls, data: Any) -> TensorEntry:
        """Raises ValueError for anything but what `to_json` gives."""
        match data:
            case {"name": str(name), "dtype": str(dtype), "shape": [*shape]}:
                if len(name) > MAX_NAME_LENGTH or not name.isprintable():
                    raise ValueError(f"a tensor's name must have at most {MAX_NAME_LENGTH} printable characters")
                if len(shape) > MAX_DIMENSIONS or any(type(d) is not int or not 0 <= d < 2**40 for d in shape):
                    raise ValueError(f"{name} must have a shape of at most {MAX_DIMENSIONS} lengths in [0, 2^40)")
                entry = cls(name=name, dtype=dtype, shape=tuple(shape))
                if entry.num_bytes > MAX_PART_BYTES:
                    raise ValueError(f"{name} of {entry.num_bytes} bytes is larger than any part of a model")
                return entry
        raise ValueError("each tensor of a manifest needs a name, a dtype and a shape")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a receiver is told of a bucket."""

    version: int
    part: str
    tensors: tuple[TensorEntry, ...]
    checksum: str  # of the sender's bytes, see xrl.weights.checksum
    where: Mapping[str, Any]  # the transport's own

    @classmethod
    def of(cls, bucket: WeightBucket, *, checksum: str, where: Mapping[str, Any]) -> Manifest:
        entries = tuple(TensorEntry.of(name, tensor) for name, tensor in bucket.tensors.items())
        return cls(version=bucket.version, part=bucket.part, tensors=entries, checksum=checksum, where=where)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "part": self.part,
            "tensors": [entry.to_json() for entry in self.tensors],
            "checksum": self.checksum,
            "where": dict(self.where),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises ValueError for anything but what `to_json` gives."""
        match data:
            case {
                "version": int(version),
                "part": str(part),
                "tensors": [*tensors],
                "checksum": str(checksum),
                "where": dict(),
            }:
                if isinstance(version, bool) or not 0 <= version < 2**53:
                    raise ValueError("a manifest's version must be a whole number >= 0")
                if max(len(part), len(checksum)) > MAX_NAME_LENGTH or not (part + checksum).isprintable():
                    raise ValueError(
                        f"a manifest's part and checksum must have at most {MAX_NAME_LENGTH} printable characters"
                    )
                if len(tensors) > MAX_TENSORS:
                    raise ValueError(f"a manifest has at most {MAX_TENSORS} tensors, found {len(tensors)}")
                entries = tuple(map(TensorEntry.from_json, tensors))
                if len({entry.name for entry in entries}) < len(entries):
                    raise ValueError(f"the manifest of {part} names a tensor twice")
                return cls(version=version, part=part, tensors=entries, checksum=checksum, where=data["where"])
        raise ValueError("a manifest needs a version, a part, tensors, a checksum and where")


class Sender(Protocol):
    """The trainer's side of a transport, for all workers of a run.

    Of each bucket: `put` once, then `send` to each worker, beside the manifest.
    """

    # Whether a bucket that was put no longer needs its tensors (but those that were filled in place): the next one may
    # then be gathered, and be put, while it is being sent. Not the next but one.
    keeps_copy: bool
    # Whether `send` does anything, and so is worth a thread.
    pushes: bool

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        """Begin a connection: JSON with which the worker, which listens on `host`, makes its receiver."""
        ...

    def accept(self, worker: int) -> None:
        """Wait until the worker has acted on its invitation, and complete the connection.

        Raises:
            TransportError: it did not in time.
        """
        ...

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        """Make a bucket ready to be sent; returns the `where` of its manifest."""
        ...

    def send(self, worker: int, bucket: WeightBucket) -> None:
        """Bring the bucket that was `put` last, or the one before, to a worker that has been told of it.

        Called from several threads, of one worker only from one at a time.

        Raises:
            TransportError: the worker is gone or stuck; the connection is of no use any more.
        """
        ...

    def disconnect(self, worker: int) -> None:
        """Forget a worker; does nothing for one that is not connected."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Receiver(Protocol):
    """The worker's side of a transport."""

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        """The bucket's tensors, in the manifest's order; valid until the worker has answered for them.

        Raises:
            TransportError: the sender is gone or stuck.
            ValueError: the manifest cannot be right.
        """
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


def create_sender(name: str, *, timeout_s: float, device: torch.device) -> Sender:
    """The sender of the transport called `name`.

    Args:
        timeout_s: longest wait for a worker.
        device: where the weights are.
    """
    return import_module(TRANSPORTS[name]).Sender(timeout_s=timeout_s, device=device)


def create_receiver(name: str, invitation: Mapping[str, Any], *, timeout_s: float, device: torch.device) -> Receiver:
    """Act on a sender's invitation.

    Args:
        timeout_s: longest wait for the sender.
        device: where the engine is.

    Raises:
        ValueError: unknown transport, or an invitation that cannot be right.
        TransportError: the sender cannot be reached.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"weight transport {name!r} is unknown, known are: {', '.join(TRANSPORTS)}")
    return import_module(TRANSPORTS[name]).Receiver(invitation, timeout_s=timeout_s, device=device)


def aligned(num_bytes: int) -> int:
    """The next place where a tensor may start."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
