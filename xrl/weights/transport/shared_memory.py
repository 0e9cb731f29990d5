"""Weight buckets through memory that two processes of one host share: no file, no pickle.

The sender keeps anonymous memory (memfd) that the receiver opens through /proc. It has no name, so nothing is left
behind however either process ends; the kernel frees it with the last of the two.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xrl.types import WeightBucket

# Tensors start on borders of a cache line.
ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in the shared memory."""

    name: str
    dtype: str  # as torch names it, "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes


@dataclass(frozen=True, kw_only=True)
class BucketManifest:
    """What a receiver needs to see the bucket: goes through the control connection as JSON."""

    version: int
    layer: str
    path: str  # the memory, as a path any process of this user can open
    num_bytes: int  # of the whole memory
    tensors: tuple[TensorPlace, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BucketManifest:
        """Raises KeyError, TypeError or ValueError for anything but what `to_json` gives."""
        tensors = tuple(
            TensorPlace(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"]), offset=int(t["offset"]))
            for t in data["tensors"]
        )
        return cls(
            version=int(data["version"]),
            layer=str(data["layer"]),
            path=str(data["path"]),
            num_bytes=int(data["num_bytes"]),
            tensors=tensors,
        )


class SharedMemorySender:
    """One piece of shared memory, used again for bucket after bucket; it grows to the largest."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("xrl-weights", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the memory."""
        return os.fstat(self._descriptor).st_size

    def put(self, bucket: WeightBucket) -> BucketManifest:
        """Copy a bucket in; the one before must have been read by now."""
        places, end = [], 0
        for name, tensor in bucket.tensors.items():
            places.append(
                TensorPlace(
                    name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), offset=end
                )
            )
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        memory = self._at_least(end)
        for place, tensor in zip(places, bucket.tensors.values(), strict=True):
            _view(memory, place).copy_(tensor)
        return BucketManifest(
            version=bucket.version,
            layer=bucket.layer,
            path=f"/proc/{os.getpid()}/fd/{self._descriptor}",
            num_bytes=self.num_bytes,
            tensors=tuple(places),
        )

    def close(self) -> None:
        """Free the memory (receivers keep what they have mapped)."""
        self._memory = None
        os.close(self._descriptor)

    def _at_least(self, num_bytes: int) -> mmap.mmap:
        if self._memory is None or num_bytes > self.num_bytes:
            os.ftruncate(self._descriptor, max(num_bytes, mmap.PAGESIZE))
            self._memory = mmap.mmap(self._descriptor, self.num_bytes)
        return self._memory


class SharedMemoryReceiver:
    """Sees the buckets that senders put into their memory, without a copy."""

    def __init__(self) -> None:
        self._mapped: dict[str, mmap.mmap] = {}

    def read(self, manifest: BucketManifest) -> dict[str, Tensor]:
        """Tensors over the shared memory: valid until the sender is told that the bucket is done with.

        Raises:
            OSError: the sender is gone.
            ValueError: the manifest points outside the memory.
        """
        memory = self._mapped.get(manifest.path)
        if memory is None or len(memory) != manifest.num_bytes:
            descriptor = os.open(manifest.path, os.O_RDWR)
            try:
                memory = mmap.mmap(descriptor, manifest.num_bytes)
            finally:
                os.close(descriptor)
            self._mapped[manifest.path] = memory
        return {place.name: _view(memory, place) for place in manifest.tensors}


def _view(memory: mmap.mmap, place: TensorPlace) -> Tensor:
    dtype = getattr(torch, place.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{place.name} has dtype {place.dtype!r}, which torch does not know")
    count = 1
    for length in place.shape:
        count *= length
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=place.offset).view(place.shape)
