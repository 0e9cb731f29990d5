"""Weight buckets through memory that processes of one host share: no file, no copy on the receiver's side.

The sender keeps anonymous memory (memfd) that the receiver opens through /proc. It has no name, so nothing is left
behind however either process ends; the kernel frees it with the last of the two.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xrl.types import WeightBucket
from xrl.weights.transport import ALIGNMENT, Manifest, TensorEntry, TransportError, aligned

_NAME = "xrl-weights"
MADV_POPULATE_WRITE = 23  # of Linux 5.14; mmap has no name for it before Python 3.14


class Sender:
    """One piece of shared memory that holds two buckets, each in a segment. See `xrl.weights.transport.Sender`.

    Ranks of this host may also write a bucket where it is to lie (see xrl.weights.shared_export): `reserve` gives it a
    segment, and `put` then finds it there.

    A bucket goes to the start of the memory, or behind the bucket before it where that is in the way. So the memory
    grows to three neighbouring parts of the model at most, and is used again for update after update.
    """

    keeps_copy = True
    pushes = False

    def __init__(self, *, timeout_s: float = 0.0, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None
        self._last = (0, 0)  # where the bucket before lies: start, end
        # Segments that are being filled in place, by the identity of their tensors, and what the memory was like then.
        self._reserved: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    @property
    def num_bytes(self) -> int:
        """Size of the memory."""
        return os.fstat(self._descriptor).st_size

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        return {}

    def accept(self, worker: int) -> None:
        pass

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        reserved = self._reserved.pop(id(bucket.tensors), None)
        if reserved is not None:
            return reserved[1] | {"num_bytes": self.num_bytes}
        tensors, where = self.reserve([TensorEntry.of(name, tensor) for name, tensor in bucket.tensors.items()])
        del self._reserved[id(tensors)]
        for name, tensor in bucket.tensors.items():
            tensors[name].copy_(tensor)
        return where

    def reserve(self, entries: Sequence[TensorEntry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A segment for a bucket: its tensors, and where others find them, as `views` takes it.

        Several may be asked for ahead. Each lies where the next but one may lie again.
        """
        offsets, size = [], 0
        for entry in entries:
            offsets.append(size)
            size += aligned(entry.num_bytes)
        start = 0 if size <= self._last[0] else self._last[1]
        self._last = (start, start + size)
        self._grow_to(start + size)
        where = {
            "pid": os.getpid(),
            "descriptor": self._descriptor,
            # Another memory may get the number of one that was closed.
            "inode": os.fstat(self._descriptor).st_ino,
            "num_bytes": self.num_bytes,
            "offsets": [start + offset for offset in offsets],
        }
        assert self._memory is not None
        tensors = _views(self._memory, entries, where)
        self._reserved[id(tensors)] = tensors, where
        return tensors, where

    def restart(self) -> None:
        """All buckets so far have been taken: the next ones lie where those of every update lie."""
        self._last = (0, 0)
        self._reserved.clear()

    def send(self, worker: int, bucket: WeightBucket) -> None:
        pass  # it is there

    def disconnect(self, worker: int) -> None:
        pass

    def close(self) -> None:
        """Free the memory (receivers keep what they have mapped)."""
        self._reserved.clear()
        self._memory = None
        os.close(self._descriptor)

    def _grow_to(self, num_bytes: int) -> None:
        if self._memory is None or num_bytes > self.num_bytes:
            os.ftruncate(self._descriptor, max(num_bytes, self.num_bytes, mmap.PAGESIZE))
            self._memory = _map(self._descriptor, self.num_bytes)


class Receiver:
    """Sees what senders put into their memory, without a copy. See `xrl.weights.transport.Receiver`."""

    def __init__(
        self,
        invitation: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 0.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._mapped: dict[tuple[int, int, int], mmap.mmap] = {}

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        return self.views(manifest.tensors, manifest.where)

    def views(self, entries: Sequence[TensorEntry], where: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors over the sender's memory.

        Raises:
            TransportError: the memory is not there.
            ValueError: it is not as `where` says, or too small for these tensors.
        """
        pid, descriptor, inode, num_bytes = (
            _number(where, name) for name in ("pid", "descriptor", "inode", "num_bytes")
        )
        key = pid, descriptor, inode
        memory = self._mapped.get(key)
        if memory is None or len(memory) != num_bytes:
            memory = _open(pid, descriptor, inode, num_bytes)
            self._mapped = {key: memory}
        return _views(memory, entries, where)

    def close(self) -> None:
        self._mapped.clear()


def _open(pid: int, descriptor: int, inode: int, num_bytes: int) -> mmap.mmap:
    """See `Receiver.views`."""
    file = f"/proc/{pid}/fd/{descriptor}"
    try:
        # Another file of that process is none of ours to open: a pipe would wait, for example.
        if not os.readlink(file).startswith(f"/memfd:{_NAME}"):
            raise ValueError(f"descriptor {descriptor} of process {pid} is no memory for weights")
        opened = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(opened)
            # Beyond its end there is nothing: to look there would kill this process.
            if status.st_ino != inode or status.st_size < num_bytes or not num_bytes:
                raise ValueError(f"the memory of process {pid} is another one, or has fewer than {num_bytes} bytes")
            return _map(opened, num_bytes)
        finally:
            os.close(opened)
    except OSError as error:
        raise TransportError(f"the sender's memory cannot be opened: {error}") from error


def _number(where: Mapping[str, Any], name: str) -> int:
    value = where.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"where needs {name}, a whole number of 64 bits")
    return value


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED)
    # Large pages where the system has them, and all at once: to meet them one by one while copying costs more than the
    # copying.
    for advice in (mmap.MADV_HUGEPAGE, MADV_POPULATE_WRITE):
        with contextlib.suppress(OSError):  # an older kernel
            memory.madvise(advice)
    return memory


def _views(memory: mmap.mmap, entries: Sequence[TensorEntry], where: Mapping[str, Any]) -> dict[str, Tensor]:
    """Raises ValueError where the manifest points outside the memory."""
    offsets = where.get("offsets")
    if not isinstance(offsets, list) or len(offsets) != len(entries):
        raise ValueError(f"where needs offsets, one for each of {len(entries)} tensors")
    tensors = {}
    for entry, offset in zip(entries, offsets, strict=True):
        count = entry.num_bytes // entry.torch_dtype.itemsize
        if count == 0:
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.torch_dtype)
            continue
        if type(offset) is not int or not 0 <= offset <= len(memory) - entry.num_bytes or offset % ALIGNMENT:
            raise ValueError(f"{entry.name} does not lie in the memory of {len(memory)} bytes")
        flat = torch.frombuffer(memory, dtype=entry.torch_dtype, count=count, offset=offset)
        tensors[entry.name] = flat.view(entry.shape)
    return tensors
