"""Weight buckets through memory that processes of one host share: no file, no copy on the receiver's side.

The sender keeps anonymous memory (memfd) that the receiver opens through /proc. It has no name, so nothing is left
behind however either process ends; the kernel frees it with the last of the two.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xrl.types import WeightBucket
from xrl.weights.transport import Manifest, TensorEntry, TransportError, aligned


class Sender:
    """One piece of shared memory with room for two buckets. See `xrl.weights.transport.Sender`.

    A bucket goes to the start of the memory, or behind the bucket before it where that is in the way. So the memory
    grows to the embeddings and two layers at most, and is used again for update after update.
    """

    def __init__(self, *, timeout_s: float = 0.0, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._descriptor = os.memfd_create("xrl-weights", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None
        self._last = (0, 0)  # where the bucket before lies: start, end

    @property
    def num_bytes(self) -> int:
        """Size of the memory."""
        return os.fstat(self._descriptor).st_size

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        return {}

    def accept(self, worker: int) -> None:
        pass

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        where = self.place(_entries(bucket))
        self.renew(bucket, where)
        return where

    def renew(self, bucket: WeightBucket, where: Mapping[str, Any]) -> None:
        for place, tensor in zip(self.views(_entries(bucket), where).values(), bucket.tensors.values(), strict=True):
            place.copy_(tensor)

    def place(self, entries: Sequence[TensorEntry]) -> dict[str, Any]:
        """Room for a bucket; whoever has the memory open may fill it."""
        offsets, size = [], 0
        for entry in entries:
            offsets.append(size)
            size += aligned(entry.num_bytes)
        start = 0 if size <= self._last[0] else self._last[1]
        self._last = (start, start + size)
        self._grow_to(start + size)
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._descriptor}",
            "num_bytes": self.num_bytes,
            "offsets": [start + offset for offset in offsets],
        }

    def views(self, entries: Sequence[TensorEntry], where: Mapping[str, Any]) -> dict[str, Tensor]:
        """The room as tensors."""
        assert self._memory is not None
        return _views(self._memory, entries, where)

    def send(self, worker: int, bucket: WeightBucket) -> None:
        pass  # it is there

    def disconnect(self, worker: int) -> None:
        pass

    def close(self) -> None:
        """Free the memory (receivers keep what they have mapped)."""
        self._memory = None
        os.close(self._descriptor)

    def _grow_to(self, num_bytes: int) -> None:
        if self._memory is None or num_bytes > self.num_bytes:
            os.ftruncate(self._descriptor, max(num_bytes, self.num_bytes, mmap.PAGESIZE))
            self._memory = mmap.mmap(self._descriptor, self.num_bytes)


class Receiver:
    """Sees what senders put into their memory, without a copy. See `xrl.weights.transport.Receiver`."""

    def __init__(
        self,
        invitation: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 0.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._mapped: dict[str, mmap.mmap] = {}

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        return self.views(manifest.tensors, manifest.where)

    def views(self, entries: Sequence[TensorEntry], where: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors over the sender's memory."""
        path, num_bytes = str(where["path"]), int(where["num_bytes"])
        memory = self._mapped.get(path)
        if memory is None or len(memory) != num_bytes:
            try:
                descriptor = os.open(path, os.O_RDWR)
            except OSError as error:
                raise TransportError(f"the sender's memory cannot be opened: {error}") from error
            try:
                memory = mmap.mmap(descriptor, num_bytes)
            finally:
                os.close(descriptor)
            self._mapped[path] = memory
        return _views(memory, entries, where)

    def close(self) -> None:
        self._mapped.clear()


def _entries(bucket: WeightBucket) -> list[TensorEntry]:
    return [TensorEntry.of(name, tensor) for name, tensor in bucket.tensors.items()]


def _views(memory: mmap.mmap, entries: Sequence[TensorEntry], where: Mapping[str, Any]) -> dict[str, Tensor]:
    """Raises ValueError where the manifest points outside the memory."""
    tensors = {}
    for entry, offset in zip(entries, where["offsets"], strict=True):
        count = entry.num_bytes // entry.torch_dtype.itemsize
        if count == 0:
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.torch_dtype)
            continue
        flat = torch.frombuffer(memory, dtype=entry.torch_dtype, count=count, offset=int(offset))
        tensors[entry.name] = flat.view(entry.shape)
    return tensors
