"""The paged KV cache (arXiv:2309.06180): blocks of tokens, handed out on demand, shared between samples."""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

from xrl.models.shape import ModelShape

BLOCK_SIZE = 16  # tokens; a sequence wastes half a block on average
_RESERVE_BYTES = 1 << 30  # grow straight to what running requests may need, up to here


class KVCache:
    """Keys and values of every layer, in blocks of BLOCK_SIZE tokens that any sequence may hold.

    keys[layer], values[layer]: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self._block_shape = (shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        empty = torch.empty(0, *self._block_shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * shape.num_layers
        self.values: list[Tensor] = [empty] * shape.num_layers
        self._free: list[int] = []  # heap: low ids first, so that memory never used stays untouched

    @property
    def num_blocks(self) -> int:
        return len(self.keys[0])

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def bytes_per_block(self) -> int:
        return 2 * len(self.keys) * self.keys[0][0:0].new_empty(self._block_shape).nbytes

    def allocate(self, count: int, expected: int = 0) -> list[int]:
        """Take `count` blocks, growing the cache if need be.

        Args:
            expected: blocks that may be asked for soon after; growing covers them while that is cheap.
        """
        if count > len(self._free):
            self._grow(count - len(self._free), count + expected - len(self._free))
        return [heapq.heappop(self._free) for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            heapq.heappush(self._free, block)

    def _grow(self, needed: int, wanted: int) -> None:
        """Add at least `needed` blocks, one layer at a time so that only a layer exists twice.

        Memory that nobody has written costs nothing on CPU, so reserving what running requests may come to need is
        free there and saves copying; past _RESERVE_BYTES the cache doubles instead.
        """
        old = self.num_blocks
        reserve = min(wanted, _RESERVE_BYTES // self.bytes_per_block - old)
        new = old + max(needed, reserve, old)
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                grown = _zeros(new, self._block_shape, cache.dtype, cache.device)
                grown[:old].copy_(cache)
                caches[layer] = grown
        for block in range(old, new):
            heapq.heappush(self._free, block)


def _zeros(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on CPU as pages that the system fills only when they are touched."""
    if device.type != "cpu":
        return torch.zeros(count, *shape, dtype=dtype, device=device)
    num_bytes = count * math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(count, *shape)
