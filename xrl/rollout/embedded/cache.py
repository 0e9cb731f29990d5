"""The paged KV cache (arXiv:2309.06180): blocks of tokens, handed out on demand, shared between samples."""

from __future__ import annotations

import contextlib
import heapq
import math
import mmap
import sys

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads
from xrl.models.shape import ModelShape
from xrl.rollout.embedded import BLOCK_SIZE, bytes_per_block

_RESERVE_BYTES = 1 << 30  # reserve ahead of need up to here
_LARGE_PAGE_BYTES = 2 << 20


class KVCache:
    """Keys and values of every layer, in blocks of BLOCK_SIZE tokens that any sequence may hold.

    keys[layer], values[layer]: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    """

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, device: torch.device, *, max_blocks: int = sys.maxsize
    ) -> None:
        self._block_shape = (shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.bytes_per_block = bytes_per_block(shape, dtype.itemsize)
        self.max_blocks = max_blocks
        empty = torch.empty(0, *self._block_shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * shape.num_layers
        self.values: list[Tensor] = [empty] * shape.num_layers
        self._free: list[int] = []  # heap: low ids first, so that memory never used stays untouched
        self._num_touched = 0  # blocks below this one have been in use
        self._num_populated = 0  # blocks below this one have memory behind them

    @property
    def num_blocks(self) -> int:
        return len(self.keys[0])

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can be taken: those that are free, and those that it may still grow by."""
        return self.max_blocks - self.num_used_blocks

    def reserve(self, count: int) -> None:
        """Make room for `count` more blocks at once, as far as that is cheap, to spare growing step by step."""
        affordable = _RESERVE_BYTES // self.bytes_per_block - self.num_blocks
        missing = min(count - len(self._free), affordable, self.max_blocks - self.num_blocks)
        if missing > 0:
            self._grow(missing)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, which must be available; the cache doubles if it has too few, as far as it may."""
        assert count <= self.num_available_blocks
        if count > len(self._free):
            missing = max(count - len(self._free), self.num_blocks)
            self._grow(min(missing, self.max_blocks - self.num_blocks))
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._num_touched = max(self._num_touched, blocks[-1] + 1) if blocks else self._num_touched
        self._populate()
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            heapq.heappush(self._free, block)

    def _populate(self) -> None:
        """Put memory behind the blocks in use, and as many more as a large page holds, by all threads together."""
        module = native_module()
        if self._num_populated >= self._num_touched or module is None or self.keys[0].device.type != "cpu":
            return
        block_bytes = self.keys[0][0].numel() * self.keys[0].element_size()
        step = max(1, _LARGE_PAGE_BYTES // block_bytes)
        end = min(self.num_blocks, -(-self._num_touched // step) * step)
        start, self._num_populated = self._num_populated, end
        areas = [cache.data_ptr() + start * block_bytes for cache in (*self.keys, *self.values)]
        module.populate_pages(areas, (end - start) * block_bytes, num_threads())

    def _grow(self, count: int) -> None:
        """Add `count` blocks, one layer at a time so that only a layer exists twice."""
        old = self.num_blocks
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                grown = _zeros((old + count, *self._block_shape), cache.dtype, cache.device)
                grown[: self._num_touched].copy_(cache[: self._num_touched])
                caches[layer] = grown
        self._num_populated = self._num_touched  # those that were copied
        for block in range(old, old + count):
            heapq.heappush(self._free, block)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on CPU of pages that take up no memory until written and go back to the system when freed.

    A malloc'ed array of this size may be carved from the heap instead, which is neither.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # hundreds of times fewer page faults
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
